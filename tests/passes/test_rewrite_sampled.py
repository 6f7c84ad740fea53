"""rewrite_sampled: the graph it makes, the values it computes, the reasons it gives."""

import re

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy
from transformers.pytorch_utils import Conv1D

from sparsefx.compat import partition
from sparsefx.config import NM, Dense, Sampled
from sparsefx.passes import cleanup, rewrite_sampled
from sparsefx.testing import run_pass, traced

HALF = Sampled(0.5)


class Product(nn.Module):
    """Both operands are activations: a @ b, matrices or batches of them."""

    def forward(self, a, b):
        return a @ b


class LeftWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))

    def forward(self, x):
        return self.weight @ x.mT


# --- an independent reference: autograd functions over masks of pairs


def largest(scores, k):
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:k])


def pairs(left, right, pattern, weight_left=False):
    """S of left [M, K] @ right [K, N], by norms."""
    a, b = left.double().norm(dim=0), right.double().norm(dim=1)
    scores = a * b if pattern.scores == "product" else a if weight_left else b
    return largest(scores, pattern.k(left.shape[1]))


def only(x, indices, axis):
    taken = torch.zeros(x.shape[axis], dtype=x.dtype)
    taken[indices] = 1
    return x * taken.view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def matrix_reference(x, w, grad, forward, grad_input, grad_weight, weight_left=False):
    """Y, dx, dw of x @ w; a pattern of None is the derivative of what the forward computed."""
    s = pairs(x, w, forward, weight_left) if isinstance(forward, Sampled) else range(x.shape[1])
    y = only(x, s, 1) @ w
    gx, gw = grad @ w.t(), x.t() @ grad
    if grad_input is None:
        gx = only(gx, s, 1)
    elif isinstance(grad_input, Sampled):
        gx = only(grad, pairs(grad, w.t(), grad_input), 1) @ w.t()
    if grad_weight is None:
        gw = only(gw, s, 0)
    elif isinstance(grad_weight, Sampled):
        gw = only(x.t(), pairs(x.t(), grad, grad_weight), 1) @ grad
    return y, gx, gw


RULES = {
    "forward": (HALF, None, None),
    "weight scores": (Sampled(0.5, scores="weight"), None, None),
    "black box": (HALF, Dense(), Dense()),
    "backward": (Dense(), Sampled(0.3), Sampled(0.5)),
    "grad_input by weight": (Dense(), Sampled(0.5, scores="weight"), None),
    "grad_weight by gradient": (Dense(), Dense(), Sampled(0.4, scores="weight")),
    "each its own": (HALF, Sampled(0.3), Sampled(0.7)),
    "at least": (Sampled(0.1, min_k=3), None, None),
}


def rewritten(dense, every, rule):
    forward, grad_input, grad_weight = rule
    config = every(forward, grad_input=grad_input, grad_weight=grad_weight)
    found = dense.again().find(config)
    assert found.run(rewrite_sampled).modified
    y, gradients = found.values()
    by_kind = {"weight": gradients.pop("weight", None), "bias": gradients.pop("bias", None)}
    return y, by_kind, list(gradients.values())


# --- what it writes


def test_graph():
    gm = traced(F.linear, torch.randn(3, 8), torch.randn(5, 8), torch.randn(5), plan=HALF)
    assert_text(
        run_pass(rewrite_sampled, gm).text,
        """\
%0 = input() : float32[3, 8]
%1 = input() : float32[5, 8]
%2 = input() : float32[5]
%3 = permute(%1, [1, 0]) : float32[8, 5]
%4 = topk_mm_indices(%0, %3, 4, product) : int64[4]
%5 = sampled_mm(%0, %3, %4, %2) : float32[3, 5]
return %5""",
    )


def test_graph_of_a_whole_layer(joint, every):
    found = joint(nn.Linear(8, 5), torch.randn(3, 8, requires_grad=True)).find(every(HALF))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(weight) : float32[5, 8]
