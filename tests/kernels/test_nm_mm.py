"""nm_mm: both ways of running it against a plain twin, on odd sizes, ties, NaN and any strides."""

import pytest
import torch

from sparsefx import ops
from sparsefx.errors import MaskError
from sparsefx.kernels.nm_mm import triton as nm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = {"fused": nm.fused, "copied": nm.copied}
PATTERNS = [(1, 2), (3, 4), (1, 4), (4, 8), (2, 16), (16, 32), (31, 32), (1, 3), (4, 6), (5, 12)]
SHAPES = [(63, 65), (1, 1), (129, 70)]


def keep(w, n, m, dim):
    """Twin: a stable sort by magnitude in float64, NaN above infinity above all else."""
    size = w.double().abs()
    size = size.masked_fill(size.isinf(), 1e300).masked_fill(size.isnan(), 1e301)
    order = size.unflatten(dim, (-1, m)).argsort(dim=dim + 1, descending=True, stable=True)
    return (order.argsort(dim=dim + 1) < n).flatten(dim, dim + 1)


def masked(w, n, m, dim):
    return w.masked_fill(~keep(w, n, m, dim), 0)


def operands(rows, depth, cols, dtype, device):
    x = torch.randn(rows, depth, dtype=dtype, device=device)
    w = torch.randn(depth, cols, dtype=dtype, device=device)
    return x, w, torch.randn(cols, dtype=dtype, device=device)


def hidden(t):
    """The same values strided inside a larger NaN buffer: any read outside the view shows."""
    rows, cols = t.shape
    buffer = torch.full((2 * rows + 3, 3 * cols + 5), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[1 : 2 * rows + 1 : 2, 2 : 3 * cols + 2 : 3]
    return view.copy_(t)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_forward(way, dtype, rows, cols, device, assert_as_good_as_eager):
    x, w, bias = operands(rows, 140, cols, dtype, device)
    w = w.T.contiguous().T  # a linear's weight, transposed
    y = WAYS[way](x, w, bias, 2, 4, 0)
    assert_as_good_as_eager(y, x, masked(w, 2, 4, 0), bias)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("n", "m"),
    [(1, 2), (3, 4), (1, 4), (4, 8), (2, 16), (16, 32), (31, 32), (1, 3), (4, 6), (5, 12)],
)
def test_patterns(way, n, m, dim, device, assert_as_good_as_eager):
    sizes = (3 * m, 11) if dim == 0 else (11, 3 * m)
    x, w, bias = operands(7, *sizes, torch.float32, device)
    y = WAYS[way](x, w, bias, n, m, dim)
    assert_as_good_as_eager(y, x, masked(w, n, m, dim), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5)])
def test_gradient_of_the_input(dtype, n, m, device, assert_as_good_as_eager):
    x, weight, grad = (
        torch.randn(size, dtype=dtype, device=device) for size in [(33, 140), (65, 140), (33, 65)]
    )
    wide = x.double().requires_grad_()
    (wide @ masked(weight, n, m, 1).double().T).backward(grad.double())
    got = nm.fused(grad, weight, None, n, m, 1)
    assert_as_good_as_eager(got, grad, masked(weight, n, m, 1))
    twin = grad.double() @ masked(weight, n, m, 1).double()
    torch.testing.assert_close(wide.grad, twin)  # float64: the same sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (3, 8), (3, 6)])
def test_ties_keep_the_earlier(dtype, n, m, device):
    levels = torch.tensor([-1.0, 0.0, -0.0, 1.0, 2.0, -2.0], device=device)
    w = levels[torch.randint(6, (24, 24), device=device)].to(dtype)
    for dim in (0, 1):
        assert torch.equal(nm.masked_weight(w, n, m, dim), masked(w, n, m, dim))
    one = torch.ones(m, 1, dtype=dtype, device=device)
    assert nm.masked_weight(one, n, m, 0).flatten().tolist() == [1] * n + [0] * (m - n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4)])
def test_extremes_rank_by_magnitude(dtype, n, m, device):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest subnormal
    levels = torch.tensor([tiny, -2 * tiny, info.max, -info.max, float("inf"), -float("inf"), 0])
    w = levels.to(device, dtype)[torch.randint(7, (32, 8), device=device)]
    assert torch.equal(nm.masked_weight(w, n, m, 0), masked(w, n, m, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 5)])
