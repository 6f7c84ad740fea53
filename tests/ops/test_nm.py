"""nm_mask, nm_mm, masked_mm and the convolutions: values and gradients against float64 twins.

The twins below know the rule and nothing of our code: loops over groups, and torch's own dense
products of the weight that is left.
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
from sparsefx.errors import ConfigError

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
WHERE = {  # x, w, (stride, padding, dilation, groups)
    "1d": ((2, 8, 9), (8, 8, 3), ([2], [1], [1], 1)),
    "2d": ((2, 8, 6, 5), (4, 8, 3, 2), ([1, 2], [1, 0], [2, 1], 1)),
    "3d": ((1, 4, 3, 4, 3), (4, 4, 2, 1, 2), ([1, 1, 2], [0, 1, 0], [1, 1, 1], 1)),
    "groups": ((2, 8, 5, 4), (8, 4, 2, 2), ([2, 1], [1, 0], [1, 1], 2)),
}


def mask_by_hand(w, n, m, dim):
    """Group by group: the n largest |w|, of equals the earlier."""
    rows = w.movedim(dim, -1)
    flat = rows.reshape(-1, m).tolist()
    kept = [sorted(range(m), key=lambda i, g=group: (-abs(g[i]), i))[:n] for group in flat]
    mask = torch.zeros(len(flat), m, dtype=torch.bool)
    for row, places in enumerate(kept):
        mask[row, places] = True
    return mask.view(rows.shape).movedim(-1, dim)


TILES = [  # the 90 ways to keep two of each row and of each column of a 4 x 4 tile
    torch.tensor(rows, dtype=torch.bool)
    for rows in itertools.product(
        [r for r in itertools.product([False, True], repeat=4) if sum(r) == 2], repeat=4
    )
    if all(sum(column) == 2 for column in zip(*rows, strict=True))
]


def transposable_by_hand(w):
    """2:4: of the 90 tiles the one with the largest total, for every tap."""
    taps = w.double().reshape(*w.shape[:2], -1)
    mask = torch.zeros_like(taps, dtype=torch.bool)
    for i, j, tap in itertools.product(
        range(0, w.shape[0], 4), range(0, w.shape[1], 4), range(taps.shape[2])
    ):
        tile = taps[i : i + 4, j : j + 4, tap].abs()
        mask[i : i + 4, j : j + 4, tap] = max(TILES, key=lambda t, x=tile: float(x[t].sum()))
    return mask.view(w.shape)


def expected_mask(w, n, m, dim, transposable):
    return transposable_by_hand(w) if transposable else mask_by_hand(w, n, m, dim)


def twin(product, mask, x, w, bias, grad):
    """Values and exact gradients of ``product(x, w where mask, bias)``, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, w, bias)]
    y = product(leaves[0], torch.where(mask, leaves[1], 0.0), leaves[2])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def ours(function, x, w, bias, grad):
    leaves = [t.detach().requires_grad_() for t in (x, w, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_same(found, expected, dtype=torch.float64):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other.to(dtype), **TOLERANCES[dtype])


TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-1},  # 8 bits of mantissa; sums of up to 100 terms
}
PATTERNS = [(2, 4, 0, False), (1, 3, 0, False), (2, 4, 1, False), (5, 6, 1, False), (2, 4, 0, True)]


# --- the mask


@pytest.mark.parametrize("shape", [(24, 12), (12, 24), (24, 12, 3), (12, 12, 2, 3)])
@pytest.mark.parametrize(("n", "m", "dim"), [(2, 4, 0), (2, 4, 1), (1, 2, 0), (7, 12, 1)])
def test_mask(shape, n, m, dim):
    w = torch.randn(shape).round(decimals=1)  # with ties
    assert torch.equal(ops.nm_mask(w, n, m, dim, False), mask_by_hand(w, n, m, dim))


@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 3), (8, 4, 2, 2)])
def test_transposable_mask(shape):
    w = torch.randn(shape)
    for dim in (0, 1):  # a tile has no axis
        assert torch.equal(ops.nm_mask(w, 2, 4, dim, True), transposable_by_hand(w))


@settings(max_examples=60)
@given(
    data=st.data(),
    m=st.integers(2, 32),
    groups=st.integers(0, 3),
    others=st.integers(0, 4),
    dim=st.integers(0, 1),
)
def test_any_mask_keeps_exactly_n_of_m_and_is_its_own_mask(data, m, groups, others, dim):
    n = data.draw(st.integers(1, m - 1))
    shape = (groups * m, others) if dim == 0 else (others, groups * m)
    w = torch.tensor(
        data.draw(
            st.lists(
                st.floats(-2, 2, width=16), min_size=math.prod(shape), max_size=math.prod(shape)
            )
        )
    ).view(shape)
    mask = ops.nm_mask(w, n, m, dim, False)
    assert torch.equal(
        mask.movedim(dim, -1).reshape(-1, m).sum(1), torch.full((groups * others,), n)
    )
    assert torch.equal(mask, mask_by_hand(w, n, m, dim))
    kept = torch.where(mask, w, 0.0)
    again = ops.nm_mask(kept, n, m, dim, False)
    assert torch.equal(torch.where(again, kept, 0.0), kept)


