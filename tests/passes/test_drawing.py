"""What rewrite_sampled draws for every estimator: the graph, where it is drawn, what comes out.

Values are checked against twins: products of operands that were gathered by hand with the indices
and scales that the graph itself drew.
"""

import re

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from sparsefx import ops
from sparsefx.config import Dense, Sampled
from sparsefx.passes import rewrite_sampled
from sparsefx.patterns import ESTIMATORS, SCORES
from sparsefx.rewriting import is_backward

RANDOM = ("systematic", "bernoulli", "with_replacement")
DRAWS = {
    "topk": ops.topk_indices,
    "topk_mean": ops.topk_indices,
    "systematic": ops.systematic_indices,
    "bernoulli": ops.bernoulli_indices,
    "with_replacement": ops.with_replacement_indices,
}
PATTERNS = [
    Sampled(0.4, estimator=estimator, scores=scores)
    for estimator in ESTIMATORS
    for scores in SCORES
    if (estimator, scores) != ("topk_mean", "uniform")
] + [Sampled(mass=0.6), Sampled(0.5, mass=0.6, scores="input")]


class Product(nn.Module):
    def forward(self, a, b):
        return a @ b


def drawn(found):
    """(indices, scale or None) of every draw, in the order of the graph."""
    pairs = []
    for op in (*DRAWS.values(), ops.mass_indices, ops.topk_mm_indices, ops.topk_conv_indices):
        for result in found.seen.get(op, []):
            pair = result if isinstance(result, tuple) else (result, None)
            if not any(pair[0] is other[0] for other in pairs):
                pairs.append(pair)
    return pairs


def twin(left, right, draw, rest):
    """left[:, S] * scale @ right[S], and the pair that stands for the others."""
    s, scale = draw
    picked = left[:, s] if scale is None else left[:, s] * scale
    y = picked @ right[s]
    if rest:
        other = [i for i in range(left.shape[1]) if i not in s.tolist()]
        y = y + torch.outer(left[:, other].sum(1), right[other].mean(0))
    return y