%1 = input(bias) : float32[5]
%2 = input(l_args_0_) : float32[3, 8]
%3 = input() : float32[3, 5]
%4 = permute(%0, [1, 0]) : float32[8, 5]
%5 = topk_mm_indices(%2, %4, 4, product) : int64[4]
%6 = gather_columns(%2, %5) : float32[3, 4]
%7 = sampled_mm(%2, %4, %5, %1) : float32[3, 5]
%8 = sampled_mm_grad_input(%3, %4, %5) : float32[3, 8]
%9 = sampled_mm_grad_weight(%6, %3, %5, 8, True) : float32[5, 8]
%10 = permute(%9, [1, 0]) : float32[8, 5]
%11 = sum(%3, [0], True) : float32[1, 5]
%12 = view(%11, [5]) : float32[5]
%13 = permute(%10, [1, 0]) : float32[5, 8]
return [%7, %13, %12, %8]""",
    )


def test_graph_of_a_batched_product(joint, every):
    a, b = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 8, 5, requires_grad=True)
    found = joint(Product(), a, b).find(every(HALF))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(l_a_) : float32[2, 3, 8]
%1 = input(l_b_) : float32[2, 8, 5]
%2 = input() : float32[2, 3, 5]
%3 = expand(%0, [2, 3, 8]) : float32[2, 3, 8]
%4 = view(%3, [2, 3, 8]) : float32[2, 3, 8]
%5 = expand(%1, [2, 8, 5]) : float32[2, 8, 5]
%6 = view(%5, [2, 8, 5]) : float32[2, 8, 5]
%7 = topk_mm_indices(%4, %6, 4, product) : int64[2, 4]
%8 = gather_columns(%4, %7) : float32[2, 3, 4]
%9 = sampled_bmm(%4, %6, %7) : float32[2, 3, 5]
%10 = view(%9, [2, 3, 5]) : float32[2, 3, 5]
%11 = view(%2, [2, 3, 5]) : float32[2, 3, 5]
%12 = sampled_bmm_grad_weight(%8, %11, %7, 8) : float32[2, 8, 5]
%13 = sampled_bmm_grad_input(%11, %6, %7) : float32[2, 3, 8]
%14 = view(%12, [2, 8, 5]) : float32[2, 8, 5]
%15 = view(%13, [2, 3, 8]) : float32[2, 3, 8]
return [%10, %15, %14]""",
    )


def test_graph_of_a_convolution(joint, every):
    x = torch.randn(2, 8, 6, requires_grad=True)
    found = joint(nn.Conv1d(8, 4, 3, groups=2, bias=False), x).find(every(HALF))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(weight) : float32[4, 4, 3]
%1 = input(l_args_0_) : float32[2, 8, 6]
%2 = input() : float32[2, 4, 4]
%3 = topk_conv_indices(%1, %0, 2, in, 2, product) : int64[2, 2]
%4 = gather_channels(%1, %3) : float32[2, 4, 6]
%5 = sampled_conv(%1, %0, %3, None, [1], [0], [1], 2) : float32[2, 4, 4]
%6 = sampled_conv_grad_input(%2, %0, %3, [2, 8, 6], [1], [0], [1], 2) : float32[2, 8, 6]
%7 = sampled_conv_grad_weight(%4, %2, %3, [4, 4, 3], [1], [0], [1], 2) : float32[4, 4, 3]
return [%5, %7, %6]""",
    )


def test_graph_of_a_convolution_s_own_gradients(joint, every):
    x = torch.randn(2, 8, 6, requires_grad=True)
    found = joint(nn.Conv1d(8, 4, 3, bias=False), x)
    found.find(every(Dense(), grad_input=HALF, grad_weight=HALF))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(weight) : float32[4, 8, 3]
%1 = input(l_args_0_) : float32[2, 8, 6]
%2 = input() : float32[2, 4, 4]
%3 = convolution(%1, %0, None, [1], [0], [1], False, [0], 1) : float32[2, 4, 4]
%4 = topk_conv_indices(%2, %0, 2, out, 1, product) : int64[1, 2]
%5 = sampled_conv_input(%2, %0, %4, [2, 8, 6], [1], [0], [1], 1) : float32[2, 8, 6]
%6 = topk_conv_indices(%1, %2, 1, batch, 1, product) : int64[1, 1]
%7 = sampled_conv_weight(%2, %1, %6, [4, 8, 3], [1], [0], [1], 1) : float32[4, 8, 3]
return [%3, %7, %5]""",
    )