@settings(max_examples=30)
@given(data=st.data(), m=st.integers(2, 8), tiles=st.tuples(st.integers(1, 2), st.integers(1, 2)))
def test_any_transposable_mask_keeps_n_of_each_row_and_column(data, m, tiles):
    n = data.draw(st.integers(1, m - 1))
    w = torch.randn(
        tiles[0] * m,
        tiles[1] * m,
        generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))),
    )
    mask = ops.nm_mask(w, n, m, 1, True)
    for axis in (0, 1):
        assert (mask.movedim(axis, -1).reshape(-1, m).sum(1) == n).all()


def test_the_weight_that_is_nan_shows_itself():
    w = torch.ones(4, 3)
    w[3, 1] = math.nan
    y = ops.nm_mm(torch.ones(2, 4), w, None, 2, 4, 0, False)
    assert y.isnan().tolist() == [[False, True, False]] * 2
    assert y[0, 0] == 2


# --- matrix products


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stored", ["as it is", "transposed"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_nm_mm(pattern, stored, dtype):
    x, w, bias = torch.randn(5, 12), torch.randn(12, 24), torch.randn(24)
    x, w, bias, grad = (t.to(dtype) for t in (x, w, bias, torch.randn(5, 24)))
    w = w if stored == "as it is" else w.t().contiguous().t()
    found = ours(lambda x, w, b: ops.nm_mm(x, w, b, *pattern), x, w, bias, grad)
    mask = expected_mask(w, *pattern)
    assert_same(found, twin(lambda x, w, b: x @ w + b, mask, x, w, bias, grad), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_masked_mm(dtype):
    x, w, bias, grad = (t.to(dtype) for t in map(torch.randn, [(5, 7), (7, 3), (3,), (5, 3)]))
    mask = torch.rand(7, 3) < 0.5
    found = ours(lambda x, w, b: ops.masked_mm(x, w, mask, b), x, w, bias, grad)
    assert_same(found, twin(lambda x, w, b: x @ w + b, mask, x, w, bias, grad), dtype)


ACTIVATIONS = {  # by formulas
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
    "silu": lambda z: z * torch.sigmoid(z),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("pattern", [(2, 4, 0, False), (2, 4, 0, True)])
def test_nm_mm_act(pattern, name):
    sizes = (5, 12), (12, 8), (8,), (5, 8)
    x, w, bias, grad = (torch.randn(size, dtype=torch.float64) for size in sizes)
    found = ours(lambda x, w, b: ops.nm_mm_act(x, w, b, *pattern, name), x, w, bias, grad)
    mask = expected_mask(w, *pattern)
    act = ACTIVATIONS[name]
    assert_same(found, twin(lambda x, w, b: act(x @ w + b), mask, x, w, bias, grad))
    plain = ops.nm_mm_act(x, w, None, *pattern, name)
    torch.testing.assert_close(plain, act(x @ (w * mask)))


def test_an_activation_that_is_none_of_ours():
    x, w = torch.ones(1, 4), torch.ones(4, 1)
    with pytest.raises(ConfigError, match="activation='tanh': use one of 'relu', 'gelu', "):
        ops.nm_mm_act(x, w, None, 2, 4, 0, False, "tanh")


@pytest.mark.parametrize("pattern", [(2, 4, 1, False), (1, 3, 2, False), (2, 4, 1, True)])
def test_nm_bmm(pattern):
    n, m, dim, transposable = pattern
    x, w = torch.randn(3, 5, 12).double(), torch.randn(3, 12, 12).double()
    w = w if transposable else w.round(decimals=1)  # with ties, of which tiles may take others
    mask = torch.stack([expected_mask(one, n, m, dim - 1, transposable) for one in w])
    x, w = x.requires_grad_(), w.requires_grad_()
    y, expected = ops.nm_bmm(x, w, *pattern), x @ torch.where(mask, w, 0.0)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, w), grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, w), grad))


def test_no_bias():
    x, w = torch.randn(5, 8), torch.randn(8, 3)
    mask = mask_by_hand(w, 2, 4, 0)
    torch.testing.assert_close(ops.nm_mm(x, w, None, 2, 4, 0, False), x @ (w * mask))
    torch.testing.assert_close(ops.masked_mm(x, w, mask, None), x @ (w * mask))


def test_what_the_mask_drops_cannot_spread():
    x, w = torch.ones(1, 2), torch.tensor([[1.0], [math.inf]])
    assert ops.masked_mm(x, w, torch.tensor([[True], [False]]), None).item() == 1.0


