"""From unstructured sparsity to N:M: the confidence rule, and models converted by it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsefx.errors import ConfigError, SparsifierError
from sparsefx.masks import is_valid
from sparsefx.sparsifiers import AdaPrune, nm_for_sparsity


@pytest.mark.parametrize(
    ("sparsity", "expected"), [(0.5, (2, 4, 6)), (0.8, (1, 1, 4)), (0.9, (1, 1, 2))]
)
def test_published_table(sparsity: float, expected: tuple[int, ...]):
    assert tuple(nm_for_sparsity(sparsity, 8, conf) for conf in (0.1, 0.5, 0.95)) == expected


@given(sparsity=st.floats(0, 1), m=st.integers(2, 32), conf=st.floats(0, 1, exclude_max=True))
def test_smallest_n_that_is_probable_enough(sparsity: float, m: int, conf: float):
    def probability(n: int) -> float:
        return sum(
            math.comb(m, z) * sparsity**z * (1 - sparsity) ** (m - z) for z in range(m - n, m + 1)
        )

    n = nm_for_sparsity(sparsity, m, conf)
    assert 1 <= n <= m
    assert n == m or probability(n) > conf - 1e-9
    assert n == 1 or probability(n - 1) <= conf + 1e-9


def test_ends():
    assert nm_for_sparsity(0.0, 4) == 4  # nothing is zero: dense
    assert nm_for_sparsity(1.0, 4) == 1  # never 0, which keeps nothing
    assert nm_for_sparsity(0, 4, 0) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 8), r"sparsity=1.5 must be between 0 and 1: the share of ZEROS"),
        ((-0.1, 8), "sparsity=-0.1 must"),
        ((float("nan"), 8), "sparsity=nan must"),
        (("half", 8), "sparsity='half' is of type str"),
        ((True, 8), "sparsity=True is of type bool"),
        ((0.5, 8, 1.0), "conf=1.0 must be at least 0 and below 1"),
        ((0.5, 8, -1), "conf=-1 must"),
        ((0.5, 8, None), "conf=None is of type NoneType"),
        ((0.5, 1), "m=1 must be an int between 2 and 32"),
        ((0.5, 33), "m=33 must"),
        ((0.5, 4.0), "m=4.0 must"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str):
    with pytest.raises(SparsifierError, match=message):
        nm_for_sparsity(*arguments)


def two_layers() -> nn.Sequential:
    """The second layer's weights are small: pruned together, it loses more of them."""
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    model[2].weight.data *= 0.2
    return model


def data() -> list[torch.Tensor]:
    return [torch.randn(64, 16) @ torch.randn(16, 32) for _ in range(2)]


@pytest.mark.parametrize(("m", "transposable"), [(8, False), (4, True)])
def test_each_layer_gets_the_n_of_its_own_sparsity(m: int, transposable: bool):
    model = two_layers()
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    limit = torch.cat([w.abs().flatten() for w in weights]).kthvalue(int(0.5 * 640)).values
    shares = [float((w.abs() <= limit).double().mean()) for w in weights]
    assert shares[0] < 0.5 < shares[1]
    sparsifier = AdaPrune.from_unstructured(model, 0.5, m=m, conf=0.5, transposable=transposable)
    n = [layer.pattern.n for layer in sparsifier.layers.values()]
    assert n == [nm_for_sparsity(share, m, 0.5) for share in shares]
    assert n[0] > n[1]
    rows = sparsifier.calibrate(data()).rows
    assert all(row.after < row.before for row in rows)
    sparsifier.squash()
    for i, kept in zip((0, 2), n, strict=True):
        assert is_valid(model[i].weight, kept, m, dim=1, transposable=transposable)


def test_zeros_that_are_there_count():
    model = two_layers()
    with torch.no_grad():
        model[0].weight[torch.rand(16, 32) < 0.8] = 0
    sparsifier = AdaPrune.from_unstructured(model, m=4, conf=0.1)
    assert list(sparsifier.layers) == ["0"]
    assert sparsifier.layers["0"].pattern.n == 1
    assert sparsifier.skipped == {"2": "its sparsity asks for n=m=4"}


def test_a_mask_decides_what_stays_before_magnitude_does():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    model[0].weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    mask = torch.tensor([[False, False, True, True], [False, False, False, True]])
    sparsifier = AdaPrune.from_unstructured(model, masks={"0": mask}, m=4, conf=0.6)
    assert sparsifier.layers["0"].pattern.n == 2
    kept = sparsifier.masks()["0"]
    assert kept[0].tolist() == [False, False, True, True]
    assert kept[1].tolist() == [True, False, False, True]  # filled by the largest of the others


def test_options_and_rules_pass_through():
    model = two_layers()
    sparsifier = AdaPrune.from_unstructured(
        model, 0.5, m=4, rules=["0"], method="adam", steps=3, sequential=False
    )
    assert list(sparsifier.layers) == ["0"]
    assert sparsifier.skipped == {"2": "no rule matches"}
    assert (sparsifier.method, sparsifier.sequential) == ("adam", False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 2.0}, SparsifierError, "sparsity=2.0 must be"),
        ({"sparsity": 0.5, "conf": 1}, SparsifierError, "conf=1 must be"),
        ({"sparsity": 0.5, "m": 1}, ConfigError, "m=1 must be"),
        ({}, SparsifierError, "every layer needs n=m=4 at conf=0.1: nothing to convert"),
        ({"sparsity": 0.5, "masks": {}}, SparsifierError, "give sparsity or masks, not both"),
        ({"masks": {}}, SparsifierError, "masks has none for layer '0'"),
        (
            {"masks": {"0": torch.ones(16, 32)}},
            SparsifierError,
            r"the mask for layer '0' is torch.float32 \(16, 32\); pass torch.bool \(16, 32\)",
        ),
    ],
)
def test_bad_conversions_leave_the_model_alone(options, error, message: str, snapshot):
    model = two_layers()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        AdaPrune.from_unstructured(model, **options)
    before.assert_same()