def test_graph_with_a_symbolic_depth(joint, every):
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(8, 5, requires_grad=True)
    found = joint(Product(), a, b, dynamic=True).find(every(Sampled(0.5, min_k=2)))
    text = found.run(rewrite_sampled).text
    names = {name: f"s{i}" for i, name in enumerate(dict.fromkeys(re.findall(r"s\d+", text)))}
    assert_text(
        re.sub(r"s\d+", lambda m: names[m[0]], text),
        """\
%0 = input(s0) : int(s0)
%1 = input(s1) : int(s1)
%2 = input(l_a_) : float32[s0, s1]
%3 = input(s2) : int(s2)
%4 = input(l_b_) : float32[s1, s2]
%5 = input() : float32[s0, s2]
%6 = sym_size(%2, 1) : int(s1)
%7 = sym_float(%6) : SymFloat
%8 = mul(%7, 0.5) : SymFloat
%9 = trunc(%8) : int(TruncToInt(0.5*ToFloat(s1)))
%10 = sym_max(%9, 2) : int(Max(2, TruncToInt(0.5*ToFloat(s1))))
%11 = sym_min(%10, %6) : int(Min(s1, Max(2, TruncToInt(0.5*ToFloat(s1)))))
%12 = topk_mm_indices(%2, %4, %11, product) : int64[Min(s1, Max(2, TruncToInt(0.5*ToFloat(s1))))]
%13 = gather_columns(%2, %12) : float32[s0, Min(s1, Max(2, TruncToInt(0.5*ToFloat(s1))))]
%14 = sampled_mm(%2, %4, %12, None) : float32[s0, s2]
%15 = sym_size(%2, 1) : int(s1)
%16 = sampled_mm_grad_weight(%13, %5, %12, %15, False) : float32[s1, s2]
%17 = sampled_mm_grad_input(%5, %4, %12) : float32[s0, s1]
return [%14, None, None, %17, None, %16]""",
    )


# --- what it computes


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: nn.Linear(8, 12, bias=False), (6,)),
        (lambda: nn.Linear(8, 12), (2, 3)),
        (lambda: Conv1D(12, 8), (6,)),
    ],
    ids=["linear", "3d", "Conv1D"],
)
def test_linear(joint, every, make, batch):
    model, x = make().double(), torch.randn(*batch, 8, dtype=torch.float64, requires_grad=True)
    dense = joint(model, x)
    stored = isinstance(model, Conv1D)
    w = model.weight.detach() if stored else model.weight.detach().t()
    flat, grad = x.detach().reshape(-1, 8), dense.tangents[0].reshape(-1, 12)
    for name, rule in RULES.items():
        y, own, (gx,) = rewritten(dense, every, rule)
        ey, ex, ew = matrix_reference(flat, w, grad, *rule)
        if model.bias is not None:
            ey = ey + model.bias.detach()
            torch.testing.assert_close(own["bias"], grad.sum(0), msg=name)
        torch.testing.assert_close(y.reshape(ey.shape), ey, msg=name)
        torch.testing.assert_close(gx.reshape(ex.shape), ex, msg=name)
        torch.testing.assert_close(own["weight"], ew if stored else ew.t(), msg=name)


