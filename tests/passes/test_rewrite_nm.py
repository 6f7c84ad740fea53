"""rewrite_nm: the graph it makes, the values it computes, the reasons it gives."""

from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsefx import masks, ops
from sparsefx.config import NM, Dense, Rule, Sampled, SparseConfig
from sparsefx.passes import canonicalize, find_sites, inline_references, rewrite_nm, select_sites
from sparsefx.rewriting import plan_of
from sparsefx.testing import capture, run_pass, traced

PATTERNS = [NM(2, 4), NM(1, 2), NM(2, 4, transposable=True), NM(3, 4, weight_grad="masked")]
PATTERNS += [NM(2, 4, decay=0.3), NM(2, 4, True, "masked", 0.3)]


class LeftWeight(nn.Module):
    """The weight is the left operand: w @ x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))

    def forward(self, x):
        return self.weight @ x.mT


class Twice(nn.Module):
    """One weight, used by two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x).tanh())


def mask_of(w, nm, dim=1):
    if nm.transposable:
        return masks.transposable_mask(w, nm.n, nm.m)
    return masks.nm_mask(w, nm.n, nm.m, dim)


def reference(model, x, tangent, nm, weights, dim=1):
    """Value and gradients by eager autograd: masked weights, straight through to the dense ones."""
    kept = {name: mask_of(w.detach(), nm, dim) for name, w in weights.items()}
    plain = {name: w.detach() for name, w in weights.items()}
    parameters = dict(model.named_parameters())
    through = {
        name: torch.where(kept[name], w, w - w.detach()) if name in weights else w
        for name, w in parameters.items()
    }
    y = torch.func.functional_call(model, through, (x,))
    gradients = dict(
        zip(parameters, torch.autograd.grad(y, parameters.values(), tangent), strict=True)
    )
    for name in weights:
        if nm.weight_grad == "masked":
            gradients[name] = gradients[name] * kept[name]
        gradients[name] = gradients[name] + nm.decay * ~kept[name] * plain[name]
    if x.requires_grad:
        y = torch.func.functional_call(model, through, (x,))
        (gradients["x"],) = torch.autograd.grad(y, x, tangent)
    return y.detach(), gradients


def assert_equal_to(found, expected, **tolerance):
    (y, gradients), (y_expected, expected_gradients) = found, expected
    torch.testing.assert_close(y, y_expected, **tolerance)
    by_input = {name: g for name, g in gradients.items() if name not in expected_gradients}
    for name, gradient in expected_gradients.items():
        one = gradients[name] if name != "x" else next(iter(by_input.values()))
        torch.testing.assert_close(one, gradient, **tolerance)


def weights_of(model):
    return {name: w for name, w in model.named_parameters() if w.dim() > 1}


# --- what it writes


def test_graph():
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5), plan=NM(2, 4))
    assert_text(
        run_pass(rewrite_nm, gm).text,
        """\
%0 = input() : float32[3, 8]
%1 = input() : float32[8, 5]
%2 = nm_mm(%0, %1, None, 2, 4, 0, False) : float32[3, 5]
return %2""",
    )


def test_graph_with_bias_and_a_stored_transpose():
    gm = traced(F.linear, torch.randn(3, 8), torch.randn(5, 8), torch.randn(5), plan=NM(1, 2))
    assert_text(
        run_pass(rewrite_nm, gm).text,
        """\
%0 = input() : float32[3, 8]
%1 = input() : float32[5, 8]
%2 = input() : float32[5]
%3 = permute(%1, [1, 0]) : float32[8, 5]
%4 = nm_mm(%0, %3, %2, 1, 2, 0, False) : float32[3, 5]
return %4""",
    )


def test_graph_of_a_transposable_mask():
    plan = NM(2, 4, transposable=True)
    gm = traced(F.linear, torch.randn(3, 8), torch.randn(4, 8), torch.randn(4), plan=plan)
    assert_text(
        run_pass(rewrite_nm, gm).text,
        """\
%0 = input() : float32[3, 8]
%1 = input() : float32[4, 8]
%2 = input() : float32[4]
%3 = permute(%1, [1, 0]) : float32[8, 4]
%4 = nm_mask(%1, 2, 4, 1, True) : bool[4, 8]
%5 = permute(%4, [1, 0]) : bool[8, 4]
%6 = masked_mm(%0, %3, %5, %2) : float32[3, 4]
return %6""",
    )