# --- convolutions


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("name", WHERE)
def test_nm_conv(name, transposable, dtype):
    x_shape, w_shape, where = WHERE[name]
    x, w, bias = (torch.randn(s).to(dtype) for s in (x_shape, w_shape, w_shape[:1]))
    conv = CONVS[len(where[0])]
    grad = torch.randn_like(conv(x, w, bias, *where))
    pattern = 2, 4, 1, transposable
    mask = expected_mask(w, *pattern)
    expected = twin(lambda x, w, b: conv(x, w, b, *where), mask, x, w, bias, grad)
    found = ours(lambda x, w, b: ops.nm_conv(x, w, b, *where, *pattern), x, w, bias, grad)
    assert_same(found, expected, dtype)
    found = ours(lambda x, w, b: ops.masked_conv(x, w, mask, b, *where), x, w, bias, grad)
    assert_same(found, expected, dtype)
    found = ops.nm_conv_grad_input(grad, w, x_shape, *where, *pattern)
    assert_same([found], [expected[1]], dtype)
    found = ops.masked_conv_grad_input(grad, w, mask, x_shape, *where)
    assert_same([found], [expected[1]], dtype)


@pytest.mark.parametrize("name", WHERE)
def test_a_grad_input_of_its_own_has_groups_along_the_output_channels(name):
    x_shape, w_shape, where = WHERE[name]
    x, w = torch.randn(x_shape).double(), torch.randn(w_shape).double()
    conv = CONVS[len(where[0])]
    grad = torch.randn_like(conv(x, w, None, *where))
    kept = w * mask_by_hand(w, 1, 4, 0)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(conv(x, kept, None, *where), x, grad)
    found = ops.nm_conv_grad_input(grad, w, x_shape, *where, 1, 4, 0, False)
    torch.testing.assert_close(found, expected)


# --- derivatives


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck_nm_mm(pattern):
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 12), (12, 12), (12,)]
    ]
    assert torch.autograd.gradcheck(lambda x, w, b: ops.nm_mm(x, w, b, *pattern), leaves)


def test_gradcheck_masked_mm():
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 5), (5, 4), (4,)]
    ]
    mask = torch.rand(5, 4) < 0.5
    assert torch.autograd.gradcheck(lambda x, w, b: ops.masked_mm(x, w, mask, b), leaves)


@pytest.mark.parametrize("name", WHERE)
def test_gradcheck_convolutions(name):
    x_shape, w_shape, where = WHERE[name]
    shapes = x_shape, w_shape, w_shape[:1]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    mask = torch.rand(w_shape) < 0.5
    check = torch.autograd.gradcheck
    assert check(lambda x, w, b: ops.masked_conv(x, w, mask, b, *where), leaves, fast_mode=True)
    pattern = 2, 4, 1, False
    assert check(lambda x, w, b: ops.nm_conv(x, w, b, *where, *pattern), leaves, fast_mode=True)


def test_only_what_asks_for_a_gradient_gets_one():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, 4)
    ops.nm_mm(x, w, None, 2, 4, 0, False).sum().backward()
    assert x.grad.shape == (3, 8)
    assert w.grad is None


# --- how the compiler sees them


CALLS = {
    "nm_mm": (ops.nm_mm, (3, 8), (8, 4), (2, 4, 0, False), 2 * 3 * 8 * 4 // 2),
    "nm_mm transposable": (ops.nm_mm, (3, 8), (8, 4), (2, 4, 0, True), 2 * 3 * 8 * 4 // 2),
    "nm_mm 1:8": (ops.nm_mm, (3, 8), (8, 4), (1, 8, 0, False), 2 * 3 * 8 * 4 // 8),
    "nm_conv": (
        ops.nm_conv, (2, 8, 5, 5), (4, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 2, 2, 4, 1, False),
        2 * (2 * 5 * 5) * 4 * (4 * 9) // 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_flops(name):
    op, x, w, rest, flops = CALLS[name]
    with FlopCounterMode(display=False) as counter:
        op(torch.randn(x), torch.randn(w), None, *rest)
    assert counter.get_total_flops() == flops


def test_flops_of_what_only_masks_are_those_of_the_dense_product():
    x, w = torch.randn(2, 4, 5), torch.randn(4, 4, 3)
    where, mask = ([1], [0], [1], 1), torch.ones(4, 4, 3, dtype=torch.bool)
    grad = torch.randn(2, 4, 3)
    dense = 2 * (2 * 3) * 4 * (4 * 3)
    for op, args, flops in [
        (ops.masked_mm, (x[0, :, :4].t(), w[:, :, 0], mask[:, :, 0], None), 2 * 4 * 4 * 4),
        (ops.masked_conv, (x, w, mask, None, *where), dense),
        (ops.masked_conv_grad_input, (grad, w, mask, x.shape, *where), dense),
        (ops.nm_conv_grad_input, (grad, w, x.shape, *where, 1, 4, 1, False), dense // 4),
        (ops.conv_grad_input, (grad, w, x.shape, *where), dense),
        (ops.conv_grad_weight, (grad, x, w.shape, *where), dense),
    ]:
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() == flops, op


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_equal_eager_ones(name):
    op, x, w, rest, _ = CALLS[name]
    x, w, bias = torch.randn(x), torch.randn(w), torch.randn(4)

    def call(x, w, b):
        return op(x, w, b, *rest)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    grad = torch.randn_like(call(x, w, bias))
    assert_same(ours(compiled, x, w, bias, grad), ours(call, x, w, bias, grad), torch.float32)
