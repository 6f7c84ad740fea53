"""Packed N:M weights: what is kept, in which bits, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsefx import masks, ops
from sparsefx.ops.packed import code_bits

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (1, 16), (5, 17), (16, 32), (3, 7)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(n, m, dtype):
    w = torch.randn(5, 3 * m).to(dtype)
    values, codes = ops.nm_pack(w, n, m)
    assert values.shape == (5, 3 * n)
    assert codes.shape == (5, -(-3 * n * code_bits(m) // 8))
    kept = torch.where(masks.nm_mask(w, n, m, 1), w, 0)
    assert torch.equal(ops.nm_unpack(values, codes, n, m, 3 * m), kept)


def test_bits_stand_where_the_words_say():
    w = torch.tensor([[0.0, 5, 0, -6, 7, 0, 0, 8, 9, 9, 0, 0]])
    values, codes = ops.nm_pack(w, 2, 4)
    assert values.tolist() == [[5, -6, 7, 8, 9, 9]]
    # places 1 3, 0 3, then 0 1 and nothing, from the lowest bit on
    assert codes.tolist() == [[0b11_00_11_01, 0b00_00_01_00]]


def test_ties_zeros_and_nan_follow_the_mask():
    w = torch.tensor([[1.0, -1, 1, 1], [0, 0, 0, 0], [0, torch.nan, 3, -torch.inf]])
    values, codes = ops.nm_pack(w, 2, 4)
    torch.testing.assert_close(
        values, torch.tensor([[1.0, -1], [0, 0], [torch.nan, -torch.inf]]), equal_nan=True
    )
    assert codes.flatten().tolist() == [0b01_00, 0b01_00, 0b11_01]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    pattern=st.sampled_from(PATTERNS),
    shape=st.tuples(st.integers(0, 70), st.integers(0, 33), st.integers(0, 9)),
)
def test_product(dtype, bias, pattern, shape):
    (n, m), (batch, rows, groups) = pattern, shape
    depth = groups * m
    x, w = torch.randn(batch, depth).to(dtype), torch.randn(rows, depth).to(dtype)
    b = torch.randn(rows).to(dtype) if bias else None
    values, codes = ops.nm_pack(w, n, m)
    found = ops.nm_packed_mm(x, values, codes, b, n, m)
    kept = torch.where(masks.nm_mask(w, n, m, 1), w, 0).double()
    wide = torch.nn.functional.linear(x.double(), kept, b.double() if bias else None)
    size = x.double().abs() @ kept.abs().t() + (b.double().abs() if bias else 0)
    assert found.dtype == dtype
    assert ((found.double() - wide).abs() <= 4 * torch.finfo(dtype).eps * size + 1e-30).all()
