"""Scaled pairs, and one pair that stands for the rest, in every sampled op against a twin.

A twin multiplies operands that were put together by hand: x[:, S] * scale beside the sum of the
other columns, w[S, :] above the mean of the other rows; autograd differentiates it, in float64.
"""

import pytest
import torch
from torch.nn import functional as F

from sparsefx import ops

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
WHERE = {  # x, w, (stride, padding, dilation, groups)
    "1d": ((4, 6, 9), (5, 6, 3), ([2], [1], [1], 1)),
    "2d": ((3, 6, 6, 5), (4, 6, 3, 2), ([1, 2], [1, 0], [2, 1], 1)),
    "3d": ((3, 4, 3, 4, 3), (3, 4, 2, 1, 2), ([1, 1, 2], [0, 1, 0], [1, 1, 1], 1)),
    "groups": ((3, 10, 5, 4), (6, 5, 2, 2), ([2, 1], [1, 0], [1, 1], 2)),
}
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 5e-5},
    torch.bfloat16: {"rtol": 4e-2, "atol": 2e-1},  # operands, stand-in and scaled copies round
}
PAIRS = ["plain", "scaled", "rest"]


def draw(pairs, size, k, groups=None):
    """(indices, scale, rest): ascending places, scales of which one is 0."""
    rows = [torch.randperm(size)[:k].sort().values for _ in range(groups or 1)]
    indices = torch.stack(rows) if groups else rows[0]
    scale = torch.rand(indices.shape) * 3
    if k:
        scale[..., 0] = 0
    return indices, scale if pairs == "scaled" else None, pairs == "rest"


def others(indices, size):
    return [i for i in range(size) if i not in indices.tolist()]


def left(x, dim, drawn):
    """x[S] * scale, then the sum of the rest, along ``dim``."""
    indices, scale, rest = drawn
    out = x.index_select(dim, indices)
    if scale is not None:
        shape = [1] * x.dim()
        shape[dim] = -1
        out = out * scale.to(x.dtype).view(shape)
    if rest:
        summed = x[(slice(None),) * dim + (others(indices, x.shape[dim]),)].sum(dim, keepdim=True)
        out = torch.cat([out, summed], dim)
    return out


def right(w, dim, drawn):
    """w[S], then the mean of the rest, along ``dim``."""
    indices, _, rest = drawn
    out = w.index_select(dim, indices)
    if rest:
        meant = w[(slice(None),) * dim + (others(indices, w.shape[dim]),)].mean(dim, keepdim=True)
        out = torch.cat([out, meant], dim)
    return out


def values_and_gradients(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_same(found, expected, dtype=torch.float64):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other.to(dtype), **TOLERANCES[dtype])


def randoms(dtype, *shapes):
    return [(torch.randn(shape) + 1).to(dtype) for shape in shapes]  # a mean that matters


