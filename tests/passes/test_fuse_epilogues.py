"""fuse_epilogues: activations that a kernel makes with its product, and those that stay."""

import sys

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn import functional as F

from sparsefx import ops, pipeline
from sparsefx.config import NM, Rule, SparseConfig
from sparsefx.errors import SparsefxWarning
from sparsefx.masks import nm_mask
from sparsefx.ops.activated import ACTIVATIONS
from sparsefx.passes import fuse_epilogues, rewrite_nm
from sparsefx.rewriting import copy_graph_module, plan_of
from sparsefx.testing import capture, run_pass, traced

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def kernels(monkeypatch):
    """A device that has both of our kernels."""
    served = (ops.nm_mm, ops.nm_mm_act)
    monkeypatch.setattr(ops, "has_kernel", lambda op, device: op in served)


def product(act, dtype=torch.float32):
    """A layer of three axes with an activation behind it, its N:M product written already."""
    args = (torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5))
    args = [arg.to(dtype) for arg in args]
    gm = traced(lambda x, w, b: act(F.linear(x, w, b)), *args, plan=NM(2, 4))
    run_pass(rewrite_nm, gm)
    return gm, args


def targets(gm):
    return [n.target for n in gm.graph.nodes if ops.is_sparse_op(n.target)]


def test_graph(kernels):
    gm, _ = product(F.gelu)
    assert_text(
        run_pass(fuse_epilogues, gm).text,
        """\
%0 = input() : float32[2, 3, 8]
%1 = input() : float32[5, 8]
%2 = input() : float32[5]
%3 = view(%0, [6, 8]) : float32[6, 8]
%4 = permute(%1, [1, 0]) : float32[8, 5]
%5 = nm_mm_act(%3, %4, %2, 2, 4, 0, False, gelu) : float32[6, 5]
%6 = view(%5, [2, 3, 5]) : float32[2, 3, 5]
return %6""",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_found_in_every_dtype(kernels, name, dtype):
    gm, args = product(ACTIVATIONS[name], dtype)
    before = gm(*args)
    (plan,) = (plan_of(n) for n in gm.graph.nodes if n.target is ops.nm_mm)
    assert run_pass(fuse_epilogues, gm).modified
    (node,) = (n for n in gm.graph.nodes if n.target is ops.nm_mm_act)
    assert node.args[-1] == name
    assert plan_of(node) is plan
    assert {n.target for n in gm.graph.nodes if n.op == "call_function"} == {
        torch.ops.aten.view.default, torch.ops.aten.permute.default, ops.nm_mm_act
    }  # fmt: skip
    tolerance = 8 * torch.finfo(dtype).eps  # Inductor's operators round at other places
    torch.testing.assert_close(gm(*args), before, rtol=tolerance, atol=tolerance)
    again = run_pass(fuse_epilogues, gm)
    assert (again.modified, again.diff) == (False, "")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda y: F.relu(y) + y, "relu: what goes in is read elsewhere"),
        (lambda y: F.silu(y) * torch.sigmoid(y.relu()), ""),
        (
            lambda y: F.gelu(y) + torch.erf(y * 0.7071067811865476),
            "gelu: what goes in is read else",
        ),
        (lambda y: F.silu(y) * 2, "silu: only arithmetic reads it, which Inductor fuses it with"),
        (torch.tanh, ""),
        (lambda y: F.relu(y.transpose(1, 2)), ""),
    ],
)
def test_what_stays(kernels, act, reason):
    gm, _ = product(act)
    found = run_pass(fuse_epilogues, gm)
    assert not found.modified
    assert targets(gm) == [ops.nm_mm]
    assert all(told.startswith(reason) for told in found.skipped.values())
    assert len(found.skipped) >= bool(reason)


def test_what_no_kernel_takes(kernels):
    gm, _ = product(F.relu, torch.float64)
    reason = "relu: no kernel takes torch.float64"
    assert list(run_pass(fuse_epilogues, gm).skipped.values()) == [reason]


def test_a_device_without_the_kernel():
    gm, _ = product(F.relu)
    found = run_pass(fuse_epilogues, gm)
    assert (found.modified, found.skipped) == (False, {})


def run(gm, monkeypatch, **rule):
    """The whole pipeline, the references not inlined: what is left of the sparse ops."""
    monkeypatch.setattr(pipeline.passes, "inline_references", pipeline.passes.canonicalize)
    rules = [Rule("*", forward=NM(2, 4), **rule)]
    work = copy_graph_module(gm)
    outcome = pipeline.run(work, SparseConfig(rules=rules, keep_output_dense=False))
    return work, outcome


def test_training_fuses_a_relu_and_inference_a_gelu(kernels, joint, monkeypatch):
    """A relu's derivative reads its result; a gelu's reads what went in."""
    x = torch.randn(6, 8, requires_grad=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
    found = joint(model, x)
    other = found.again()
    work, outcome = run(found.gm, monkeypatch)
    assert outcome.ops[(0, "forward")] == "nm_mm"  # a report names the product
    acts = [n.args[-1] for n in work.graph.nodes if n.target is ops.nm_mm_act]
    assert acts == ["relu"]
    monkeypatch.setattr(pipeline.passes, "fuse_epilogues", pipeline.passes.canonicalize)
    other.gm, _ = run(other.gm, monkeypatch)
    found.gm = work
    torch.testing.assert_close(found.values(), other.values())


def test_inference(kernels, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4), nn.SiLU())
    with torch.no_grad():
        gm = capture(model, torch.randn(6, 8))
    work, _ = run(gm, monkeypatch)
    assert [n.args[-1] for n in work.graph.nodes if n.target is ops.nm_mm_act] == ["gelu", "silu"]
    work, _ = run(gm, monkeypatch, lowering="reference")
    assert targets(work) == [ops.nm_mm] * 2


def test_a_failure_leaves_its_layer_dense(kernels, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
    with torch.no_grad():
        gm = capture(model, torch.randn(6, 8))
    module = sys.modules["sparsefx.passes.fuse_epilogues"]
    emit = module.emit

    def fails(node, op, *args):
        assert args[-1] != "gelu", "injected"
        return emit(node, op, *args)

    monkeypatch.setattr(module, "emit", fails)
    with pytest.warns(SparsefxWarning, match="fuse_epilogues failed at node .* of layer '2'"):
        work, _ = run(gm, monkeypatch)
    assert targets(work) == [ops.nm_mm_act]
    x = torch.randn(6, 8)
    values = [dict(model.named_parameters()).get(n.meta["sparsefx_input"].name, x).detach()
              for n in work.graph.nodes if n.op == "placeholder"]  # fmt: skip
    (found,) = work(*values)
    w = model[0].weight.detach()
    hidden = F.relu(F.linear(x, w * nm_mask(w, 2, 4), model[0].bias))
    torch.testing.assert_close(found, F.gelu(model[2](hidden)).detach())
