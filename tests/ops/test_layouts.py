"""Operands widened so that a product runs on whole vectors: where, and that no value moves."""

import pytest
import torch

from sparsefx import ops
from sparsefx.ops.gathers import LANES, whole_vectors


def matrix(n, k, stored="rows", **options):
    return torch.randn(n, k, **options) if stored == "rows" else torch.randn(k, n, **options).t()


@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("k", [129, 143, 200])
def test_zeros_stand_behind_what_was_there(k, stored):
    x = matrix(512, k, stored)
    wide = whole_vectors(x, 512)
    assert wide.shape == (512, -(-k // LANES) * LANES)
    assert wide.stride().index(1) == x.stride().index(1)  # gathered along memory, and kept so
    torch.testing.assert_close(wide[:, :k], x, rtol=0, atol=0)
    assert not wide[:, k:].any()


@pytest.mark.parametrize(
    ("x", "rows"),
    [
        (matrix(512, 144), 512),  # whole already
        (matrix(511, 129), 512),  # too few to be worth a copy
        (matrix(512, 129), 511),
        (matrix(512, 127), 512),
        (matrix(512, 129, dtype=torch.float64), 512),
        (matrix(512, 129, dtype=torch.bfloat16), 512),
        (torch.empty(512, 129, device="meta"), 512),
    ],
)
def test_what_gains_nothing_is_left_as_it_is(x, rows):
    assert whole_vectors(x, rows) is x


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_gradients_over_widened_operands(stored, rest):
    m, n, depth, k = 530, 520, 300, 130
    x, grad = torch.randn(m, depth), torch.randn(m, n)
    w = matrix(n, depth, stored).t()  # [K, N]
    picked = torch.randperm(depth)[:k].sort()[0]
    wide = [t.double() for t in (x, w, grad)]
    for found, expected in zip(
        gradients(x, w, grad, picked, rest), gradients(*wide, picked, rest), strict=True
    ):
        assert found.dtype == torch.float32
        off = (found - expected).norm() / expected.norm()
        assert off < 4 * torch.finfo(torch.float32).eps * max(m, n) ** 0.5


def gradients(x, w, grad, picked, rest):
    xs = ops.gather_columns(x, picked, None, rest)
    return (
        ops.sampled_mm_grad_input(grad, w, picked, None, rest),
        ops.sampled_mm_grad_weight(xs, grad, picked, w.shape[0], True, rest),
        ops.sampled_mm_grad_weight(xs, grad, picked, w.shape[0], False, rest),
    )