def test_graph_of_a_derived_grad_input():
    gm = traced(
        torch.mm,
        torch.randn(3, 4),
        torch.randn(4, 8),
        plan=NM(2, 4),
        role="grad_input",
        derived=True,
    )
    assert_text(
        run_pass(rewrite_nm, gm).text,
        """\
%0 = input() : float32[3, 4]
%1 = input() : float32[4, 8]
%2 = nm_mm(%0, %1, None, 2, 4, 1, False) : float32[3, 8]
return %2""",
    )


def test_graph_of_a_convolution():
    gm = traced(F.conv1d, torch.randn(2, 8, 6), torch.randn(4, 8, 3), None, 1, 1, plan=NM(2, 4))
    assert_text(
        run_pass(rewrite_nm, gm).text,
        """\
%0 = input() : float32[2, 8, 6]
%1 = input() : float32[4, 8, 3]
%2 = nm_conv(%0, %1, None, [1], [1], [1], 1, 2, 4, 1, False) : float32[2, 4, 6]
return %2""",
    )


def test_graph_of_weight_gradient_with_decay(joint, every):
    found = joint(nn.Linear(4, 8, bias=False), torch.randn(3, 4))
    found.find(every(NM(2, 4, weight_grad="masked", decay=0.5)))
    assert_text(
        found.run(rewrite_nm).text,
        """\
%0 = input(weight) : float32[8, 4]
%1 = input(l_args_0_) : float32[3, 4]
%2 = input() : float32[3, 8]
%3 = permute(%0, [1, 0]) : float32[4, 8]
%4 = nm_mm(%1, %3, None, 2, 4, 0, False) : float32[3, 8]
%5 = permute(%2, [1, 0]) : float32[8, 3]
%6 = mm(%5, %1) : float32[8, 4]
%7 = permute(%6, [1, 0]) : float32[4, 8]
%8 = permute(%7, [1, 0]) : float32[8, 4]
%9 = nm_mask(%0, 2, 4, 1, False) : bool[8, 4]
%10 = full([], 0.0, dtype=float32, device=cpu) : float32[]
%11 = where(%9, %8, %10) : float32[8, 4]
%12 = where(%9, %10, %0) : float32[8, 4]
%13 = mul(%12, 0.5) : float32[8, 4]
%14 = add(%11, %13) : float32[8, 4]
return [%4, %14, None]""",
    )


class Experts(nn.Module):
    """A weight matrix for each element of a batch, stored [B, in, out] or [B, out, in]."""

    def __init__(self, turned):
        super().__init__()
        self.turned = turned
        self.weight = nn.Parameter(torch.randn((3, 12, 8) if turned else (3, 8, 12)))

    def forward(self, x):
        return torch.bmm(x, self.weight.mT) if self.turned else x @ self.weight


def test_graph_of_a_batch(joint, every):
    found = joint(Experts(False), torch.randn(3, 2, 8, requires_grad=True))
    found.find(every(NM(2, 4, weight_grad="masked")))
    assert_text(
        found.run(rewrite_nm).text,
        """\
%0 = input(weight) : float32[3, 8, 12]
%1 = input(l_x_) : float32[3, 2, 8]
%2 = input() : float32[3, 2, 12]
%3 = expand(%1, [3, 2, 8]) : float32[3, 2, 8]
%4 = view(%3, [3, 2, 8]) : float32[3, 2, 8]
%5 = expand(%0, [3, 8, 12]) : float32[3, 8, 12]
%6 = view(%5, [3, 8, 12]) : float32[3, 8, 12]
%7 = nm_bmm(%4, %6, 2, 4, 1, False) : float32[3, 2, 12]
%8 = view(%7, [3, 2, 12]) : float32[3, 2, 12]
%9 = view(%2, [3, 2, 12]) : float32[3, 2, 12]
%10 = permute(%4, [0, 2, 1]) : float32[3, 8, 2]
%11 = bmm(%10, %9) : float32[3, 8, 12]
%12 = permute(%6, [0, 2, 1]) : float32[3, 12, 8]
%13 = nm_bmm(%9, %12, 2, 4, 2, False) : float32[3, 2, 8]
%14 = view(%11, [3, 8, 12]) : float32[3, 8, 12]
%15 = nm_mask(%6, 2, 4, 1, False) : bool[3, 8, 12]
%16 = full([], 0.0, dtype=float32, device=cpu) : float32[]
%17 = where(%15, %14, %16) : float32[3, 8, 12]
%18 = view(%13, [3, 2, 8]) : float32[3, 2, 8]
return [%8, %17, %18]""",
    )


