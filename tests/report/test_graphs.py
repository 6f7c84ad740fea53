"""The graphs of a report: they run and give what the compiled model gives; stages; diffs."""

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn

import sparsefx as sfx
from sparsefx import NM, Rule, Sampled, SparseConfig
from sparsefx.ops import is_sparse_op

EAGER = {"codegen": "aot_eager", "keep_output_dense": False}
PASSES = [
    "captured", "canonicalize", "find_sites", "recognize_masks", "select_sites", "rewrite_nm",
    "rewrite_masked", "rewrite_sampled", "pack_frozen", "share_masks", "lower_vendor", "cleanup",
    "sum_rows", "fuse_epilogues", "inline_references",
]  # fmt: skip


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def sparse_ops(gm) -> list[str]:
    return [n.target.name() for n in gm.graph.nodes if is_sparse_op(n.target)]


def inputs(gm, model, x) -> list:
    """What the placeholders of a forward graph stand for."""
    named, out = dict(model.named_parameters()), []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            known = node.meta["sparsefx_input"]
            symbolic = not isinstance(node.meta["val"], torch.Tensor)
            out.append(x.shape[0] if symbolic else named.get(known.name, x))
    return out


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("preset", ["2:4", "all-three", "sampled-0.3"])
def test_forward_and_backward_run_and_equal_the_compiled_model(preset, dynamic):
    model, x = small(), torch.randn(6, 8)
    cfg = SparseConfig(rules=sfx.preset(preset).rules, **EAGER)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    report = sfx.explain(model, config=cfg)(x)
    (forward,), (backward,) = report.forward, report.backward
    assert len(sparse_ops(forward)) >= 2
    assert len(sparse_ops(backward)) >= (1 if preset == "2:4" else 3)

    torch.manual_seed(1)  # both draw the same
    y, *saved = forward(*inputs(forward, model, x))
    names = [n.meta.get("sparsefx_input") for n in forward.graph.nodes if n.op == "placeholder"]
    by_name = dict(zip([n.name for n in forward.graph.find_nodes(op="output")[0].args[0]],
                       [y, *saved], strict=True))  # fmt: skip
    g = torch.randn_like(y)
    wanted = [n.name for n in backward.graph.nodes if n.op == "placeholder"]
    grads = backward(*(by_name.get(name, g) for name in wanted))
    told = {n.name: grad for n, grad in zip(names, grads, strict=True) if n.kind == "parameter"}

    compiled = torch.compile(model, backend="sparsefx", options={"config": cfg})
    torch.manual_seed(1)
    out = compiled(x)
    out.backward(g)
    torch.testing.assert_close(y, out)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(told[name], parameter.grad)


def test_an_inference_graph_has_no_backward():
    model, x = small(), torch.randn(6, 8)
    cfg = SparseConfig(rules=[Rule("*", forward=NM(2, 4))], **EAGER)
    with torch.no_grad():
        report = sfx.explain(model, config=cfg)(x)
        assert report.backward == (None,)
        (forward,) = report.forward
        assert sparse_ops(forward) == ["sparsefx::nm_mm"] * 2
        compiled = torch.compile(model, backend="sparsefx", options={"config": cfg})
        torch.testing.assert_close(forward(*inputs(forward, model, x))[0], compiled(x))


def test_stages_and_texts():
    report = sfx.explain(small(), config="2:4")(torch.randn(6, 8))
    (stages,) = report.stages
    assert [name for name, _ in stages] == PASSES
    assert (stages[0][1], stages[-1][1]) == (*report.before, *report.after)
    assert "nm_mm" not in report.before[0]
    assert "nm_mm(" in dict(stages)["rewrite_nm"]


def test_diff():
    with torch.no_grad():
        report = sfx.explain(small(), config="2:4")(torch.randn(6, 8))
    assert_text(report.diff("rewrite_nm"), """\
--- select_sites
+++ rewrite_nm
@@ -5 +5 @@
 %4 = input(2.bias) : float32[8]
 %5 = permute(%0, [1, 0]) : float32[8, 16]
-%6 = addmm(%1, %2, %5) : float32[6, 16]
+%6 = nm_mm(%2, %5, %1, 2, 4, 0, False) : float32[6, 16]
 %7 = relu(%6) : float32[6, 16]
 %8 = permute(%3, [1, 0]) : float32[16, 8]""")  # fmt: skip
    assert report.diff(PASSES.index("rewrite_nm")) == report.diff("rewrite_nm")
    assert report.diff("find_sites") == ""


def test_diff_says_which_passes_and_graphs_there_are():
    report = sfx.explain(small(), config="2:4")(torch.randn(6, 8))
    with pytest.raises(ValueError, match=r"'rewrite' is not a pass of graph 0: canonicalize, find"):
        report.diff("rewrite")
    with pytest.raises(ValueError, match="0 is not a pass"):
        report.diff(0)
    with pytest.raises(ValueError, match="graph=1: this report has 1 graph"):
        report.diff("rewrite_nm", graph=1)


def look_only(gm):
    """A user's pass that changes nothing."""
    return sfx.rewriting.PassResult(gm)


def test_a_users_own_pass_is_a_stage():
    cfg = SparseConfig(rules=[Rule("*", forward=Sampled(0.5))], passes=[look_only])
    report = sfx.explain(small(), config=cfg)(torch.randn(6, 8))
    assert [n for n, _ in report.stages[0]] == [*PASSES[:11], "look_only", *PASSES[11:]]
    assert report.diff("look_only") == ""


def test_a_pass_that_fails_as_a_whole_leaves_the_captured_graph(monkeypatch):
    def fails(gm, **_):
        raise RuntimeError("no masks today")

    monkeypatch.setattr("sparsefx.passes.share_masks", fails)
    with pytest.warns(sfx.SparsefxWarning, match="no masks today"):
        report = sfx.explain(small(), config="2:4")(torch.randn(6, 8))
    (reason,) = {r.reason for r in report.sites}
    assert reason.startswith("share_masks failed: RuntimeError: no masks today")
    assert [[name for name, _ in stages] for stages in report.stages] == [["captured"]]
    assert report.totals.saved_bytes == report.totals.saved_bytes_sparse == 6 * 16 * 4
    assert sparse_ops(report.forward[0]) == []