def differentiated(function, grad, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


# captured once: a test takes a copy with again()


@pytest.fixture(scope="module")
def layer(joint):
    torch.manual_seed(1)
    x = (torch.randn(12, 20, dtype=torch.float64) + 0.5).requires_grad_()
    return joint(nn.Linear(20, 6).double(), x)


class Turned(nn.Module):
    """x @ w, or F.linear(x, w): autograd writes dL/dw the one way or the other."""

    def __init__(self, flipped):
        super().__init__()
        self.flipped = flipped
        shape = (20, 12) if flipped else (12, 20)
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight if self.flipped else F.linear(x, self.weight)


@pytest.fixture(scope="module", params=[False, True], ids=["linear", "matmul"])
def turned(joint, request):
    torch.manual_seed(2)
    x = torch.randn(14, 20, dtype=torch.float64, requires_grad=True)
    return joint(Turned(request.param), x)


@pytest.fixture(scope="module")
def batched(joint):
    torch.manual_seed(4)
    a = torch.randn(3, 14, 20, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 20, 12, dtype=torch.float64, requires_grad=True)
    return joint(Product(), a, b)


@pytest.fixture(scope="module", params=[1, 2])
def image(joint, request):
    torch.manual_seed(5)
    model = nn.Conv2d(20, 6, 3, padding=1, stride=2, groups=request.param).double()
    return joint(model, torch.randn(4, 20, 5, 4, dtype=torch.float64, requires_grad=True))


@pytest.fixture(scope="module")
def signal(joint):
    torch.manual_seed(6)
    x = torch.randn(10, 4, 5, dtype=torch.float64, requires_grad=True)
    return joint(nn.Conv1d(4, 12, 3, padding=1).double(), x)


# --- what it writes


def test_graph_of_an_unbiased_forward(joint, every):
    found = joint(nn.Linear(8, 5), torch.randn(3, 8, requires_grad=True))
    found.find(every(Sampled(0.5, estimator="systematic")))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(weight) : float32[5, 8]
%1 = input(bias) : float32[5]
%2 = input(l_args_0_) : float32[3, 8]
%3 = input() : float32[3, 5]
%4 = permute(%0, [1, 0]) : float32[8, 5]
%5 = mm_scores(%2, %4, product, False, False) : float32[8]
%6 = rand([1], dtype=float32, device=cpu, pin_memory=False) : float32[1]
%7 = systematic_indices(%5, %6, 4) : (int64[4], float32[4])
%8 = getitem(%7, 0) : int64[4]
%9 = getitem(%7, 1) : float32[4]
%10 = gather_columns(%2, %8, %9, False) : float32[3, 4]
%11 = sampled_mm(%2, %4, %8, %1, %9, False) : float32[3, 5]
%12 = sampled_mm_grad_input(%3, %4, %8, %9, False) : float32[3, 8]
%13 = sampled_mm_grad_weight(%10, %3, %8, 8, True) : float32[5, 8]
%14 = permute(%13, [1, 0]) : float32[8, 5]
%15 = sum(%3, [0], True) : float32[1, 5]
%16 = view(%15, [5]) : float32[5]
%17 = permute(%14, [1, 0]) : float32[5, 8]
return [%11, %17, %16, %12]""",
    )


def test_graph_of_rows_that_the_input_chooses(joint, every):
    found = joint(nn.Linear(8, 5, bias=False), torch.randn(6, 8, requires_grad=True))
    rows = Sampled(0.5, estimator="systematic", scores="input")
    found.find(every(Dense(), grad_weight=rows))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(weight) : float32[5, 8]
%1 = input(l_args_0_) : float32[6, 8]
%2 = input() : float32[6, 5]
%3 = permute(%0, [1, 0]) : float32[8, 5]
%4 = permute(%1, [1, 0]) : float32[8, 6]
%5 = mm_scores(%4, %1, left, False, False) : float32[6]
%6 = rand([1], dtype=float32, device=cpu, pin_memory=False) : float32[1]
%7 = systematic_indices(%5, %6, 3) : (int64[3], float32[3])
%8 = getitem(%7, 0) : int64[3]
%9 = getitem(%7, 1) : float32[3]
%10 = gather_rows(%1, %8, %9, False) : float32[3, 8]
%11 = mm(%1, %3) : float32[6, 5]
%12 = after(%11, [%8, %9]) : float32[6, 5]
%13 = sampled_mm_weight(%10, %2, %8, True) : float32[5, 8]
%14 = permute(%13, [1, 0]) : float32[8, 5]
%15 = permute(%3, [1, 0]) : float32[5, 8]
%16 = mm(%2, %15) : float32[6, 8]
%17 = permute(%14, [1, 0]) : float32[5, 8]
return [%12, %17, %16]""",
    )


def test_graph_of_a_gradient_s_own_draw(joint, every):
    found = joint(nn.Linear(8, 5, bias=False), torch.randn(6, 8, requires_grad=True))
    found.find(every(Dense(), grad_input=Sampled(0.5, estimator="bernoulli")))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(weight) : float32[5, 8]
%1 = input(l_args_0_) : float32[6, 8]
%2 = input() : float32[6, 5]
%3 = permute(%0, [1, 0]) : float32[8, 5]
%4 = rand([5], dtype=float32, device=cpu, pin_memory=False) : float32[5]
%5 = mm(%1, %3) : float32[6, 5]
%6 = after(%5, [%4]) : float32[6, 5]
%7 = permute(%2, [1, 0]) : float32[5, 6]
%8 = mm(%7, %1) : float32[5, 8]
%9 = permute(%8, [1, 0]) : float32[8, 5]
%10 = permute(%3, [1, 0]) : float32[5, 8]
%11 = mm_scores(%2, %10, product, False, False) : float32[5]
%12 = bernoulli_indices(%11, %4, 2, 5) : (int64[5], float32[5])
%13 = getitem(%12, 0) : int64[5]
%14 = getitem(%12, 1) : float32[5]
%15 = sampled_mm(%2, %10, %13, None, %14, False) : float32[6, 8]
%16 = permute(%9, [1, 0]) : float32[5, 8]
return [%6, %16, %15]""",
    )


def test_graph_of_a_mass(joint, every):
    found = joint(nn.Linear(8, 5, bias=False), torch.randn(6, 8))
    found.find(every(Sampled(mass=0.5)))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(weight) : float32[5, 8]
%1 = input(l_args_0_) : float32[6, 8]
%2 = input() : float32[6, 5]
%3 = permute(%0, [1, 0]) : float32[8, 5]
%4 = mm_scores(%1, %3, product, False, False) : float32[8]
%5 = mass_indices(%4, 4, 1, 0.5) : (int64[4], float32[4])
%6 = getitem(%5, 0) : int64[4]
%7 = getitem(%5, 1) : float32[4]
%8 = gather_columns(%1, %6, %7, False) : float32[6, 4]
%9 = sampled_mm(%1, %3, %6, None, %7, False) : float32[6, 5]
%10 = sampled_mm_grad_weight(%8, %2, %6, 8, True) : float32[5, 8]
%11 = permute(%10, [1, 0]) : float32[8, 5]
%12 = permute(%11, [1, 0]) : float32[5, 8]
return [%9, %12, None]""",
    )