# --- what it computes


@pytest.mark.parametrize(
    ("make", "shape", "dim"),
    [
        (lambda: nn.Linear(8, 12), (3, 8), 1),
        (lambda: nn.Linear(8, 12, bias=False), (3, 8), 1),
        (lambda: nn.Linear(8, 12), (2, 3, 8), 1),
        (lambda: Conv1D(12, 8), (3, 8), 0),
        (lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), (5, 8), 1),
        (lambda: nn.Conv1d(8, 4, 3, stride=2), (2, 8, 9), 1),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), (2, 8, 5, 4), 1),
        (lambda: nn.Conv2d(8, 4, 3, dilation=2, bias=False), (2, 8, 6, 7), 1),
        (lambda: nn.Conv3d(4, 4, 2, stride=(1, 2, 1)), (1, 4, 4, 4, 3), 1),
    ],
    ids=["linear", "bias=False", "3d", "Conv1D", "mlp", "conv1d", "groups", "dilation", "conv3d"],
)
def test_values(joint, every, make, shape, dim):
    model, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dense = joint(model, x)
    for nm in PATTERNS:
        found = dense.again().find(every(nm))
        assert found.run(rewrite_nm).modified
        expected = reference(model, x, found.tangents[0], nm, weights_of(model), dim)
        assert_equal_to(found.values(), expected)


def test_a_tied_weight_is_masked_at_each_use_and_decayed_once(joint, every):
    model, x = Twice().double(), torch.randn(3, 8, dtype=torch.float64)
    dense = joint(model, x)
    for nm in PATTERNS:
        found = dense.again().find(every(nm))
        found.run(rewrite_nm)
        expected = reference(model, x, found.tangents[0], nm, {"one.weight": model.one.weight})
        assert_equal_to(found.values(), expected)


def test_one_module_called_twice_is_decayed_once(joint, every):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.fc(x).tanh())

    model, x = Again().double(), torch.randn(3, 8, dtype=torch.float64)
    nm = NM(2, 4, decay=0.3)
    found = joint(model, x).find(every(nm))
    found.run(rewrite_nm)
    expected = reference(model, x, found.tangents[0], nm, {"fc.weight": model.fc.weight})
    assert_equal_to(found.values(), expected)


BATCHED = [NM(1, 4), NM(2, 4, weight_grad="masked", decay=0.3)]


@pytest.mark.parametrize("turned", [False, True])
def test_values_of_a_batch(joint, every, turned):
    model = Experts(turned).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    dense = joint(model, x)
    for nm in BATCHED:
        found = dense.again().find(every(nm))
        assert found.run(rewrite_nm).modified
        assert ops.nm_bmm in {n.target for n in found.gm.graph.nodes}
        sites = [plan_of(n).site for n in found.gm.graph.nodes if n.target is ops.nm_bmm]
        assert {site.weight_name for site in sites} == {"weight"}
        expected = reference(model, x, found.tangents[0], nm, weights_of(model), 1 + turned)
        assert_equal_to(found.values(), expected)
    found.run(inline_references)
    assert ops.nm_bmm not in {n.target for n in found.gm.graph.nodes}
    assert_equal_to(found.values(), expected)


def test_a_batched_grad_input_of_its_own_has_groups_along_the_outputs(joint, every):
    model, x = Experts(True).double(), torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    found = joint(model, x).find(every(Dense(), grad_input=NM(1, 4)))
    found.run(rewrite_nm)
    w = model.weight.detach()
    expected = torch.bmm(found.tangents[0], w * mask_of(w, NM(1, 4), 1))
    torch.testing.assert_close(grad_of_input(found, model), expected)


def test_a_batched_weight_used_twice_is_decayed_once_under_autocast(joint, every):
    class Cast(Experts):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = super().forward(x)
                return y + super().forward(2 * y[..., :8])

    model, x, nm = Cast(False), torch.randn(3, 5, 8), NM(2, 4, decay=0.3)
    plain = joint(model, x).find(every(NM(2, 4)))
    plain.run(rewrite_nm)
    found = joint(model, x).find(every(nm))
    found.run(rewrite_nm)
    added = found.values()[1]["weight"] - plain.values()[1]["weight"]
    w = model.weight.detach()
    kept = mask_of(w.bfloat16(), NM(2, 4), 1)
    assert added.dtype == torch.float32
    torch.testing.assert_close(added, 0.3 * torch.where(kept, 0.0, w), rtol=1e-4, atol=1e-4)