@pytest.mark.parametrize("b_flipped", [False, True])
@pytest.mark.parametrize("a_flipped", [False, True])
def test_products_of_activations_in_each_orientation(joint, every, a_flipped, b_flipped):
    class Turned(nn.Module):
        def forward(self, a, b):
            return (a.mT if a_flipped else a) @ (b.mT if b_flipped else b)

    for lead in ((), (3,)):
        a = torch.randn(*lead, 5, 8, dtype=torch.float64)
        b = torch.randn(*lead, 8, 6, dtype=torch.float64)
        inputs = a.mT.contiguous() if a_flipped else a, b.mT.contiguous() if b_flipped else b
        dense = joint(Turned(), *(t.requires_grad_() for t in inputs))
        grad = dense.tangents[0]
        for name, rule in RULES.items():
            y, _, (ga, gb) = rewritten(dense, every, rule)
            ga, gb = ga.mT if a_flipped else ga, gb.mT if b_flipped else gb
            batches = range(3) if lead else [...]
            for i in batches:
                ey, ea, eb = matrix_reference(a[i].detach(), b[i].detach(), grad[i], *rule)
                torch.testing.assert_close(y[i], ey, msg=f"{name} {lead}")
                torch.testing.assert_close(ga[i], ea, msg=f"{name} {lead}")
                torch.testing.assert_close(gb[i], eb, msg=f"{name} {lead}")


def test_a_weight_on_the_left(joint, every):
    model = LeftWeight().double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    dense = joint(model, x)
    w = model.weight.detach()
    for scores in ("product", "weight"):
        pattern = Sampled(0.5, scores=scores)
        y, own, (gx,) = rewritten(dense, every, (pattern, None, None))
        args = w, x.detach().t(), dense.tangents[0], pattern, None, None
        ey, ew, ex = matrix_reference(*args, weight_left=True)
        torch.testing.assert_close(y, ey)
        torch.testing.assert_close(own["weight"], ew)
        torch.testing.assert_close(gx, ex.t())