def test_graph_of_a_shared_draw(joint, every):
    a, b = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 8, 5, requires_grad=True)
    found = joint(Product(), a, b).find(every(Sampled(0.5, shared=True), grad_weight=Dense()))
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
%7 = mm_scores(%4, %6, product, False, True) : float32[1, 8]
%8 = topk_indices(%7, 4) : int64[1, 4]
%9 = sampled_bmm(%4, %6, %8) : float32[2, 3, 5]
%10 = view(%9, [2, 3, 5]) : float32[2, 3, 5]
%11 = view(%2, [2, 3, 5]) : float32[2, 3, 5]
%12 = permute(%4, [0, 2, 1]) : float32[2, 8, 3]
%13 = bmm(%12, %11) : float32[2, 8, 5]
%14 = sampled_bmm_grad_input(%11, %6, %8) : float32[2, 3, 8]
%15 = view(%13, [2, 8, 5]) : float32[2, 8, 5]
%16 = view(%14, [2, 3, 8]) : float32[2, 3, 8]
return [%10, %16, %15]""",
    )


def test_graph_of_a_convolution(joint, every):
    found = joint(nn.Conv1d(8, 4, 3, groups=2, bias=False), torch.randn(4, 8, 6))
    rows = Sampled(0.5, estimator="with_replacement", scores="input")
    found.find(every(Sampled(0.5, estimator="topk_mean"), grad_weight=rows))
    assert_text(
        found.run(rewrite_sampled).text,
        """\
