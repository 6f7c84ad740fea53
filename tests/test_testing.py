"""sparsefx.testing: what a user writes tests of passes with."""

import pytest
import torch
from torch import nn

from sparsefx.config import NM, Sampled
from sparsefx.errors import PassError
from sparsefx.passes import canonicalize, find_sites, rewrite_nm, rewrite_sampled
from sparsefx.rewriting import PassResult, finish
from sparsefx.testing import capture, captures, format_graph, plans, run_pass, traced


def test_the_worked_example():
    x, w = torch.randn(3, 8), torch.randn(8, 5)
    gm = traced(torch.mm, x, w, plan=NM(2, 4))
    result = run_pass(rewrite_nm, gm)
    assert result.modified
    assert result.skipped == {}
    assert "nm_mm(%0, %1, None, 2, 4, 0, False) : float32[3, 5]" in result.text
    assert "-%2 = mm(%0, %1) : float32[3, 5]" in result.diff
    assert gm(x, w).shape == (3, 5)

    joint = capture(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), x)
    run_pass(canonicalize, joint)
    run_pass(find_sites, joint)
    assert [(p.site.layer, p.site.role) for p in plans(joint)] == [
        ("0", "forward"),
        ("0", "grad_weight"),
    ]


def test_traced_plans_every_product():
    gm = traced(
        lambda a, b: (a @ b, a.relu() @ b), torch.randn(3, 8), torch.randn(8, 5), plan=Sampled(0.5)
    )
    assert len(plans(gm)) == 2
    assert run_pass(rewrite_sampled, gm).text.count("sampled_mm(") == 2
    assert plans(traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))) == []


def test_a_pass_must_say_what_it_did():
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))
    with pytest.raises(TypeError, match="returned None instead of a PassResult"):
        run_pass(lambda gm: None, gm)


def test_a_pass_that_breaks_the_graph_is_caught():
    def forgetful(gm):
        (mm,) = (n for n in gm.graph.nodes if n.op == "call_function")
        with gm.graph.inserting_after(mm):
            new = gm.graph.call_function(torch.ops.aten.neg.default, (mm,))
        mm.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        finish(gm)
        return PassResult(gm, True)

    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))
    with pytest.raises(PassError, match=r"^after forgetful: .* has no fake value"):
        run_pass(forgetful, gm)


def test_capture_wants_one_graph():
    class Broken(nn.Module):
        def forward(self, x):
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"2 graphs were captured instead of 1; use captures\(\)"):
        capture(Broken(), x)
    assert len(captures(Broken(), x)) == 2


def test_capture_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    capture(model, torch.ones(3, 8))
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_capture_with_symbolic_sizes():
    model, x = nn.Linear(8, 6), torch.randn(3, 8)
    assert "float32[3, 8]" in format_graph(capture(model, x))
    assert "float32[3, 8]" not in format_graph(capture(model, x, dynamic=True))


def test_capture_without_a_backward():
    with torch.no_grad():
        gm = capture(nn.Linear(8, 6), torch.randn(3, 8))
    assert "mm" in format_graph(gm)
    assert format_graph(gm).count("input(") == 3
