"""DST on scikit-learn's digits: how much is kept, and how well the rest does.

The recipe is that of test_digits.py, with all layers masked.
"""

import pytest
import torch
from torch import nn

from sparsefx.sparsifiers import DST

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=500, stratify=y, random_state=0)
    return [torch.tensor(p, dtype=torch.float32 if p.ndim == 2 else torch.int64) for p in parts]


def train(digits, epochs, **options) -> tuple[float, float]:
    """Accuracy in percent, and the share that is kept."""
    x, x_test, y, y_test = digits
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10)
    )
    dst = DST(model, **options)
    optimizer = torch.optim.SGD(dst.parameter_groups(), 0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            (loss + dst.loss()).backward()
            optimizer.step()
            dst.step()
    dst.squash()
    with torch.no_grad():
        right = (model(x_test).argmax(1) == y_test).float().mean().item()
    kept = sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() == 2)
    return 100 * right, kept / (64 * 304 + 304 * 104 + 104 * 10)


def test_half_is_kept(digits):
    accuracy, kept = train(digits, 40, alpha=5e-4)
    assert abs(kept - 0.5) <= 0.03
    assert accuracy >= 97.2


def test_a_tenth_is_asked_for(digits):
    accuracy, kept = train(digits, 20, density=0.1, steps=280)
    assert abs(kept - 0.1) <= 0.01
    assert accuracy >= 96