def test_any_bits(dtype, n, m, device):
    """Infinities and NaNs of every sign and payload: all NaNs rank alike, above infinity."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    infinity = torch.tensor(float("inf"), dtype=dtype).view(bits).item()
    sign, payload = torch.iinfo(bits).min, torch.randint(1, 100, (40, 9))
    mixed = (infinity + payload * torch.randint(2, (40, 9))) | (sign * torch.randint(2, (40, 9)))
    w = mixed.to(bits).view(dtype).to(device)
    w[torch.rand(40, 9) < 0.3] = 1
    assert torch.equal(nm.masked_weight(w, n, m, 0).view(bits), masked(w, n, m, 0).view(bits))


# numpy, under the interpreter, remarks on the infinity times zero that this test is about
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_is_the_largest_and_shows(way, dtype, dim, device):
    nan, inf = float("nan"), float("inf")
    w = torch.tensor([[1, inf, nan, -inf], [nan, 3, nan, -nan], [1, 2, 3, 4]], dtype=dtype)
    w = (w.T if dim == 0 else w).to(device)
    kept = nm.masked_weight(w, 2, 4, dim)
    twin = masked(w, 2, 4, dim)
    assert torch.equal(kept.isnan(), twin.isnan())
    assert torch.equal(kept.nan_to_num(), twin.nan_to_num())
    x = torch.ones(2, w.shape[0], dtype=dtype, device=device)
    assert torch.equal(WAYS[way](x, w, None, 2, 4, dim).isnan(), (x @ twin).isnan())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [0, 1])
def test_any_strides(way, dim, device, assert_as_good_as_eager):
    x, w, bias = operands(37, 72, 44, torch.float32, device)
    spread = hidden(bias[None])[0]
    y = WAYS[way](hidden(x.T).T, hidden(w), spread, 2, 4, dim)
    assert_as_good_as_eager(y, x, masked(w, 2, 4, dim), bias)
    row, column = x[:1].expand(37, -1), bias[:1].expand(44)  # strides of zero
    assert_as_good_as_eager(WAYS[way](row, w, column, 2, 4, dim), row, masked(w, 2, 4, dim), column)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "depth", "cols"), [(0, 8, 4), (3, 8, 0), (3, 0, 4), (0, 0, 0)])
@pytest.mark.parametrize("biased", [True, False])
def test_empty(way, rows, depth, cols, biased, device):
    x, w, bias = operands(rows, depth, cols, torch.float32, device)
    y = WAYS[way](x, w, bias if biased else None, 2, 4, 0)
    assert torch.equal(y, bias.expand(rows, cols) if biased else torch.zeros_like(y))
    assert y.shape == (rows, cols)


@pytest.mark.parametrize("inside", [True, False])
def test_launcher_takes_the_way_that_the_tiles_say(inside, monkeypatch, device):
    x, w, bias = operands(5, 16, 8, torch.float32, device)
    taken = []
    monkeypatch.setattr(nm._tiles, "mask_in_gemm", lambda *shape: inside)
    monkeypatch.setattr(nm, "fused", lambda *args: taken.append(True))
    monkeypatch.setattr(nm, "copied", lambda *args: taken.append(False))
    nm.nm_mm(x, w, bias, 2, 4, 0, False)
    assert taken == [inside]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("transposable", [True, False])
def test_launcher_agrees_with_the_op(dtype, dim, transposable, device):
    x, w, bias = operands(5, 16, 8, dtype, device)
    arguments = x, w, bias, 2, 4, dim, transposable
    y = nm.nm_mm(*arguments)
    torch.testing.assert_close(y, ops.REFERENCES[ops.nm_mm](*arguments))
    assert y.dtype == dtype


def test_launcher_leaves_dtypes_that_differ_to_torch(device):
    x, w, _ = operands(5, 16, 8, torch.float32, device)
    with pytest.raises(RuntimeError, match="dtype"):
        nm.nm_mm(x, w.half(), None, 2, 4, 0, False)


def test_launcher_says_what_is_wrong(device):
    x, w, _ = operands(5, 6, 8, torch.float32, device)
    with pytest.raises(MaskError, match=r"2:4 along dim 0 of \[6, 8\]"):
        nm.nm_mm(x, w, None, 2, 4, 0, False)
    with pytest.raises(MaskError, match="4:4 along dim 1"):
        nm.nm_mm(x, w, None, 4, 4, 1, False)
    with pytest.raises(ValueError, match=r"x \[6, 5\] @ w \[6, 8\]: K differs"):
        nm.fused(x.T, w, None, 2, 4, 1)
    with pytest.raises(ValueError, match=r"x \[2, 8, 8\] @ w \[3, 8, 8\]: the batch differs"):
        nm.fused(torch.ones(2, 8, 8), torch.ones(3, 8, 8), None, 2, 4, 0)


# --- a batch


def batch_of(b, rows, depth, cols, dtype, device):
    x = torch.randn(b, rows, depth, dtype=dtype, device=device)
    return x, torch.randn(b, depth, cols, dtype=dtype, device=device)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 3)])
def test_batched_forward_and_its_grad_input(way, dtype, n, m, device, assert_as_good_as_eager):
    x, w = batch_of(3, 5, 4 * m, 7, dtype, device)
    w = w.mT.contiguous().mT  # experts' weights [B, out, in], transposed
    kept = torch.stack([masked(one, n, m, 0) for one in w])
    grad = torch.randn(3, 5, 7, dtype=dtype, device=device)
    y, g = WAYS[way](x, w, None, n, m, 0), WAYS[way](grad, w.mT, None, n, m, 1)
    for i in range(3):
        assert_as_good_as_eager(y[i], x[i], kept[i])
        assert_as_good_as_eager(g[i], grad[i], kept[i].T)


@pytest.mark.parametrize("way", WAYS)
def test_batched_strides(way, device, assert_as_good_as_eager):
    x, w = batch_of(2, 9, 12, 8, torch.float32, device)
    spread = torch.stack([hidden(one) for one in w]).as_strided(w.shape, w.stride())
    every = torch.full((4, 19, 25), float("nan"), device=device)
    view = every[1::2, 1::2, 1::2].copy_(x)
    same = w[:1].expand(2, -1, -1)  # one weight for both
    for one, other in [(view, spread), (x, same)]:
        y = WAYS[way](one, other, None, 2, 4, 1)
        for i in range(2):
            assert_as_good_as_eager(y[i], x[i], masked(other[i], 2, 4, 1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 4), (2, 0, 8, 4), (2, 3, 0, 4), (2, 3, 8, 0)])
def test_batched_empty(way, shape, device):
    x, w = batch_of(*shape, torch.float32, device)
    assert torch.equal(WAYS[way](x, w, None, 2, 4, 0), torch.zeros_like(x @ w))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dim", [1, 2])
def test_batched_launcher_agrees_with_the_op(inside, dim, monkeypatch, device):
    monkeypatch.setattr(nm._tiles, "mask_in_gemm", lambda *shape: inside)
    x, w = batch_of(3, 5, 16, 8, torch.float32, device)
    for operands, transposable in [
        ((x, w), False),
        ((x, w), True),
        ((x.double(), w.double()), False),
    ]:
        got = nm.nm_bmm(*operands, 2, 4, dim, transposable)
        expected = ops.REFERENCES[ops.nm_bmm](*operands, 2, 4, dim, transposable)
        torch.testing.assert_close(got, expected)


def test_batched_launcher_leaves_what_no_grid_holds(monkeypatch, device):
    x, w = batch_of(nm.GRID + 1, 1, 2, 1, torch.float32, device)
    monkeypatch.setattr(nm, "fused", None)  # a call would raise
    monkeypatch.setattr(nm, "copied", None)
    y = nm.nm_bmm(x, w, 1, 2, 1, False)
    torch.testing.assert_close(y[-1], x[-1] @ masked(w[-1], 1, 2, 0))
    with pytest.raises(MaskError, match=r"2:4 along dim 1 of \[65536, 2, 1\]"):
        nm.nm_bmm(x, w, 2, 4, 1, False)
