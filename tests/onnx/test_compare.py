"""The comparison: what counts as equal, how far apart is too far, which inputs are drawn."""

import math

import pytest
import torch

from sparsefx.errors import ExportError
from sparsefx.onnx.compare import compare, fresh_inputs, tolerance

NAN, INF = math.nan, math.inf


def error(expected: object, got: object, allowed: float = 1e-3) -> float:
    return compare([torch.tensor(expected)], [torch.tensor(got)], allowed).error


def test_errors_are_relative_to_the_largest_value():
    assert error([100.0, 0.0], [100.0, 1.0]) == pytest.approx(0.01)
    assert error([0.0], [0.5]) == 0.5  # nothing to relate it to
    assert error([1.0, NAN, INF, -INF], [1.0, NAN, INF, -INF]) == 0
    assert error([1.0, 2.0], [1.0, NAN]) == INF
    assert error([INF], [-INF]) == INF
    assert error([True, False], [True, True]) == 1
    assert compare([torch.zeros(0)], [torch.zeros(0)], 0.0).error == 0


def test_whole_numbers_must_be_equal_and_the_worst_output_is_named():
    floats, whole = torch.tensor([1.0]), torch.tensor([1000])
    found = compare([floats, whole], [floats + 1e-4, whole + 1], 1e-3)
    assert (found.where, found.tolerance) == ("output 1", 0.0)
    assert found.error == pytest.approx(1e-3)
    found = compare([whole, floats], [whole, floats + 1e-4], 1e-3)
    assert (found.where, found.tolerance) == ("output 0", 1e-3) or found.where == "output 1"
    assert found.error == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("got", [[], [torch.ones(2)], [torch.ones(3, dtype=torch.float64)]])
def test_other_outputs_are_an_error_of_their_own(got):
    with pytest.raises(ExportError, match="the eager model returns"):
        compare([torch.ones(3)], got, 1.0)


def test_rounding_explains_what_grows_with_the_depth():
    half, single = torch.ones(1, dtype=torch.float16), torch.ones(1)
    assert tolerance([single], [], 400) == pytest.approx(16 * 20 * 2**-23)
    assert tolerance([single], [torch.float16], 1) == tolerance([half], [], 1) == 16 * 2**-10
    assert tolerance([torch.ones(1, dtype=torch.int64)], [torch.int64], 9) == 0
    # a product really stays within it, and a missing mask doesn't
    x, w = torch.randn(64, 512), torch.randn(512, 64)
    exact, allowed = (x.double() @ w.double()).float(), tolerance([single], [], 512)
    assert compare([exact], [x @ w], allowed).error < allowed
    assert compare([exact], [x @ torch.where(w.abs() > 0.1, w, 0)], allowed).error > 100 * allowed


def test_fresh_inputs_are_other_legal_ones():
    ids, mask = torch.randint(5, 9, (50,)), torch.tensor([0.0, -INF]).repeat(20)
    image, empty = torch.rand(1, 3, 40, 40) + 7, torch.zeros(0, 3)
    before = torch.get_rng_state()
    fresh = fresh_inputs((ids, mask, image, empty, None, 3))
    assert torch.equal(torch.get_rng_state(), before)
    again = fresh_inputs((ids, mask, image, empty, None, 3))
    assert all(torch.equal(a, b) for a, b in zip(fresh[:4], again[:4], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(fresh[:3], (ids, mask, image), strict=True))
    assert [x.shape for x in fresh[:4]] == [x.shape for x in (ids, mask, image, empty)]
    assert set(fresh[0].tolist()) <= set(ids.tolist())
    assert set(fresh[1].tolist()) == {0.0, -INF}
    assert fresh[2].mean().item() == pytest.approx(7.5, abs=0.05)
    assert fresh[4:] == (None, 3)