def test_a_product_with_itself(joint, every):
    class Gram(nn.Module):
        def forward(self, x):
            return x @ x.mT

    for shape in ((5, 8), (2, 5, 8)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        dense = joint(Gram(), x)
        y, _, (gx,) = rewritten(dense, every, (HALF, None, None))
        for i in range(2) if len(shape) == 3 else [...]:
            one, grad = x.detach()[i], dense.tangents[0][i]
            ey, ea, eb = matrix_reference(one, one.t(), grad, HALF, None, None)
            torch.testing.assert_close(y[i], ey)
            torch.testing.assert_close(gx[i], ea + eb.t())


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(7, 5, 3, stride=2, padding=1), (4, 7, 9)),
    "2d": (lambda: nn.Conv2d(6, 4, (3, 2), dilation=(2, 1), bias=False), (3, 6, 6, 5)),
    "groups": (lambda: nn.Conv2d(10, 6, 2, stride=(2, 1), groups=2), (3, 10, 5, 4)),
    "3d": (lambda: nn.Conv3d(4, 3, (2, 1, 2), padding=(0, 1, 0)), (2, 4, 3, 4, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(joint, every, name):
    make, shape = CONVOLUTIONS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dense = joint(model, x)
    grad, w, groups = dense.tangents[0], model.weight.detach(), model.groups
    inner, outer = w.shape[1], w.shape[0] // groups

    def chosen(left, right_axis, size, pattern):
        """Channels of every group, by the norms of ``left``'s channels and of the weight's."""
        found = []
        for g in range(groups):
            a = left[:, g * size : (g + 1) * size].transpose(0, 1).flatten(1).norm(dim=1)
            b = w[g * outer : (g + 1) * outer].transpose(0, right_axis).flatten(1).norm(dim=1)
            scores = a * b if pattern.scores == "product" else b
            found += [g * size + i for i in largest(scores, pattern.k(size))]
        return found

    def product(x, w):
        return torch.func.functional_call(model, {"weight": w}, (x,))

    def gradient(grad, of):
        leaves = [x.detach().requires_grad_(), w.clone().requires_grad_()]
        return torch.autograd.grad(product(*leaves), leaves, grad)[of]

    for label, rule in RULES.items():
        forward, grad_input, grad_weight = rule
        y, own, (gx,) = rewritten(dense, every, rule)
        kept = range(x.shape[1])
        if isinstance(forward, Sampled):
            kept = chosen(x.detach(), 1, inner, forward)
        leaf, weight = x.detach().requires_grad_(), w.clone().requires_grad_()
        # zeroing the input's channels leaves the same pairs as zeroing both sides
        ey = product(only(leaf, kept, 1), weight)
        ex, ew = torch.autograd.grad(ey, [leaf, weight], grad)
        if isinstance(grad_input, Dense):
            ex = gradient(grad, 0)
        elif isinstance(grad_input, Sampled):
            ex = gradient(only(grad, chosen(grad, 0, outer, grad_input), 1), 0)
        if isinstance(grad_weight, Dense):
            ew = gradient(grad, 1)
        elif isinstance(grad_weight, Sampled):
            a, b = (t.flatten(1).norm(dim=1) for t in (x.detach(), grad))
            scores = a * b if grad_weight.scores == "product" else b
            ew = gradient(only(grad, largest(scores, grad_weight.k(len(a))), 0), 1)
        torch.testing.assert_close(y, ey.detach(), msg=label)
        torch.testing.assert_close(gx, ex, msg=label)
        torch.testing.assert_close(own["weight"], ew, msg=label)
        if own["bias"] is not None:
            torch.testing.assert_close(own["bias"], grad.transpose(0, 1).flatten(1).sum(1))


@pytest.mark.parametrize("rule", RULES)
def test_symbolic_sizes(joint, every, rule):
    a = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    dense = joint(Product(), a, b, dynamic=True)
    y, _, (ga, gb) = rewritten(dense, every, RULES[rule])
    expected = matrix_reference(a.detach(), b.detach(), dense.tangents[0], *RULES[rule])
    for one, other in zip((y, ga, gb), expected, strict=True):
        torch.testing.assert_close(one, other)


# --- what is saved


def test_the_forward_saves_only_the_sampled_columns(joint, every):
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Tanh())
    found = joint(model, torch.randn(16, 64)).find(every(Sampled(0.25)))
    found.run(rewrite_sampled)
    forward, _ = partition(found.gm, 1)
    saved = [n.meta["val"] for n in next(iter(reversed(forward.graph.nodes))).args[0][1:]]
    assert {(16, 16), (16,)} <= {tuple(v.shape) for v in saved}
    assert (16, 64) not in {tuple(v.shape) for v in saved}


def test_a_draw_is_saved_never_repeated(joint, every):
    found = joint(nn.Linear(8, 5), torch.randn(3, 8, requires_grad=True)).find(every(HALF))
    found.run(rewrite_sampled)
    draws = [n for n in found.gm.graph.nodes if "topk" in str(n.target)]
    assert len(draws) == 1
    assert draws[0].meta["recompute"] == CheckpointPolicy.MUST_SAVE
    assert draws[0].meta["partitioner_tag"] == "is_forward"


# --- what it leaves alone


@pytest.mark.parametrize(
    ("function", "shapes", "plan", "reason"),
    [
        (torch.mm, [(3, 8), (8, 5)], Sampled(1.0), "k = K = 8: exact"),
        (torch.bmm, [(2, 3, 8), (2, 8, 5)], Sampled(0.1, min_k=9), "k = K = 8: exact"),
        (F.conv1d, [(2, 6, 5), (4, 6, 3)], Sampled(0.5, min_k=6), "k = K = 6: exact"),
    ],
)
def test_reasons(function, shapes, plan, reason):
    found = run_pass(rewrite_sampled, traced(function, *map(torch.randn, shapes), plan=plan))
    assert list(found.skipped.values()) == [reason]
    assert not found.modified
    assert found.diff == ""


def test_what_is_not_planned_stays(joint, every):
    for pattern in (NM(2, 4), Dense()):
        found = joint(nn.Linear(8, 8), torch.randn(3, 8)).find(every(pattern))
        assert not found.run(rewrite_sampled).modified
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))
    assert not run_pass(rewrite_sampled, gm).modified


def test_a_gradient_nobody_asks_for_is_not_sampled(joint, every):
    found = joint(nn.Conv1d(8, 4, 3), torch.randn(2, 8, 6)).find(every(HALF))
    found.run(rewrite_sampled)
    found.run(cleanup)
    names = [str(n.target) for n in found.gm.graph.nodes]
    assert not any("grad_input" in name for name in names)
    assert any("sampled_conv_grad_weight" in name for name in names)
