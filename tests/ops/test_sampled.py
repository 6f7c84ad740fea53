"""The sampled ops: which pairs are chosen, and what is computed from them, against float64 twins.

A twin is the dense product of operands whose pairs outside S were set to zero by hand.
"""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparsefx import ops

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
WHERE = {  # x, w, (stride, padding, dilation, groups)
    "1d": ((2, 7, 9), (5, 7, 3), ([2], [1], [1], 1)),
    "2d": ((3, 6, 6, 5), (4, 6, 3, 2), ([1, 2], [1, 0], [2, 1], 1)),
    "3d": ((1, 4, 3, 4, 3), (3, 4, 2, 1, 2), ([1, 1, 2], [0, 1, 0], [1, 1, 1], 1)),
    "groups": ((3, 10, 5, 4), (6, 5, 2, 2), ([2, 1], [1, 0], [1, 1], 2)),
}
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-1},  # 8 bits of mantissa; sums of up to 100 terms
}


def largest(scores, k):
    """Places of the k largest, ascending; of equals the earlier."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def norms(x, axis):
    """2-norms of the slices along ``axis``, as plain floats."""
    slices = x.double().movedim(axis, 0)
    return [math.sqrt(sum(v * v for v in part.flatten().tolist())) for part in slices]


def scored(left, right, scores):
    if scores == "left":
        return left
    return right if scores == "right" else [a * b for a, b in zip(left, right, strict=True)]


def only(x, indices, axis):
    """X with zeros outside the indices along ``axis``."""
    shape = [1] * x.dim()
    shape[axis] = -1
    taken = torch.zeros(x.shape[axis], dtype=torch.bool)
    taken[indices] = True
    return torch.where(taken.view(shape), x, 0.0)


def assert_same(found, expected, dtype=torch.float64):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other.to(dtype), **TOLERANCES[dtype])


def values_and_gradients(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


# --- which pairs


@settings(max_examples=80)
@given(data=st.data(), m=st.integers(0, 4), depth=st.integers(0, 9), n=st.integers(0, 4))
def test_topk_is_brute_force(data, m, depth, n):
    k = data.draw(st.integers(0, depth))
    scores = data.draw(st.sampled_from(["product", "left", "right"]))
    # powers of two: norms of equal sets are equal, so ties are many and exact
    draw = st.sampled_from([0.0, 1.0, -1.0, 2.0])
    x = torch.tensor([[data.draw(draw) for _ in range(depth)] for _ in range(m)]).view(m, depth)
    w = torch.tensor([[data.draw(draw) for _ in range(n)] for _ in range(depth)]).view(depth, n)
    found = ops.topk_mm_indices(x, w, k, scores)
    squares = [[v * v for v in norms(t, axis)] for t, axis in ((x, 1), (w, 0))]
    rounded = [[round(v) for v in side] for side in squares]
    assert found.dtype == torch.int64
    assert found.tolist() == largest(scored(*rounded, scores), k)


def test_of_equals_the_earlier():
    x, w = torch.ones(3, 6), torch.ones(6, 2)
    w[4] = 2
    assert ops.topk_mm_indices(x, w, 3, "product").tolist() == [0, 1, 4]
    assert ops.topk_mm_indices(x, w, 3, "left").tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_wider_than_the_operands(dtype):
    x = torch.full((64, 4), 1e3, dtype=dtype)  # 64 squares of 1e3: a thousand times float16's all
    x[:, 2] *= 2
    x[:, 1] += 16
    w = torch.full((4, 32), 1e3, dtype=dtype)
    for scores in ("product", "left"):
        assert ops.topk_mm_indices(x, w, 1, scores).tolist() == [2]
        assert ops.topk_mm_indices(x, w, 2, scores).tolist() == [1, 2]
    image = x.view(64, 4, 1)
    assert ops.topk_conv_indices(image, w.view(32, 4, 1), 2, "in", 1, "left").tolist() == [[1, 2]]


@pytest.mark.parametrize("tiny", [1e-18, 1e-3])
def test_small_gradients_are_told_apart(tiny):
    grad = torch.tensor([[1.0, 3.0, 2.0, 0.5]]) * tiny
    w = torch.ones(4, 2)
    assert ops.topk_mm_indices(grad, w, 2, "product").tolist() == [1, 2]


def test_a_pair_that_is_nan_is_taken():
    x, w = torch.ones(2, 5), torch.ones(5, 2)
    x[1, 3] = math.nan
    indices = ops.topk_mm_indices(x, w, 1, "product")
    assert indices.tolist() == [3]
    assert ops.sampled_mm(x, w, indices, None)[1].isnan().all()


def test_each_batch_has_its_own_pairs():
    x, w = torch.randn(4, 3, 9), torch.randn(4, 9, 5)
    found = ops.topk_mm_indices(x, w, 4, "product")
    for b in range(4):
        assert found[b].tolist() == largest(scored(norms(x[b], 1), norms(w[b], 0), "product"), 4)


@pytest.mark.parametrize("scores", ["product", "left", "right"])
@pytest.mark.parametrize("name", WHERE)
def test_channels(name, scores):
    x_shape, w_shape, where = WHERE[name]
    x, w, groups = torch.randn(x_shape), torch.randn(w_shape), where[3]
    y = torch.randn_like(CONVS[len(where[0])](x, w, None, *where))
    inner, outer = w_shape[1], w_shape[0] // groups
    for g in range(groups):
        mine = w[g * outer : (g + 1) * outer]
        left = norms(x[:, g * inner : (g + 1) * inner], 1)
        found = ops.topk_conv_indices(x, w, 3, "in", groups, scores)[g]
        assert found.tolist() == largest(scored(left, norms(mine, 1), scores), 3)
        left = norms(y[:, g * outer : (g + 1) * outer], 1)
        found = ops.topk_conv_indices(y, w, 2, "out", groups, scores)[g]
        assert found.tolist() == largest(scored(left, norms(mine, 0), scores), 2)
    for k in range(x_shape[0] + 1):
        found = ops.topk_conv_indices(x, y, k, "batch", 1, scores)
        assert found.tolist() == [largest(scored(norms(x, 0), norms(y, 0), scores), k)]


# --- matrix products


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stored", ["as it is", "transposed"])
@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_sampled_mm(k, stored, dtype):
    x, w, bias, grad = (t.to(dtype) for t in map(torch.randn, [(5, 9), (9, 6), (6,), (5, 6)]))
    if stored == "transposed":
        x, w = x.t().contiguous().t(), w.t().contiguous().t()
    s = ops.topk_mm_indices(x, w, k, "product")
    found = values_and_gradients(lambda x, w, b: ops.sampled_mm(x, w, s, b), (x, w, bias), grad)
    wide = [t.double() for t in (x, w, bias)]
    expected = values_and_gradients(
        lambda x, w, b: only(x, s, 1) @ only(w, s, 0) + b, wide, grad.double()
    )
    assert_same(found, expected, dtype)
    assert_same([ops.sampled_mm_grad_input(grad, w, s)], expected[1:2], dtype)
    xs = ops.gather_columns(x, s)
    assert xs.is_contiguous()
    assert_same([ops.sampled_mm_grad_weight(xs, grad, s, 9, False)], expected[2:3], dtype)
    turned = ops.sampled_mm_grad_weight(xs, grad, s, 9, True)
    assert_same([turned], [expected[2].t()], dtype)
    torch.testing.assert_close(
        ops.sampled_mm(x, w, s, None).double(), expected[0] - wide[2], **TOLERANCES[dtype]
    )


def test_all_pairs_are_the_dense_product():
    x, w = torch.randn(5, 9), torch.randn(9, 6)
    everything = ops.topk_mm_indices(x, w, 9, "product")
    assert torch.equal(ops.sampled_mm(x, w, everything, None), x @ w)


@pytest.mark.parametrize(("m", "depth", "n"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty(m, depth, n):
    x, w, bias = torch.randn(m, depth), torch.randn(depth, n), torch.randn(n)
    k = min(2, depth)
    s = ops.topk_mm_indices(x, w, k, "product")
    assert s.tolist() == list(range(k))  # all scores are equal
    y, gx, gw, gb = values_and_gradients(
        lambda x, w, b: ops.sampled_mm(x, w, s, b), (x, w, bias), torch.ones(m, n)
    )
    torch.testing.assert_close(y, bias.expand(m, n) + x[:, :k] @ w[:k])
    assert (gx.shape, gw.shape) == (x.shape, w.shape)
    assert torch.equal(gb, torch.full((n,), float(m)))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_sampled_bmm(k, dtype):
    x, w, grad = (torch.randn(s).to(dtype) for s in [(3, 5, 9), (3, 9, 6), (3, 5, 6)])
    s = ops.topk_mm_indices(x, w, k, "product")

    def twin(x, w):
        parts = [only(x[b], s[b], 1) @ only(w[b], s[b], 0) for b in range(3)]
        return torch.stack(parts)

    found = values_and_gradients(lambda x, w: ops.sampled_bmm(x, w, s), (x, w), grad)
    expected = values_and_gradients(twin, (x.double(), w.double()), grad.double())
    assert_same(found, expected, dtype)
    assert_same([ops.sampled_bmm_grad_input(grad, w, s)], expected[1:2], dtype)
    xs = ops.gather_columns(x, s)
    assert_same([ops.sampled_bmm_grad_weight(xs, grad, s, 9)], expected[2:3], dtype)


# --- convolutions


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", WHERE)
def test_sampled_conv(name, k, dtype):
    x_shape, w_shape, where = WHERE[name]
    groups, conv = where[3], CONVS[len(where[0])]
    x, w, bias = (torch.randn(s).to(dtype) for s in (x_shape, w_shape, w_shape[:1]))
    grad = torch.randn_like(conv(x, w, bias, *where))
    s = ops.topk_conv_indices(x, w, k, "in", groups, "product")
    channels = [g * w_shape[1] + i for g in range(groups) for i in s[g].tolist()]

    def twin(x, w, b):
        outer = w_shape[0] // groups
        each = [only(w[g * outer : (g + 1) * outer], s[g], 1) for g in range(groups)]
        return conv(only(x, channels, 1), torch.cat(each), b, *where)

    tensors = x, w, bias
    found = values_and_gradients(
        lambda x, w, b: ops.sampled_conv(x, w, s, b, *where), tensors, grad
    )
    expected = values_and_gradients(twin, [t.double() for t in tensors], grad.double())
    assert_same(found, expected, dtype)
    assert_same([ops.sampled_conv_grad_input(grad, w, s, x_shape, *where)], expected[1:2], dtype)
    xs = ops.gather_channels(x, s)
    torch.testing.assert_close(xs, x[:, channels])
    found = ops.sampled_conv_grad_weight(xs, grad, s, w_shape, *where)
    assert_same([found], expected[2:3], dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", WHERE)
def test_a_convolution_s_gradients_sampled_on_their_own(name, dtype):
    x_shape, w_shape, where = WHERE[name]
    groups, conv = where[3], CONVS[len(where[0])]
    x, w = (torch.randn(s).to(dtype) for s in (x_shape, w_shape))
    grad = torch.randn_like(conv(x, w, None, *where))
    tensors = [x.double(), w.double()]

    s = ops.topk_conv_indices(grad, w, 2, "out", groups, "product")
    outer = w_shape[0] // groups
    channels = [g * outer + i for g in range(groups) for i in s[g].tolist()]
    kept = only(grad.double(), channels, 1)
    _, expected, _ = values_and_gradients(lambda x, w: conv(x, w, None, *where), tensors, kept)
    found = ops.sampled_conv_input(grad, w, s, x_shape, *where)
    assert_same([found], [expected], dtype)

    s = ops.topk_conv_indices(x, grad, min(2, x_shape[0]), "batch", 1, "product")
    kept = only(grad.double(), s[0], 0)
    _, _, expected = values_and_gradients(lambda x, w: conv(x, w, None, *where), tensors, kept)
    found = ops.sampled_conv_weight(grad, x, s, w_shape, *where)
    assert_same([found], [expected], dtype)


# --- derivatives


@pytest.mark.parametrize("k", [0, 2, 5])
def test_gradcheck_products(k):
    def leaves(*shapes):
        return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    x, w, bias = leaves((3, 5), (5, 4), (4,))
    s = ops.topk_mm_indices(x, w, k, "product")
    assert torch.autograd.gradcheck(lambda x, w, b: ops.sampled_mm(x, w, s, b), (x, w, bias))
    x, w = leaves((2, 3, 5), (2, 5, 4))
    s = ops.topk_mm_indices(x, w, k, "product")
    assert torch.autograd.gradcheck(lambda x, w: ops.sampled_bmm(x, w, s), (x, w))


@pytest.mark.parametrize("name", WHERE)
def test_gradcheck_convolutions(name):
    x_shape, w_shape, where = WHERE[name]
    shapes = x_shape, w_shape, w_shape[:1]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    s = ops.topk_conv_indices(*leaves[:2], 2, "in", where[3], "product")
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.sampled_conv(x, w, s, b, *where), leaves, fast_mode=True
    )


# --- how the compiler sees them


def test_flops():
    x, w, grad = torch.randn(3, 8), torch.randn(8, 5), torch.randn(3, 5)
    s = torch.arange(2)
    cube = [t.expand(4, *t.shape) for t in (x, w, grad)]
    each = s.expand(4, 2)
    image, taps, where = (
        torch.randn(2, 8, 6, 6),
        torch.randn(4, 4, 3, 3),
        ([1, 1], [1, 1], [1, 1], 2),
    )
    out = torch.randn(2, 4, 6, 6)
    positions, per_tap = 2 * 6 * 6, 4 * 2 * 9  # two channels of each group
    for op, args, flops in [
        (ops.sampled_mm, (x, w, s, None), 2 * 3 * 2 * 5),
        (ops.sampled_mm_grad_input, (grad, w, s), 2 * 3 * 2 * 5),
        (ops.sampled_mm_grad_weight, (x[:, :2], grad, s, 8, False), 2 * 3 * 2 * 5),
        (ops.sampled_bmm, (*cube[:2], each), 4 * 2 * 3 * 2 * 5),
        (ops.sampled_bmm_grad_input, (cube[2], cube[1], each), 4 * 2 * 3 * 2 * 5),
        (ops.sampled_bmm_grad_weight, (cube[0][:, :, :2], cube[2], each, 8), 4 * 2 * 3 * 2 * 5),
        (ops.sampled_conv, (image, taps, s.expand(2, 2), None, *where), 2 * positions * per_tap),
        (
            ops.sampled_conv_grad_input, (out, taps, s.expand(2, 2), image.shape, *where),
            2 * positions * per_tap,
        ),
        (
            ops.sampled_conv_grad_weight,
            (image[:, [0, 1, 4, 5]], out, s.expand(2, 2), taps.shape, *where),
            2 * positions * per_tap,
        ),
        # one of two output channels a group, one of two examples: half of the dense product
        (
            ops.sampled_conv_input, (out, taps, s[:1].expand(2, 1), image.shape, *where),
            positions * 4 * 4 * 9,
        ),
        (
            ops.sampled_conv_weight, (out, image, s[None, :1], taps.shape, *where),
            positions * 4 * 4 * 9,
        ),
        (ops.topk_mm_indices, (x, w, 2, "product"), 0),
        (ops.gather_columns, (x, s), 0),
    ]:  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() == flops, op


def linear(x, w, b):
    return ops.sampled_mm(x, w, ops.topk_mm_indices(x, w, 3, "product"), b)


def batched(x, w):
    return ops.sampled_bmm(x, w, ops.topk_mm_indices(x, w, 3, "product"))


def convolution(x, w, b):
    where = [1, 1], [1, 0], [1, 1], 2
    return ops.sampled_conv(x, w, ops.topk_conv_indices(x, w, 3, "in", 2, "product"), b, *where)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (linear, [(4, 8), (8, 5), (5,)]),
        (batched, [(2, 4, 8), (2, 8, 5)]),
        (convolution, [(2, 8, 5, 5), (4, 4, 3, 2), (4,)]),
    ],
)
def test_compiled_calls_equal_eager_ones(call, shapes, dynamic):
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        tensors = [torch.randn(s) for s in shapes]
        grad = torch.randn_like(call(*tensors))
        found = values_and_gradients(compiled, tensors, grad)
        assert_same(found, values_and_gradients(call, tensors, grad), torch.float32)


def test_pairs_of_powers_of_the_ratio_nest():
    x, w = torch.randn(6, 20), torch.randn(20, 4)
    sets = [set(ops.topk_mm_indices(x, w, k, "product").tolist()) for k in range(21)]
    for smaller, larger in itertools.pairwise(sets):
        assert smaller < larger
