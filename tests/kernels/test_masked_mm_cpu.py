"""Products with a mask that keeps little, in C++: values, orientations, what is declined."""

import ctypes
import dataclasses
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsefx as sfx
from sparsefx import compat, cost, kernels, ops
from sparsefx.config import NM, Dense, Masked, Rule, SparseConfig
from sparsefx.errors import KernelError, SparsefxWarning
from sparsefx.kernels import _native
from sparsefx.kernels.masked_mm import cpu
from sparsefx.plan import Site

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


# --- in a graph


class Held(torch.nn.Module):
    """A layer that holds the mask of its weight."""

    def __init__(self, kept):
        super().__init__()
        self.fc = torch.nn.Linear(256, 256)
        self.register_buffer("mask", torch.rand(256, 256) < kept)

    def forward(self, x):
        return torch.nn.functional.linear(
            x, torch.where(self.mask, self.fc.weight, 0), self.fc.bias
        )


def training(model, *rules):
    config = SparseConfig(rules, False, codegen="aot_eager")
    return sfx.explain(model, config=config)(torch.randn(70, 256, requires_grad=True))


def run_as(report):
    return [row.lowering for row in report.sites]


LAYER = torch.nn.Linear(256, 256)
OURS, INLINED = ["C++ masked_mm"] * 2 + ["dense"], ["masked dense"] * 2 + ["dense"]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule("*", NM(1, 4)), OURS),
        (Rule("*", NM(1, 4, transposable=True)), OURS),
        (Rule("*", NM(2, 4)), INLINED),
        (Rule("*", NM(2, 4), lowering="cpp"), OURS),
        (Rule("*", NM(1, 4), lowering="reference"), INLINED),
        (Rule("*", NM(1, 4), grad_input=Dense()), ["C++ masked_mm", "dense", "dense"]),
    ],
)
def test_what_n_of_m_runs_as(rule, said):
    report = training(LAYER, rule)
    assert run_as(report) == said
    assert report.after[0].count("masked_mm(") == said.count("C++ masked_mm")
    ours = [row for row in report.sites if row.lowering == "C++ masked_mm"]
    assert all(row.flops_executed == row.flops_sparse < row.flops_dense for row in ours)
    assert all(row.predicted_us is not None for row in ours)


@pytest.mark.parametrize(("kept", "said"), [(0.2, OURS), (0.3, INLINED)])
def test_what_a_stored_mask_runs_as(kept, said):
    report = training(Held(kept))
    assert run_as(report) == said
    assert report.after[0].count("masked_mm(") == said.count("C++ masked_mm")


def test_small_layers_and_other_types_are_inlined():
    small = training(torch.nn.Sequential(torch.nn.Linear(256, 128)), Rule("*", NM(1, 4)))
    half = sfx.explain(
        torch.nn.Linear(256, 256).bfloat16(),
        config=SparseConfig([Rule("*", NM(1, 4))], False),
    )(torch.randn(70, 256, dtype=torch.bfloat16, requires_grad=True))
    assert run_as(small) == run_as(half) == INLINED


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(1, 8, True)], ids=str)
def test_a_compiled_layer_is_what_it_was(pattern):
    results = []
    for lowering in (None, "reference"):
        torch.compiler.reset()
        rule = Rule("*", pattern, lowering=lowering)
        config = SparseConfig([rule], False, codegen="aot_eager")
        x = torch.linspace(-1, 1, 70 * 256).sin().reshape(70, 256).requires_grad_()
        y = torch.compile(LAYER, backend="sparsefx", options={"config": config})(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *LAYER.parameters()))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


# --- in time


def layer(rows, size, **changes):
    site = Site("fc", "forward", "mm", "mm", (rows, size, size), "float32", "cpu", 0, **changes)
    return [site, dataclasses.replace(site, role="grad_input")]


@pytest.mark.parametrize("size", [2048, 4096])
@pytest.mark.parametrize("m", [4, 8, 16])
def test_what_keeps_little_is_profitable(size, m):
    assert cost.unprofitable(layer(512, size), NM(1, m)) == ""
    assert cost.unprofitable(layer(512, size, mask_density=1 / m)[1:], Masked()) == ""


@pytest.mark.parametrize(
    ("sites", "pattern", "why"),
    [
        (layer(512, 2048), NM(1, 3), "masked dense product"),
        (layer(512, 2048), NM(1, 4, True), "its transposable mask is searched for"),
        (layer(63, 2048), NM(1, 8), "masked dense product"),
        (layer(64, 2048), NM(1, 4), "grad_input: .* masked, .* dense on cpu"),
        (layer(512, 255), NM(1, 8), "masked dense product"),
        (layer(512, 2048), Masked(), "masked dense product"),
    ],
)
def test_the_rest_is_not(sites, pattern, why):
    assert re.search(f"^not profitable: .*{why}", cost.unprofitable(sites, pattern))


def test_a_library_serves_machines_with_the_same_instructions(monkeypatch):
    """A cache of compiled code may be shared: another processor builds another library."""
    asked = []

    def load(source):
        asked.append(source)
        return ctypes.CDLL(None)

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", load)
    here = compat.instructions()
    for processor in (here, here, "another"):
        monkeypatch.setattr(compat, "instructions", lambda name=processor: name)
        compat.build_cpp("int x;")
    assert asked == [f"// for {name}\nint x;" for name in (here, here, "another")]
    assert re.fullmatch("[0-9a-f]{16}", here)
