"""Transposable masks by kernels: the masks that the operators make, ties and NaN included."""

import pytest
import torch

from sparsefx import masks
from sparsefx.kernels.transposable_mask import triton as kernel
from sparsefx.masks import exact, flow
from sparsefx.masks.tiles import map_tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


def twin(w, n, m, solve=exact.solve):
    """What the operators make, on the CPU."""
    return map_tiles(w.cpu(), m, lambda tiles: solve(tiles, n)).to(w.device)


def weights(kind, rows, cols, dtype, device):
    w = torch.randn(rows, cols)
    if kind == "not finite":
        w[torch.rand_like(w) < 0.05] = -INF
        w[torch.rand_like(w) < 0.05] = NAN
    elif kind == "infinite":
        w[torch.rand_like(w) < 0.1] = INF
    w = {
        "ties": w.round(),
        "two levels": torch.where(w > 0, 2.0, 1.0),
        "heavy tails": w**9,
        "subnormal": w * torch.finfo(dtype).smallest_normal / 4,
        "constant": torch.full_like(w, 0.3),
        "zero": torch.zeros_like(w),
    }.get(kind, w)
    return w.to(dtype).to(device)


KINDS = [
    *("normal", "ties", "two levels", "heavy tails", "subnormal", "not finite", "infinite"),
    *("constant", "zero"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4)])
def test_small_tiles_are_the_reference_s(n, m, kind, dtype, device):
    w = weights(kind, 32, 44, dtype, device)
    assert torch.equal(kernel.solve(w, n, m, "exact"), twin(w, n, m))


@pytest.mark.parametrize("kind", KINDS)
def test_larger_tiles_are_the_reference_s(kind, device):
    for n, dtype in [(4, torch.float32), (3, torch.bfloat16)]:
        w = weights(kind, 16, 24, dtype, device)
        assert torch.equal(kernel.solve(w, n, 8, "exact"), twin(w, n, 8, flow.solve))


# --- row by row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (3, 5), (16, 32), (21, 31)])
def test_rows_are_the_reference_s(n, m, dtype, device):
    for kind, dim in [("not finite", 0), ("ties", -1)]:
        w = weights(kind, 2 * m, 2 * m, dtype, device)
        got = kernel.nm_mask(w, n, m, dim, False)
        assert torch.equal(got, masks.nm_mask(w, n, m, dim))
        assert got.is_contiguous()


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_rows_of_any_strides(dim, device):
    w = torch.randn(8, 4, 3, 40, device=device)
    for view in (w, w.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0), w.flip(0)[::2]):
        got = kernel.nm_mask(view, 2, 4, dim, False)
        assert torch.equal(got, masks.nm_mask(view, 2, 4, dim))