def test_a_batch_says_why_it_stays(joint, every):
    class Left(Experts):
        def forward(self, x):
            return self.weight.mT @ x.mT

    x = torch.randn(3, 2, 8)
    for model, nm, reason in [
        (Experts(False), NM(2, 4, True), "a batch of weights has no transposable masks, only row"),
        (Experts(False), NM(1, 3), "K=8 is not a multiple of m=3"),
        (Left(False), NM(2, 4), "the weight is the left operand of the product"),
    ]:
        found = joint(model, x).find(every(nm))
        assert not found.run(rewrite_nm).modified
        plan = next(p for p in map(plan_of, found.gm.graph.nodes) if p is not None)
        assert plan.decision.reason.startswith(reason)


@pytest.mark.parametrize("nm", [NM(2, 4, decay=0.3), NM(2, 4, True, "masked", 0.3)], ids=repr)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_under_autocast_the_decay_is_that_of_the_stored_weight(joint, every, kind, nm):
    layer, shape = (
        (nn.Linear(8, 12), (3, 8)) if kind == "linear" else (nn.Conv1d(8, 4, 1), (2, 8, 3))
    )

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)

    model, x = Cast(), torch.randn(shape)
    dense = joint(model, x)
    before = dense.values()[1]["layer.weight"]
    found = joint(model, x).find(every(nm))
    found.run(rewrite_nm)
    after = found.values()[1]["layer.weight"]
    w = layer.weight.detach()
    kept = mask_of(w.bfloat16(), nm)  # of what the product saw
    expected = before * kept if nm.weight_grad == "masked" else before
    assert after.dtype == torch.float32
    assert torch.equal(after, expected + nm.decay * torch.where(kept, 0.0, w))


def test_both_uses_of_a_tied_weight_under_autocast_decay_it_once(joint, every):
    class Cast(Twice):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model, x = Cast(), torch.randn(3, 8)
    before = joint(model, x).find(every(NM(2, 4)))
    before.run(rewrite_nm)
    found = joint(model, x).find(every(NM(2, 4, decay=0.3)))
    found.run(rewrite_nm)
    added = found.values()[1]["one.weight"] - before.values()[1]["one.weight"]
    w = model.one.weight.detach()
    kept = mask_of(w.bfloat16(), NM(2, 4))
    torch.testing.assert_close(added, 0.3 * torch.where(kept, 0.0, w), rtol=2e-2, atol=2e-2)


def grad_of_input(joint, model):
    """The gradient of the one input that asks for it."""
    _, gradients = joint.values()
    (found,) = (g for name, g in gradients.items() if name not in dict(model.named_parameters()))
    return found


@pytest.mark.parametrize(
    ("make", "shape", "dim"),
    [
        (lambda: nn.Linear(8, 12), (3, 8), 0),
        (lambda: Conv1D(12, 8), (3, 8), 1),
        (lambda: nn.Conv2d(8, 8, 3, groups=2), (2, 8, 5, 4), 0),
    ],
    ids=["linear", "Conv1D", "groups"],
)
def test_a_grad_input_of_its_own_has_groups_along_the_outputs(joint, every, make, shape, dim):
    model, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dense, w = joint(model, x), model.weight.detach()
    for own in (NM(1, 4), NM(1, 4, transposable=True)):
        for forward in (Dense(), NM(2, 4)):
            found = dense.again().find(every(forward, grad_input=own))
            found.run(rewrite_nm)
            kept = {"weight": torch.where(mask_of(w, own, dim), w, 0.0)}
            y = torch.func.functional_call(model, kept, (x,))
            (expected,) = torch.autograd.grad(y, x, found.tangents[0])
            torch.testing.assert_close(grad_of_input(found, model), expected)


def test_a_dense_grad_input_is_that_of_the_whole_weight(joint, every):
    model, x = nn.Linear(8, 12).double(), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    found = joint(model, x).find(every(NM(2, 4), grad_input=Dense()))
    found.run(rewrite_nm)
    expected = found.tangents[0] @ model.weight.detach()
    torch.testing.assert_close(grad_of_input(found, model), expected)


def test_decay_acts_on_a_sampled_weight_gradient_too(joint, every):
    model, x = nn.Linear(8, 12), torch.randn(3, 8)
    found = joint(model, x).find(
        every(NM(2, 4, decay=0.3), grad_weight=Sampled(1.0, inference=True))
    )
    before = found.values()[1]["weight"]
    found.run(rewrite_nm)
    w = model.weight.detach()
    expected = before + 0.3 * torch.where(mask_of(w, NM(2, 4)), 0.0, w)
    torch.testing.assert_close(found.values()[1]["weight"], expected)


