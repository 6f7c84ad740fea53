"""select_sites: a layer's products are decided together, the graph stays as it is."""

from functools import partial

import pytest
import torch
from torch import nn

from sparsefx.config import NM, Rule, Sampled, SparseConfig
from sparsefx.passes import canonicalize, find_sites, select_sites
from sparsefx.testing import plans, run_pass

MODEL = [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4)]
RULES = [Rule("0", NM(2, 4)), Rule("2", NM(1, 5)), Rule("4", Sampled(0.5))]


def found_in(joint):
    gm = joint(nn.Sequential(*MODEL), torch.randn(3, 8)).gm
    run_pass(canonicalize, gm)
    run_pass(find_sites, gm)
    return gm


def decided(gm):
    return {(p.site.layer, p.site.role): p.decision for p in plans(gm)}


def test_decisions(joint):
    gm = found_in(joint)
    select = partial(select_sites, config=SparseConfig(rules=RULES))
    first = run_pass(select, gm)
    assert first.modified
    assert first.diff == ""
    again = run_pass(select, gm)
    assert not again.modified
    assert again.skipped == first.skipped
    table = {key: (str(decision.pattern), decision.reason) for key, decision in decided(gm).items()}
    dense = "the derivative of a dense forward"
    output = "feeds the model's output (keep_output_dense=True)"
    assert table == {
        ("0", "forward"): ("2:4", ""),
        ("0", "grad_weight"): (
            "dense",
            "straight-through: reaches every weight (weight_grad='dense')",
        ),
        ("2", "forward"): ("dense", "K=12 is not a multiple of m=5"),
        ("2", "grad_input"): ("dense", dense),
        ("2", "grad_weight"): ("dense", dense),
        ("4", "forward"): ("dense", output),
        ("4", "grad_input"): ("dense", output),
        ("4", "grad_weight"): ("dense", output),
    }
    assert set(first.skipped.values()) == {reason for _, reason in table.values() if reason}


def test_another_config_decides_anew(joint):
    gm = found_in(joint)
    run_pass(partial(select_sites, config=SparseConfig(rules=RULES)), gm)
    config = SparseConfig(rules=[Rule("*", Sampled(0.5))], keep_output_dense=False)
    assert run_pass(partial(select_sites, config=config), gm).modified
    assert {str(decision.pattern) for decision in decided(gm).values()} == {"sampled 0.5"}


def test_layers_that_failed(joint):
    gm = found_in(joint)
    config = SparseConfig(rules=[Rule("*", Sampled(0.5))], keep_output_dense=False)
    run_pass(partial(select_sites, config=config, failed={0: "it failed before"}), gm)
    reasons = {key: decision.reason for key, decision in decided(gm).items()}
    assert reasons.pop(("0", "forward")) == reasons.pop(("0", "grad_weight")) == "it failed before"
    assert set(reasons.values()) == {""}


def test_what_is_not_profitable(joint):
    gm = found_in(joint)
    config = SparseConfig(rules=[Rule("*", Sampled(0.5))], keep_output_dense=False)
    no = partial(select_sites, config=config, unprofitable=lambda sites, _: f"no: {sites[0].layer}")
    run_pass(no, gm)
    reasons = {layer: d.reason for (layer, role), d in decided(gm).items() if role == "forward"}
    assert reasons == {"0": "no: 0", "2": "no: 2", "4": "no: 4"}


# Dynamo makes an instance of the function that it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_backward_product_of_nothing(joint):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad @ x.t() @ x

    class Model(nn.Module):
        def forward(self, x):
            return Twice.apply(x)

    gm = joint(Model(), torch.randn(3, 3, requires_grad=True)).gm
    run_pass(canonicalize, gm)
    run_pass(find_sites, gm)
    found = run_pass(partial(select_sites, config=SparseConfig()), gm)
    assert {p.site.role for p in plans(gm)} == {"other"}
    assert set(found.skipped.values()) == {
        "a backward product that belongs to no forward product of this graph"
    }
