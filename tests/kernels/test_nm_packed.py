"""Packed N:M products and their weights unpacked in C++, in every width that a machine may have."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsefx  # noqa: F401  # registers the kernels
from sparsefx import compat, kernels, ops
from sparsefx.errors import KernelError, SparsefxWarning
from sparsefx.kernels import _native
from sparsefx.kernels.nm_packed import cpu

PATTERNS = [
    (1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (1, 8), (4, 8), (4, 16), (8, 16), (1, 16), (5, 17),
    (16, 32), (3, 7), (7, 64),
]  # fmt: skip
TYPES = [torch.float32, torch.bfloat16]
# batch, rows, groups: single rows, odd sizes, more than 4 rows, more than one tile and chunk
SHAPES = [
    (1, 1, 1),
    (1, 5, 7),
    (3, 9, 33),
    (7, 130, 12),
    (9, 13, 40),
    (37, 6, 4),
    (70, 33, 21),
    (129, 300, 5),
]


@pytest.fixture(autouse=True)
def kernels_are_built(monkeypatch):
    kernels.register()
    assert _native.library(cpu._SOURCE, cpu._declare) is not None
    monkeypatch.setattr(
        cpu, "_PACKED", dict.fromkeys(TYPES, (1.0, 0))
    )  # batches are multiplied packed


# AVX2's vectors hold 8; without any, 1: SPARSEFX_LANES=1 in the environment builds that
@pytest.fixture(scope="module", params=[int(os.environ.get("SPARSEFX_LANES", "8"))])
def narrow(request):
    """The same C++ with narrower vectors."""
    source = f"#define SPARSEFX_LANES {request.param}\n" + _native.self_contained(cpu._SOURCE)
    library = compat.build_cpp(source)
    cpu._declare(library)
    return library


def packed(rows, groups, n, m, dtype):
    return ops.nm_pack(torch.randn(rows, groups * m).to(dtype), n, m)


def unpacked(values, codes, n, m, depth):
    return ops.REFERENCES[ops.nm_unpack](values, codes, n, m, depth)


def check(x, values, codes, bias, n, m):
    """Of the op, and of the launcher that C++ leaves some calls to."""
    for call in (ops.nm_packed_mm, cpu.multiply):
        check_found(call(x, values, codes, bias, n, m), x, values, codes, bias, n, m)


def check_found(found, x, values, codes, bias, n, m):
    """Against the float64 twin, element by element."""
    w = unpacked(values, codes, n, m, x.shape[1]).double()
    wide = torch.nn.functional.linear(x.double(), w, None if bias is None else bias.double())
    size = x.double().abs() @ w.abs().t() + (0 if bias is None else bias.double().abs())
    # one rounding to the dtype, and sums in float32
    bound = torch.finfo(x.dtype).eps * wide.abs()
    bound = bound + (w.shape[1] + 2) * torch.finfo(torch.float32).eps * size + 1e-30
    assert (found.dtype, found.shape, found.is_contiguous()) == (x.dtype, wide.shape, True)
    assert ((found.double() - wide).abs() <= bound).all()


def check_all_shapes(n, m, dtype):
    for batch, rows, groups in SHAPES:
        values, codes = packed(rows, groups, n, m, dtype)
        x, bias = torch.randn(batch, groups * m).to(dtype), torch.randn(rows).to(dtype)
        check(x, values, codes, bias, n, m)
        check(x, values, codes, None, n, m)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_product(n, m, dtype):
    check_all_shapes(n, m, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_product_with_fewer_lanes(dtype, narrow, monkeypatch):
    monkeypatch.setitem(_native._built, cpu._SOURCE, narrow)
    for n, m in ((2, 4), (5, 17), (16, 32), (1, 2)):
        check_all_shapes(n, m, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@given(
    pattern=st.sampled_from(PATTERNS),
    shape=st.tuples(st.integers(0, 140), st.integers(0, 33), st.integers(0, 40)),
    bias=st.booleans(),
)
def test_product_of_any_size(dtype, pattern, shape, bias):
    (n, m), (batch, rows, groups) = pattern, shape
    values, codes = packed(rows, groups, n, m, dtype)
    x = torch.randn(batch, groups * m).to(dtype)
    check(x, values, codes, torch.randn(rows).to(dtype) if bias else None, n, m)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64, torch.float16], ids=str)
@given(
    pattern=st.sampled_from(PATTERNS),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 40)),
)
def test_unpacked(dtype, pattern, shape):
    (n, m), (rows, groups) = pattern, shape
    values, codes = packed(rows, groups, n, m, dtype)
    found = ops.nm_unpack(values, codes, n, m, groups * m)
    assert torch.equal(found, unpacked(values, codes, n, m, groups * m))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_any_strides(dtype):
    values, codes = packed(10, 12, 2, 4, dtype)
    for batch in (3, 20):
        x = torch.randn(48, 2 * batch).to(dtype).t()[::2]
        spaced = torch.stack([values, values], 1)[:, 0], torch.stack([codes, codes], 1)[:, 0]
        check(x, *spaced, torch.randn(20).to(dtype)[::2], 2, 4)
    found = ops.nm_unpack(*spaced, 2, 4, 48)
    assert torch.equal(found, unpacked(values, codes, 2, 4, 48))


@pytest.mark.parametrize("batch", [2, 20])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 16), (3, 7)])
def test_what_is_not_kept_is_not_multiplied(n, m, dtype, batch):
    """NaN and infinity reach the outputs whose weights keep their column, and no others."""
    groups = 9
    values, codes = packed(30, groups, n, m, dtype)
    kept = unpacked(torch.ones_like(values), codes, n, m, groups * m) > 0
    for bad in (torch.nan, torch.inf):
        for column in (0, m + 1, groups * m - 1):
            x = torch.randn(batch, groups * m).to(dtype)
            x[1, column] = bad
            found = ops.nm_packed_mm(x, values, codes, None, n, m)
            assert torch.equal(~found[1].isfinite(), kept[:, column])
            assert found[0].isfinite().all()
    values[4, 2] = torch.nan
    found = ops.nm_packed_mm(torch.randn(batch, groups * m).to(dtype), values, codes, None, n, m)
    assert torch.equal(found.isnan().all(0), torch.arange(30) == 4)


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (1, 3), (130, 1), (130, 3)])
def test_threads_give_the_same(batch, threads):
    values, codes = packed(600, 160, 1, 4, torch.float32)
    x, before = torch.randn(batch, 640), torch.get_num_threads()
    once = ops.nm_packed_mm(x, values, codes, None, 1, 4)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.nm_packed_mm(x, values, codes, None, 1, 4), once)
        whole = ops.nm_unpack(values, codes, 1, 4, 640)
        assert torch.equal(whole, unpacked(values, codes, 1, 4, 640))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_dense_batches_are_unpacked(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_PACKED", dict.fromkeys(TYPES, (0.4, 3)))  # 0.49 for 33 rows
    values, codes = packed(9, 6, 2, 4, dtype)
    x, bias = torch.randn(33, 24).to(dtype), torch.randn(9).to(dtype)
    w = unpacked(values, codes, 2, 4, 24)
    found = ops.nm_packed_mm(x, values, codes, bias, 2, 4)
    assert torch.equal(found, torch.nn.functional.linear(x, w, bias))


def test_codes_that_nothing_writes_read_nothing_outside():
    """5 bits hold 17 .. 255 as well: they count as 16."""
    values, codes = packed(6, 3, 5, 17, torch.float32)
    codes.fill_(255)
    last = torch.full_like(codes, 16)
    assert torch.equal(ops.nm_unpack(values, codes, 5, 17, 51), unpacked(values, last, 5, 17, 51))
    for batch in (1, 20):
        x = torch.randn(batch, 51)
        found = ops.nm_packed_mm(x, values, codes, None, 5, 17)
        expected = ops.nm_packed_mm(x, values, last, None, 5, 17)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_declined(dtype):
    values, codes = packed(5, 6, 2, 4, dtype)
    x = torch.randn(3, 24).to(dtype)
    expected = ops.REFERENCES[ops.nm_packed_mm](x, values, codes, None, 2, 4)
    torch.testing.assert_close(ops.nm_packed_mm(x, values, codes, None, 2, 4), expected)


def test_sizes_that_contradict_each_other_are_the_reference_s_to_refuse():
    values, codes = packed(5, 6, 2, 4, torch.float32)
    with pytest.raises(RuntimeError):
        ops.nm_packed_mm(torch.randn(3, 24), values, codes[:, :1], None, 2, 4)
    with pytest.raises(RuntimeError):
        ops.nm_packed_mm(torch.randn(3, 24), values, codes, torch.randn(4), 2, 4)
    with pytest.raises(RuntimeError):
        ops.nm_unpack(values, codes, 2, 4, 20)


def test_few_rows_pass_through_no_python(monkeypatch):
    """As few as are streamed; the rest, and what isn't contiguous, reaches the launcher."""
    values, codes = packed(5, 8, 2, 4, torch.float32)
    x, bias = torch.randn(33, 32), torch.randn(5)
    ops.nm_packed_mm(x[:1], values, codes, bias, 2, 4)
    assert ("nm_packed_mm", "CPU") not in kernels._libraries
    calls, launch = [], _native.library
    monkeypatch.setattr(_native, "library", lambda *args: calls.append(args) or launch(*args))
    for rows in (1, 32):
        assert ops.nm_packed_mm(x[:rows], values, codes, None, 2, 4).shape == (rows, 5)
        ops.nm_packed_mm(x[:rows].bfloat16(), values.bfloat16(), codes, bias.bfloat16(), 2, 4)
    assert not calls
    for args in (
        (x, values, codes, bias),
        (x.t().contiguous().t()[:2], values, codes, bias),
        (x[:2], values, codes, torch.randn(10)[::2]),
        (x[:2].double(), values.double(), codes, None),
        (x[:0], values, codes, None),
    ):
        assert ops.nm_packed_mm(*args, 2, 4).shape == (args[0].shape[0], 5)
    assert len(calls) == 5


def test_without_a_compiler_the_reference_serves_after_one_warning(monkeypatch):
    def refuse(source):
        raise KernelError("C++ can't be built here: no compiler")

    values, codes = packed(5, 6, 2, 4, torch.float32)
    monkeypatch.setattr(_native, "build_cpp", refuse)
    monkeypatch.setattr(_native, "_built", {})
    said = "CPU kernels of nm_packed run as torch operators.*: C[+][+] can't be built here"
    with pytest.warns(SparsefxWarning, match=said):
        found = ops.nm_unpack(values, codes, 2, 4, 24)
    assert torch.equal(found, unpacked(values, codes, 2, 4, 24))
    x = torch.randn(3, 24)
    for call in (cpu.nm_packed_mm, cpu.multiply):  # and no second warning
        check_found(call(x, values, codes, None, 2, 4), x, values, codes, None, 2, 4)
