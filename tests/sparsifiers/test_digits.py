"""Training on scikit-learn's digits: accuracy at 2:4, 4:8 transposable and 1:16, and mask flips.

The recipe: 1297 training and 500 test images, an MLP 64-304-104-10, SGD with momentum, 40 epochs of
20 batches, three seeds; hidden layers are masked, the last one is dense.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsefx import Dense, Rule
from sparsefx.sparsifiers import SRSTE, Sparsifier, TransposableNM

pytestmark = pytest.mark.slow
RULES = [Rule("4", forward=Dense()), "*"]
SEEDS = (0, 1, 2)
Make = Callable[[nn.Module], Sparsifier]


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=500, stratify=y, random_state=0)
    return [torch.tensor(p, dtype=torch.float32 if p.ndim == 2 else torch.int64) for p in parts]


def train(digits, make: Make, seed: int) -> tuple[float, int]:
    """Accuracy in percent, and mask flips of all layers and steps."""
    x, x_test, y, y_test = digits
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10)
    )
    sparsifier = make(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(40):
        for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            sparsifier.step()
    with torch.no_grad():
        right = (model(x_test).argmax(1) == y_test).float().mean().item()
    return 100 * right, sum(sparsifier.sad(total=True).values())


def means(digits, make: Make) -> tuple[float, float]:
    """Means over the seeds of accuracy and flips."""
    runs = [train(digits, make, seed) for seed in SEEDS]
    return sum(a for a, _ in runs) / len(runs), sum(f for _, f in runs) / len(runs)


def test_2_4(digits):
    accuracy, _ = means(digits, lambda model: SRSTE(model, 2, 4, rules=RULES))
    assert accuracy >= 97.2


def test_4_8_transposable(digits):
    accuracy, _ = means(digits, lambda model: TransposableNM(model, 4, 8, freeze=760, rules=RULES))
    assert accuracy >= 97.0


def test_at_1_16_the_decay_helps(digits):
    plain, _ = means(digits, lambda model: SRSTE(model, 1, 16, decay=0, rules=RULES))
    decayed, _ = means(digits, lambda model: SRSTE(model, 1, 16, decay=2e-3, rules=RULES))
    assert decayed > plain


def test_flips_fall_with_the_decay(digits):
    flips = [
        train(digits, lambda model, decay=decay: SRSTE(model, decay=decay, rules=RULES), 0)[1]
        for decay in (0.0, 2e-4, 2e-3, 2e-2)
    ]
    assert flips == sorted(flips, reverse=True)
    assert len(set(flips)) == 4
