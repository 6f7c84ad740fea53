"""Products with a mask that keeps little, in C++: values, orientations, what is declined."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsefx  # noqa: F401  # registers the kernels
from sparsefx import compat, kernels, ops
from sparsefx.errors import KernelError, SparsefxWarning
from sparsefx.kernels import _native
from sparsefx.kernels.masked_mm import cpu

REFERENCE = ops.REFERENCES[ops.masked_mm]


@pytest.fixture(autouse=True)
def whatever_is_kept(monkeypatch):
    kernels.register()
    assert _native.library(cpu._SOURCE, cpu._declare) is not None
    monkeypatch.setattr(cpu, "_MOST_KEPT", 1.0)


@pytest.fixture
def refused(monkeypatch):
    """Any call of the reference is noted."""
    calls = []

    def noted(*args):
        calls.append(args)
        return REFERENCE(*args)

    monkeypatch.setitem(ops.REFERENCES, ops.masked_mm, noted)
    return calls


def operands(batch, depth, outputs, kept=0.25):
    x, bias = torch.randn(batch, depth), torch.randn(outputs)
    return x, torch.randn(outputs, depth).t(), (torch.rand(outputs, depth) < kept).t(), bias


def as_stored(w, mask):
    """The same numbers where the axis of the outputs is the one along memory."""
    return w.contiguous(), mask.contiguous()


# batch, depth, outputs: odd sizes, blocks of 64, several tiles, panels and chunks
SHAPES = [(1, 1, 1), (3, 5, 7), (65, 64, 130), (17, 700, 66), (130, 129, 300), (48, 2500, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [0.02, 0.25, 1.0])
def test_values(shape, kept, assert_as_good_as_eager, refused):
    x, w, mask, bias = operands(*shape, kept)
    for one in ((w, mask), as_stored(w, mask), (w, mask.contiguous()), (w.contiguous(), mask)):
        masked = torch.where(mask, w, 0)
        assert_as_good_as_eager(cpu.masked_mm(x, *one, bias), x, masked, bias)
        assert_as_good_as_eager(cpu.masked_mm(x, *one, None), x, masked)
    assert not refused


@pytest.mark.parametrize("lanes", [int(os.environ.get("SPARSEFX_LANES", "8"))])
def test_fewer_lanes(lanes, monkeypatch, assert_as_good_as_eager):
    source = f"#define SPARSEFX_LANES {lanes}\n" + _native.self_contained(cpu._SOURCE)
    library = compat.build_cpp(source)
    cpu._declare(library)
    monkeypatch.setitem(_native._built, cpu._SOURCE, library)
    for shape in SHAPES:
        x, w, mask, bias = operands(*shape)
        for one in ((w, mask), as_stored(w, mask)):
            assert_as_good_as_eager(cpu.masked_mm(x, *one, bias), x, torch.where(mask, w, 0), bias)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 80), st.integers(0, 80)),
    kept=st.sampled_from([0.0, 0.1, 0.9]),
    across=st.booleans(),
)
def test_any_size(shape, kept, across):
    x, w, mask, bias = operands(*shape, kept)
    w, mask = as_stored(w, mask) if across else (w, mask)
    torch.testing.assert_close(cpu.masked_mm(x, w, mask, bias), REFERENCE(x, w, mask, bias))


def test_any_strides(assert_as_good_as_eager, refused):
    x = torch.randn(96, 40).t()[::2]
    w, mask = torch.randn(192, 60)[::2, ::2], (torch.rand(192, 60) < 0.3)[::2, ::2]
    bias = torch.randn(60)[::2]
    wide = torch.randn(96, 64)[:, :30], (torch.rand(96, 64) < 0.3)[:, 5:35]
    for one in ((w, mask), wide, (wide[0], mask), (torch.randn(30, 128)[:, 7:103].t(), mask)):
        assert_as_good_as_eager(cpu.masked_mm(x, *one, bias), x, torch.where(*one[::-1], 0), bias)
    assert not refused


def test_bytes_of_a_mask_count_as_true_whatever_they_are():
    x, w, mask, _ = operands(5, 130, 70)
    odd = (mask.to(torch.uint8) * 6).view(torch.bool)
    assert torch.equal(cpu.masked_mm(x, w, odd, None), cpu.masked_mm(x, w, mask, None))


@pytest.mark.parametrize("across", [False, True])
def test_what_is_not_kept_is_not_multiplied(across):
    """NaN and infinity reach the outputs whose weights keep their column, and no others."""
    x, w, mask, _ = operands(70, 130, 60)
    w, mask = as_stored(w, mask) if across else (w, mask)
    for bad in (torch.nan, torch.inf):
        y = x.clone()
        y[3, 100] = bad
        found = cpu.masked_mm(y, w, mask, None)
        assert torch.equal(~found[3].isfinite(), mask[100])
        assert found[4].isfinite().all()
    own = w.clone()
    own[~mask] = torch.nan
    assert torch.equal(cpu.masked_mm(x, own, mask, None), cpu.masked_mm(x, w, mask, None))


def test_threads_and_layouts_give_the_same():
    x, w, mask, bias = operands(70, 600, 700, 0.1)
    once, before = cpu.masked_mm(x, w, mask, bias), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one in ((w, mask), as_stored(w, mask)):
            assert torch.equal(cpu.masked_mm(x, *one, bias), once)
    finally:
        torch.set_num_threads(before)


def test_gradients(assert_as_good_as_eager):
    x, w, mask, bias = operands(9, 40, 70)
    x.requires_grad_(), w.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(9, 70)
    found = torch.autograd.grad(ops.masked_mm(x, w, mask, bias), (x, w, bias), grad)
    assert_as_good_as_eager(found[0], grad, torch.where(mask, w, 0).detach().t())
    torch.testing.assert_close(found[1], torch.where(mask, x.detach().t() @ grad, 0))
    torch.testing.assert_close(found[2], grad.sum(0))


# --- declined


def test_masks_that_keep_much_are_the_reference_s(monkeypatch, refused):
    monkeypatch.setattr(cpu, "_MOST_KEPT", 0.4)
    x, w, mask, bias = operands(5, 130, 70, 0.5)
    for one in ((w, mask), as_stored(w, mask)):
        assert torch.equal(cpu.masked_mm(x, *one, bias), REFERENCE(x, *one, bias))
    assert len(refused) == 2
    x, w, mask, bias = operands(5, 130, 70, 0.3)
    cpu.masked_mm(x, w, mask, bias)
    assert len(refused) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_so_are_other_types(dtype, refused):
    x, w, mask, bias = operands(5, 13, 7)
    args = x.to(dtype), w.to(dtype), mask, bias.to(dtype)
    torch.testing.assert_close(cpu.masked_mm(*args), REFERENCE(*args))
    assert len(refused) == 1


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 0, 4), (4, 4, 0)], ids=str)
def test_so_is_what_is_empty(shape, refused):
    x, w, mask, bias = operands(*shape)
    torch.testing.assert_close(cpu.masked_mm(x, w, mask, bias), REFERENCE(x, w, mask, bias))
    assert len(refused) == 1


def test_so_are_sizes_that_contradict_each_other():
    x, w, mask, bias = operands(5, 13, 7)
    for args in (
        (x[:, :12], w, mask, None),
        (x, w, mask[:, :6], None),
        (x, w, mask, bias[:6]),
    ):
        with pytest.raises(RuntimeError):
            cpu.masked_mm(*args)


def test_without_a_compiler_the_reference_serves_after_one_warning(monkeypatch):
    def refuse(source):
        raise KernelError("C++ can't be built here: no compiler")

    monkeypatch.setattr(_native, "build_cpp", refuse)
    monkeypatch.setattr(_native, "_built", {})
    args = operands(5, 13, 7)
    with pytest.warns(SparsefxWarning, match="CPU kernels of masked_mm run as torch operators"):
        found = cpu.masked_mm(*args)
    assert torch.equal(found, REFERENCE(*args))
    assert torch.equal(cpu.masked_mm(*args), found)  # and no second warning