def test_a_frozen_weight_has_no_gradient_to_wrap(joint, every):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight.requires_grad_(False)
    x = torch.randn(3, 8)
    nm = NM(2, 4, decay=0.3)
    found = joint(model, x).find(every(nm))
    found.run(rewrite_nm)
    _, gradients = found.values()
    assert "0.weight" not in gradients
    assert set(gradients) == {"0.bias", "1.weight", "1.bias"}


def test_a_symbolic_batch(joint, every):
    model, x = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), torch.randn(5, 8)
    nm = NM(2, 4, decay=0.3)
    found = joint(model, x, dynamic=True).find(every(nm))
    assert "int(s" in found.run(rewrite_nm).text
    expected = reference(model, x, found.tangents[0], nm, weights_of(model))
    assert_equal_to(found.values(), expected)


def test_layers_of_different_patterns(joint):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    rules = [Rule("0", NM(1, 4)), Rule("2", NM(2, 4, transposable=True))]
    x = torch.randn(3, 8)
    found = joint(model, x).find(SparseConfig(rules=rules, keep_output_dense=False))
    found.run(rewrite_nm)
    first, last = model[0].weight.detach(), model[2].weight.detach()
    weights = {
        "0.weight": first * mask_of(first, NM(1, 4)),
        "2.weight": last * mask_of(last, NM(2, 4, transposable=True)),
    }
    y = torch.func.functional_call(model, weights, (x,))
    torch.testing.assert_close(found.values()[0], y.detach())


# --- what it leaves alone


@pytest.mark.parametrize(
    ("function", "shapes", "plan", "reason"),
    [
        (torch.mm, [(3, 6), (6, 5)], NM(2, 4), "K=6 is not a multiple of m=4"),
        (
            torch.mm, [(3, 8), (8, 5)], NM(2, 4, transposable=True),
            "N=5 is not a multiple of m=4 (transposable)",
        ),
        (
            F.conv1d, [(2, 6, 5), (4, 6, 3)], NM(2, 4),
            "channels per group=6 is not a multiple of m=4",
        ),
        (
            F.conv1d, [(2, 4, 5), (6, 4, 3)], NM(2, 4, transposable=True),
            "output channels per group=6 is not a multiple of m=4 (transposable)",
        ),
    ],
)  # fmt: skip
def test_reasons(function, shapes, plan, reason):
    gm = traced(function, *map(torch.randn, shapes), plan=plan)
    found = run_pass(rewrite_nm, gm)
    assert list(found.skipped.values()) == [reason]
    assert not found.modified
    assert found.diff == ""


def test_what_is_not_planned_stays(joint, every):
    found = joint(nn.Linear(8, 8), torch.randn(3, 8)).find(every(Sampled(0.5)))
    assert not found.run(rewrite_nm).modified
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))
    assert not run_pass(rewrite_nm, gm).modified


def test_a_weight_on_the_left_stays_dense(joint, every):
    found = joint(LeftWeight(), torch.randn(3, 8)).find(every(NM(2, 4)))
    assert not found.run(rewrite_nm).modified


def test_provenance_and_plans_travel(joint, every):
    gm = joint(nn.Linear(8, 8), torch.randn(3, 8)).find(every(NM(2, 4))).gm
    rewrite_nm(gm)
    (node,) = (n for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "sparsefx")
    assert plan_of(node).site.role == "forward"
    assert plan_of(node).decision.pattern == NM(2, 4)
    assert node.meta["partitioner_tag"] == "is_forward"
    assert node.meta["sparsefx_rule"] == "_mm"
    assert "seq_nr" in node.meta


def test_an_inference_graph():
    model, x = nn.Linear(8, 8), torch.randn(3, 8)
    with torch.no_grad():
        gm = capture(model, x)
    config = SparseConfig(rules=[Rule("*", NM(2, 4))], keep_output_dense=False)
    for function in (canonicalize, find_sites, partial(select_sites, config=config), rewrite_nm):
        found = run_pass(function, gm)
    assert found.modified
    w = model.weight.detach()
    (y,) = gm(w, model.bias.detach(), x)
    torch.testing.assert_close(y, F.linear(x, w * mask_of(w, NM(2, 4)), model.bias.detach()))