# --- matrix products


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("pairs", PAIRS)
def test_mm(pairs, k, turned, dtype):
    torch.manual_seed(k)
    x, w, bias, grad = randoms(dtype, (5, 9), (9, 6), (6,), (5, 6))
    if turned:
        x, w = x.t().contiguous().t(), w.t().contiguous().t()
    drawn = s, scale, rest = draw(pairs, 9, k)
    wide = [t.double() for t in (x, w, bias)]
    expected = values_and_gradients(
        lambda x, w, b: left(x, 1, drawn) @ right(w, 0, drawn) + b, wide, grad.double()
    )
    found = values_and_gradients(
        lambda x, w, b: ops.sampled_mm(x, w, s, b, scale, rest), (x, w, bias), grad
    )
    assert_same(found, expected, dtype)
    xs = ops.gather_columns(x, s, scale, rest)
    assert_same([xs], [left(x.double(), 1, drawn)], dtype)
    gw = ops.sampled_mm_grad_weight(xs, grad, s, 9, turned, rest)
    assert_same([gw.t() if turned else gw], expected[2:3], dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pairs", PAIRS)
def test_mm_weight(pairs, turned, dtype):
    torch.manual_seed(1)
    x, grad = randoms(dtype, (7, 5), (7, 4))
    drawn = s, scale, rest = draw(pairs, 7, 3)
    xs = ops.gather_rows(x, s, scale, rest)
    assert xs.is_contiguous()
    assert_same([xs], [left(x.double(), 0, drawn)], dtype)
    found = ops.sampled_mm_weight(xs, grad, s, turned, rest)
    expected = left(x.double(), 0, drawn).t() @ right(grad.double(), 0, drawn)
    assert_same([found.t() if turned else found], [expected], dtype)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("pairs", PAIRS)
def test_bmm(pairs, dtype, shared):
    torch.manual_seed(2)
    x, w, grad = randoms(dtype, (3, 5, 9), (3, 9, 6), (3, 5, 6))
    s, scale, rest = draw(pairs, 9, 4, 1 if shared else 3)

    def of(batch):
        row = 0 if shared else batch
        return s[row], None if scale is None else scale[row], rest

    def twin(x, w):
        return torch.stack([left(x[b], 1, of(b)) @ right(w[b], 0, of(b)) for b in range(3)])

    expected = values_and_gradients(twin, (x.double(), w.double()), grad.double())
    found = values_and_gradients(lambda x, w: ops.sampled_bmm(x, w, s, scale, rest), (x, w), grad)
    assert_same(found, expected, dtype)
    xs = ops.gather_columns(x, s, scale, rest)
    found = ops.sampled_bmm_grad_weight(xs, grad, s, 9, rest)
    assert_same([found], expected[2:3], dtype)
    rows, scale, rest = tokens = draw(pairs, 5, 2, 1 if shared else 3)
    each = [(rows[b * (not shared)], None if scale is None else scale[b * (not shared)], rest)
            for b in range(3)]  # fmt: skip
    expected = [
        left(x[b].double(), 0, d).t() @ right(grad[b].double(), 0, d) for b, d in enumerate(each)
    ]
    xs = ops.gather_rows(x, *tokens)
    assert_same([ops.sampled_bmm_weight(xs, grad, rows, rest)], [torch.stack(expected)], dtype)


# --- convolutions


def grouped(side, tensor, dim, drawn, groups):
    """``side`` within every group of channels."""
    indices, scale, rest = drawn
    parts = tensor.chunk(groups, dim)
    each = [(indices[g], None if scale is None else scale[g], rest) for g in range(groups)]
    return torch.cat([side(part, dim, d) for part, d in zip(parts, each, strict=True)], dim)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("pairs", PAIRS)
def test_conv(pairs, name, dtype, channels_last):
    torch.manual_seed(3)
    x_shape, w_shape, where = WHERE[name]
    groups, conv = where[3], CONVS[len(where[0])]
    x, w, bias = randoms(dtype, x_shape, w_shape, w_shape[:1])
    grad = torch.randn_like(conv(x, w, bias, *where))
    if channels_last and x.dim() == 4:
        x, w, grad = (t.to(memory_format=torch.channels_last) for t in (x, w, grad))
    s, scale, rest = drawn = draw(pairs, w_shape[1], 2, groups)

    def twin(x, w, b):
        out = w_shape[0] // groups
        each = [(s[g], None if scale is None else scale[g], rest) for g in range(groups)]
        ws = [right(w[g * out : (g + 1) * out], 1, d) for g, d in enumerate(each)]
        return conv(grouped(left, x, 1, drawn, groups), torch.cat(ws), b, *where)

    wide = [t.double() for t in (x, w, bias)]
    expected = values_and_gradients(twin, wide, grad.double())
    found = values_and_gradients(
        lambda x, w, b: ops.sampled_conv(x, w, s, b, *where, scale, rest), (x, w, bias), grad
    )
    assert_same(found, expected, dtype)
    xs = ops.gather_channels(x, s, scale, rest)
    found = ops.sampled_conv_grad_weight(xs, grad, s, w_shape, *where, rest)
    assert_same([found], expected[2:3], dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("pairs", PAIRS)
def test_conv_gradients_of_their_own(pairs, name, dtype):
    torch.manual_seed(4)
    x_shape, w_shape, where = WHERE[name]
    groups, conv = where[3], CONVS[len(where[0])]
    x, w = randoms(dtype, x_shape, w_shape)
    grad = torch.randn_like(conv(x, w, None, *where)) + 1
    wide = [t.double() for t in (x, w, grad)]

    drawn = s, scale, rest = draw(pairs, w_shape[0] // groups, 2, groups)
    gs, ws = grouped(left, wide[2], 1, drawn, groups), grouped(right, wide[1], 0, drawn, groups)
    expected = values_and_gradients(lambda x: conv(x, ws, None, *where), wide[:1], gs)[1]
    found = ops.sampled_conv_input(grad, w, s, x_shape, *where, scale, rest)
    assert_same([found], [expected], dtype)

    one = s, scale, rest = draw(pairs, x_shape[0], 2)
    xs, gs = left(wide[0], 0, one), right(wide[2], 0, one)
    expected = values_and_gradients(lambda w: conv(xs, w, None, *where), wide[1:2], gs)[1]
    drawn = s[None], None if scale is None else scale[None], rest
    found = ops.sampled_conv_weight(grad, x, drawn[0], w_shape, *where, *drawn[1:])
    assert_same([found], [expected], dtype)
    gathered = ops.gather_examples(x, *drawn)
    again = ops.sampled_conv_weight(grad, gathered, drawn[0], w_shape, *where, *drawn[1:], True)
    assert torch.equal(found, again)


# --- what the stand-in is for


def test_equal_pairs_are_exact():
    x, w = torch.randn(5, 1).expand(5, 12), torch.randn(1, 4).expand(12, 4)
    for k in (0, 3, 11, 12):
        y = ops.sampled_mm(x, w, torch.arange(k), None, None, True)
        torch.testing.assert_close(y, x @ w)


def error_of(x, w, k, estimator):
    scores = ops.mm_scores(x, w, "product", estimator == "topk_mean")
    s = ops.topk_indices(scores, k)
    y = ops.sampled_mm(x, w, s, None, None, estimator == "topk_mean")
    return float((y - x @ w).norm() / (x @ w).norm())


@pytest.mark.parametrize(
    ("kind", "topk", "mean"),
    [("normal", 0.65, 0.64), ("shifted", 0.46, 0.063), ("relu", 0.63, 0.52)],
)
def test_the_stand_in_pays_where_data_has_a_mean(kind, topk, mean):
    """DESIGN quotes these: half of 100 pairs, mean of 40."""
    torch.manual_seed(0)
    found = {"topk": 0.0, "topk_mean": 0.0}
    for _ in range(40):
        x, w = torch.randn(2, 100, 100)
        if kind == "shifted":
            x, w = x + 1, w + 1
        x = x.relu() if kind == "relu" else x
        for estimator in found:
            found[estimator] += error_of(x, w, 50, estimator) / 40
    assert found["topk"] == pytest.approx(topk, rel=0.05)
    assert found["topk_mean"] == pytest.approx(mean, rel=0.05)


def test_zero_everywhere_but_at_the_pairs_without_it():
    x, w, grad = torch.randn(5, 9), torch.randn(9, 6), torch.randn(5, 6)
    s = torch.tensor([1, 4])
    gx = ops.sampled_mm_grad_input(grad, w, s, torch.ones(2))
    assert gx.count_nonzero(0).nonzero().flatten().tolist() == [1, 4]
    with_rest = ops.sampled_mm_grad_input(grad, w, s, None, True)
    torch.testing.assert_close(with_rest[:, 0], with_rest[:, 8])  # all others share one gradient
    xs = ops.gather_columns(x, s, None, True)
    gw = ops.sampled_mm_grad_weight(xs, grad, s, 9, False, True)
    torch.testing.assert_close(gw[0], gw[8])


def test_a_scale_does_not_widen_the_result():
    x, w = torch.randn(3, 4).bfloat16(), torch.randn(4, 2).bfloat16()
    s, scale = torch.tensor([0, 2]), torch.tensor([1.5, 1 / 3])
    y = ops.sampled_mm(x, w, s, None, scale)
    expected = (x[:, s].float() * scale).bfloat16() @ w[s]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("op", ["mm", "bmm", "conv"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_gradcheck(op, pairs):
    torch.manual_seed(5)

    def leaves(*shapes):
        return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def with_double_scale(drawn):
        s, scale, rest = drawn
        return s, None if scale is None else scale.double(), rest

    if op == "mm":
        s, scale, rest = with_double_scale(draw(pairs, 5, 2))
        call = lambda x, w, b: ops.sampled_mm(x, w, s, b, scale, rest)  # noqa: E731
        inputs = leaves((3, 5), (5, 4), (4,))
    elif op == "bmm":
        s, scale, rest = with_double_scale(draw(pairs, 5, 2, 2))
        call = lambda x, w: ops.sampled_bmm(x, w, s, scale, rest)  # noqa: E731
        inputs = leaves((2, 3, 5), (2, 5, 4))
    else:
        s, scale, rest = with_double_scale(draw(pairs, 3, 2, 2))
        where = [1, 1], [1, 0], [1, 1], 2
        call = lambda x, w, b: ops.sampled_conv(x, w, s, b, *where, scale, rest)  # noqa: E731
        inputs = leaves((2, 6, 4, 3), (4, 3, 2, 2), (4,))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