%0 = input(weight) : float32[4, 4, 3]
%1 = input(l_args_0_) : float32[4, 8, 6]
%2 = input() : float32[4, 4, 4]
%3 = conv_scores(%1, %0, in, 2, product, True) : float32[2, 4]
%4 = topk_indices(%3, 2) : int64[2, 2]
%5 = conv_scores(%1, %1, batch, 1, left, False) : float32[1, 4]
%6 = rand([1, 2], dtype=float32, device=cpu, pin_memory=False) : float32[1, 2]
%7 = with_replacement_indices(%5, %6, 2) : (int64[1, 2], float32[1, 2])
%8 = getitem(%7, 0) : int64[1, 2]
%9 = getitem(%7, 1) : float32[1, 2]
%10 = gather_examples(%1, %8, %9, False) : float32[2, 8, 6]
%11 = sampled_conv(%1, %0, %4, None, [1], [0], [1], 2, None, True) : float32[4, 4, 4]
%12 = after(%11, [%8, %9]) : float32[4, 4, 4]
%13 = sampled_conv_weight(%2, %10, %8, [4, 4, 3], [1], [0], [1], 2, %9, False, True) : float32[4, 4, 3]
return [%12, %13, None]""",  # noqa: E501
    )


def test_symbolic_sizes_reach_the_noise_of_the_forward(joint, every):
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(8, 5, requires_grad=True)
    pattern = Sampled(0.5, estimator="bernoulli")
    found = joint(Product(), a, b, dynamic=True)
    found.find(every(pattern, grad_input=pattern, grad_weight=pattern))
    text = found.run(rewrite_sampled).text
    noises = [node for node in found.gm.graph.nodes if node.target is torch.ops.aten.rand.default]
    assert len(noises) == 3
    assert not any(map(is_backward, noises))
    assert "nonzero" not in text
    assert "_local_scalar_dense" not in text
    y, gradients = found.values()
    assert y.shape == (3, 5)
    assert [g.shape for g in gradients.values()] == [a.shape, b.shape]


# --- where it draws, and what is saved


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_is_drawn_is_saved_and_noise_is_of_the_forward(layer, every, pattern):
    found = layer.again()
    found.find(every(Dense(), grad_input=pattern, grad_weight=pattern)).run(rewrite_sampled)
    noises = [node for node in found.gm.graph.nodes if node.target is torch.ops.aten.rand.default]
    assert len(noises) == (2 if pattern.random else 0)
    chosen = [
        node
        for node in found.gm.graph.nodes
        if any(user.target in WITH_INDICES for user in node.users) and is_index(node)
    ]
    assert chosen
    for node in (*noises, *chosen):
        assert node.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert not any(map(is_backward, noises))
    early = [not is_backward(node) for node in chosen]
    # a grad_weight by the input, or uniform, is drawn in the forward
    assert any(early) == (pattern.scores in ("input", "uniform"))


WITH_INDICES = {ops.sampled_mm, ops.sampled_mm_weight, ops.gather_rows}


def is_index(node):
    return isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dtype == torch.int64


# --- what it computes


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_sampled_forward_and_its_derivative(layer, every, pattern):
    found = layer.again().find(every(pattern))
    model, [x] = found.model, found.args
    found.run(rewrite_sampled)
    y, gradients = found.values()
    [draw] = drawn(found)
    rest = pattern.estimator == "topk_mean"
    assert len(draw[0]) == pattern.size(20) - rest
    expected = differentiated(
        lambda x, w: twin(x, w.t(), draw, rest), found.tangents[0], x, model.weight
    )
    torch.testing.assert_close(y, expected[0] + model.bias.detach())
    torch.testing.assert_close(gradients["l_args_0_"], expected[1])
    torch.testing.assert_close(gradients["weight"], expected[2])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_of_their_own(turned, every, pattern):
    model, [x], flipped = turned.model, turned.args, turned.model.flipped
    w = model.weight.detach() if flipped else model.weight.detach().t()  # [20, 12]
    rest = pattern.estimator == "topk_mean"

    found = turned.again().find(every(Dense(), grad_input=pattern))
    found.run(rewrite_sampled)
    y, gradients = found.values()
    torch.testing.assert_close(y, x.detach() @ w)
    grad, [draw] = found.tangents[0], drawn(found)
    torch.testing.assert_close(gradients["l_x_"], twin(grad, w.t(), draw, rest))
    torch.testing.assert_close(
        gradients["weight"], x.detach().t() @ grad if flipped else grad.t() @ x.detach()
    )

    found = turned.again().find(every(Dense(), grad_weight=pattern))
    found.run(rewrite_sampled)
    y, gradients = found.values()
    grad, [draw] = found.tangents[0], drawn(found)
    early = pattern.scores in ("input", "uniform")
    a, b = x.detach().t(), grad
    if not flipped and not early:  # grad.t() @ x is what the graph computes
        expected = twin(b.t(), a.t(), draw, rest)
    else:
        expected = twin(a, b, draw, rest)
        expected = expected if flipped else expected.t()
    torch.testing.assert_close(gradients["weight"], expected)
    torch.testing.assert_close(gradients["l_x_"], grad @ w.t())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batched_products(batched, every, estimator, shared):
    a, b = batched.args
    pattern = Sampled(0.4, estimator=estimator, shared=shared)
    rest = estimator == "topk_mean"
    found = batched.again().find(every(pattern))
    found.run(rewrite_sampled)
    y, gradients = found.values()
    [(s, scale)] = drawn(found)
    assert s.shape[0] == (1 if shared else 3)
    for i in range(3):
        draw = s[i * (not shared)], None if scale is None else scale[i * (not shared)]
        expected = differentiated(
            lambda a, b, draw=draw: twin(a, b, draw, rest), found.tangents[0][i], a[i], b[i]
        )
        for one, other in zip((y, *gradients.values()), expected, strict=True):
            torch.testing.assert_close(one[i], other)


@pytest.mark.parametrize("scores", ["product", "input"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_a_batched_product_of_their_own(batched, every, estimator, scores):
    a, b = batched.args
    pattern = Sampled(0.4, estimator=estimator, scores=scores)
    rest = estimator == "topk_mean"
    for role in ("grad_input", "grad_weight"):
        found = batched.again().find(every(Dense(), **{role: pattern}))
        found.run(rewrite_sampled)
        y, gradients = found.values()
        torch.testing.assert_close(y, (a @ b).detach())
        [(s, scale)] = drawn(found)
        ga, gb = gradients.values()
        for i in range(3):
            draw, grad = (s[i], None if scale is None else scale[i]), found.tangents[0][i]
            left, right = a[i].detach(), b[i].detach()
            ea, eb = grad @ right.t(), left.t() @ grad
            if role == "grad_input":
                ea = twin(grad, right.t(), draw, rest)
            else:
                eb = twin(left.t(), grad, draw, rest)
            torch.testing.assert_close(ga[i], ea)
            torch.testing.assert_close(gb[i], eb)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_convolutions(image, every, estimator):
    model, [x], groups = image.model, image.args, image.model.groups
    found = image.again().find(every(Sampled(0.4, estimator=estimator)))
    found.run(rewrite_sampled)
    y, gradients = found.values()
    [(s, scale)] = drawn(found)
    rest = estimator == "topk_mean"

    def conv(x, w, b):
        xs, ws = [], []
        for g, (part, filters) in enumerate(zip(x.chunk(groups, 1), w.chunk(groups), strict=True)):
            other = [i for i in range(part.shape[1]) if i not in s[g].tolist()]
            one = part[:, s[g]]
            xs.append(one if scale is None else one * scale[g].view(1, -1, 1, 1))
            ws.append(filters[:, s[g]])
            if rest:
                xs[g] = torch.cat([xs[g], part[:, other].sum(1, keepdim=True)], 1)
                ws[g] = torch.cat([ws[g], filters[:, other].mean(1, keepdim=True)], 1)
        return F.conv2d(torch.cat(xs, 1), torch.cat(ws), b, 2, 1, 1, groups)

    expected = differentiated(conv, found.tangents[0], x, model.weight, model.bias)
    for one, other in zip((y, *map(gradients.get, NAMES)), expected, strict=True):
        torch.testing.assert_close(one, other)


NAMES = ("l_args_0_", "weight", "bias")


@pytest.mark.parametrize("scores", ["product", "input"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_a_convolution_of_their_own(signal, every, estimator, scores):
    model, [x] = signal.model, signal.args
    pattern, rest = Sampled(0.4, estimator=estimator, scores=scores), estimator == "topk_mean"
    dense = signal
    conv = dict(zip(NAMES, differentiated(
        lambda x, w, b: F.conv1d(x, w, b, padding=1), dense.tangents[0],
        x, model.weight, model.bias)[1:], strict=True))  # fmt: skip
    for role, name in (("grad_input", "l_args_0_"), ("grad_weight", "weight")):
        found = dense.again().find(every(Dense(), **{role: pattern}))
        found.run(rewrite_sampled)
        _, gradients = found.values()
        [(s, scale)] = drawn(found)
        one = scale[0].view(-1, 1, 1) if scale is not None else torch.ones(1, dtype=x.dtype)
        grad, total = found.tangents[0], 10 if role == "grad_weight" else 12
        other = [i for i in range(total) if i not in s[0].tolist()]
        if role == "grad_input":
            gs, ws = grad[:, s[0]] * one.view(1, -1, 1), model.weight.detach()[s[0]]
            if rest:
                gs = torch.cat([gs, grad[:, other].sum(1, keepdim=True)], 1)
                ws = torch.cat([ws, model.weight.detach()[other].mean(0, keepdim=True)])
            call = lambda x, ws=ws: F.conv1d(x, ws, padding=1)  # noqa: E731
            expected = differentiated(call, gs, x)[1]
        else:
            xs, gs = x.detach()[s[0]] * one, grad[s[0]]
            if rest:
                xs = torch.cat([xs, x.detach()[other].sum(0, keepdim=True)])
                gs = torch.cat([gs, grad[other].mean(0, keepdim=True)])
            call = lambda w, xs=xs: F.conv1d(xs, w, padding=1)  # noqa: E731
            expected = differentiated(call, gs, model.weight)[1]
        torch.testing.assert_close(gradients[name], expected)
        for same in {*NAMES} - {name}:
            torch.testing.assert_close(gradients[same], conv[same])


def test_all_pairs_stay_exactly_dense(joint, every):
    for estimator in ESTIMATORS:
        found = joint(nn.Linear(8, 5), torch.randn(6, 8, requires_grad=True))
        found.find(every(Sampled(1, estimator=estimator)))
        run = found.run(rewrite_sampled)
        assert not run.modified
        assert not re.search("sampled|rand", run.text)
