"""sampled_mm and its gradients: both ways of running each against a plain twin."""

import pytest
import torch

from sparsefx import ops
from sparsefx.kernels.sampled_mm import triton as sampled

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = {"fused": True, "copied": False}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Have the tiles choose one way at every size."""
    inside = WAYS[request.param]
    monkeypatch.setattr(sampled._tiles, "columns_in_gemm", lambda *shape: inside)
    monkeypatch.setattr(sampled._tiles, "rows_in_gemm", lambda *shape, copies: inside)


def hidden(t):
    """The same values strided inside a larger NaN buffer: any read outside the view shows."""
    rows, cols = t.shape
    buffer = torch.full((2 * rows + 3, 3 * cols + 5), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[1 : 2 * rows + 1 : 2, 2 : 3 * cols + 2 : 3]
    return view.copy_(t)


def operands(rows, depth, cols, dtype, device):
    x = torch.randn(rows, depth, dtype=dtype, device=device)
    w = torch.randn(depth, cols, dtype=dtype, device=device)
    return x, w, torch.randn(cols, dtype=dtype, device=device)


INDICES = {
    "sorted": [0, 3, 4, 17, 40, 64, 139],
    "unsorted": [139, 2, 77, 0, 64],
    "repeated": [5, 5, 139, 0, 5],
    "all": list(range(140)),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(63, 65), (1, 1), (129, 70)])
@pytest.mark.parametrize("drawn", INDICES)
def test_forward(dtype, rows, cols, drawn, device, assert_as_good_as_eager):
    x, w, bias = operands(rows, 140, cols, dtype, device)
    index = torch.tensor(INDICES[drawn], device=device)
    y = sampled.sampled_mm(x, w, index, bias)
    assert_as_good_as_eager(y, x[:, index], w[index], bias)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(63, 65), (1, 1), (129, 70)])
@pytest.mark.parametrize("drawn", ["unsorted", "all"])
@pytest.mark.parametrize("transposed", [True, False])
def test_gradients(dtype, rows, cols, drawn, transposed, device, assert_as_good_as_eager):
    x, w, _ = operands(rows, 140, cols, dtype, device)
    grad = torch.randn(rows, cols, dtype=dtype, device=device)
    index = torch.tensor(INDICES[drawn], device=device)
    wide_x, wide_w = x.double().requires_grad_(), w.double().requires_grad_()
    (wide_x[:, index] @ wide_w[index]).backward(grad.double())

    gx = sampled.sampled_mm_grad_input(grad, w, index)
    gw = sampled.sampled_mm_grad_weight(x[:, index], grad, index, 140, transposed)
    assert gw.shape == ((cols, 140) if transposed else (140, cols))
    assert gw.is_contiguous()
    gw = gw.T if transposed else gw
    assert_as_good_as_eager(gx[:, index], grad, w[index].T)
    assert_as_good_as_eager(gw[index], x[:, index].T, grad)
    outside = torch.ones(140, dtype=torch.bool, device=device).index_fill_(0, index, False)
    assert not gx[:, outside].any()
    assert not gw[outside].any()
    eps = 8 * torch.finfo(dtype).eps  # autograd's own products are the twins bounded above
    assert (gx - wide_x.grad).norm() <= eps * wide_x.grad.norm()
    assert (gw - wide_w.grad).norm() <= eps * wide_w.grad.norm()


@pytest.mark.usefixtures("way")
def test_what_is_not_drawn_is_not_read(device, assert_as_good_as_eager):
    x, w, bias = operands(5, 140, 7, torch.float32, device)
    grad, index = torch.randn(5, 7, device=device), torch.tensor([3, 139, 4], device=device)
    undrawn = torch.ones(140, dtype=torch.bool, device=device).index_fill_(0, index, False)
    x[:, undrawn], w[undrawn] = float("nan"), float("nan")
    assert_as_good_as_eager(sampled.sampled_mm(x, w, index, bias), x[:, index], w[index], bias)
    gx = sampled.sampled_mm_grad_input(grad, w, index)
    assert_as_good_as_eager(gx[:, index], grad, w[index].T)


@pytest.mark.usefixtures("way")
def test_any_strides(device, assert_as_good_as_eager):
    x, w, bias = operands(37, 72, 44, torch.float32, device)
    grad = torch.randn(37, 44, device=device)
    index = torch.randperm(72, device=device)[:39]
    strided = index.repeat_interleave(2)[::2]
    xs, ws = x[:, index], w[index]
    y = sampled.sampled_mm(hidden(x.T).T, hidden(w.T).T, strided, hidden(bias[None])[0])
    assert_as_good_as_eager(y, xs, ws, bias)
    gx = sampled.sampled_mm_grad_input(hidden(grad), hidden(w), strided)
    assert_as_good_as_eager(gx[:, index], grad, ws.T)
    gw = sampled.sampled_mm_grad_weight(hidden(xs), hidden(grad.T).T, strided, 72, False)
    assert_as_good_as_eager(gw[index], xs.T, grad)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("rows", "k", "cols"), [(0, 3, 4), (3, 3, 0), (3, 0, 4), (0, 0, 0)])
@pytest.mark.parametrize("biased", [True, False])
def test_empty(rows, k, cols, biased, device):
    x, w, bias = operands(rows, 6, cols, torch.float32, device)
    index = torch.arange(k, device=device)
    y = sampled.sampled_mm(x, w, index, bias if biased else None)
    if not rows * cols * k:
        assert torch.equal(y, bias.expand(rows, cols) if biased else torch.zeros(rows, cols).to(y))
    gx = sampled.sampled_mm_grad_input(x.new_ones(rows, cols), w, index)
    gw = sampled.sampled_mm_grad_weight(x[:, index], x.new_ones(rows, cols), index, 6, False)
    assert torch.equal(gx, torch.zeros(rows, 6).to(gx))
    assert torch.equal(gw, torch.zeros(6, cols).to(gw))


def double(arguments):
    wide = torch.Tensor.double
    return [wide(a) if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]


def assert_means(op, *arguments):
    """Bound a launcher's error by the meaning in float64: eager's own worst, and four roundings."""
    got, reference = getattr(sampled, op)(*arguments), ops.REFERENCES[getattr(ops, op)]
    twin, eager = reference(*double(arguments)), reference(*arguments)
    size = reference(*[a.abs() if torch.is_tensor(a) else a for a in double(arguments)])
    bound = (eager.double() - twin).abs().max() if twin.numel() else 0
    bound = bound + 4 * torch.finfo(eager.dtype).eps * size
    assert (got.shape, got.dtype) == (eager.shape, eager.dtype)
    assert got.stride() == eager.stride() or not got.numel()
    assert ((got.double() - twin).abs() <= bound).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rest", [True, False])
def test_scaled_and_stood_in_for(dtype, scaled, rest, device):
    x, w, bias = operands(33, 40, 19, dtype, device)
    x, w = x + 1, w + 1  # means that matter
    grad = torch.randn(33, 19, dtype=dtype, device=device)
    index = torch.tensor([3, 39, 0, 17, 8], device=device)
    scale = torch.tensor([1 / 3, 0, 7, 1.5, 0.1], device=device) if scaled else None
    strided = None if scale is None else scale.repeat_interleave(2)[::2]
    assert_means("sampled_mm", x, w, index, bias, scale, rest)
    assert_means("sampled_mm", hidden(x.T).T, hidden(w), index, None, strided, rest)
    assert_means("sampled_mm_grad_input", grad, w, index, scale, rest)
    assert_means("sampled_mm_grad_input", hidden(grad), hidden(w.T).T, index, strided, rest)
    xs = ops.gather_columns(x, index, scale, rest)
    for transposed in (True, False):
        assert_means("sampled_mm_grad_weight", xs, grad, index, 40, transposed, rest)
    assert_means("sampled_mm_grad_weight", hidden(xs.T).T, hidden(grad), index, 40, True, rest)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", [True, False])
def test_rows_of_a_gradient(dtype, rest, device):
    x, _, _ = operands(40, 33, 1, dtype, device)
    grad = torch.randn(40, 19, dtype=dtype, device=device) + 1
    index = torch.tensor([3, 39, 0, 17, 8], device=device)
    xs = ops.gather_rows(x, index, torch.rand(5, device=device), rest)
    for transposed in (True, False):
        assert_means("sampled_mm_weight", xs, grad, index, transposed, rest)
    assert_means("sampled_mm_weight", hidden(xs), hidden(grad.T).T, index, False, rest)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("rows", "k", "cols"), [(0, 3, 4), (3, 3, 0), (3, 0, 4), (3, 6, 4)])
def test_nothing_or_nobody_to_stand_for(rows, k, cols, device):
    x, w, _ = operands(rows, 6, cols, torch.float32, device)
    grad, index = torch.randn(rows, cols, device=device), torch.arange(k, device=device)
    assert_means("sampled_mm", x, w, index, None, torch.rand(k, device=device), True)
    assert_means("sampled_mm_grad_input", grad, w, index, None, True)
    xs = ops.gather_columns(x, index, None, True)
    assert_means("sampled_mm_grad_weight", xs, grad, index, 6, False, True)
    tokens = index[:rows]
    xs = ops.gather_rows(x, tokens, None, True)
    assert_means("sampled_mm_weight", xs, grad, tokens, True, True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's: NaN
@pytest.mark.usefixtures("way")
def test_what_is_not_finite_spreads_as_the_reference_says(device):
    x, w, _ = operands(5, 9, 4, torch.float32, device)
    grad, index = torch.randn(5, 4, device=device), torch.tensor([2, 7], device=device)
    x[1, 4], x[3, 2], w[0, 1], grad[2, 3] = float("nan"), float("inf"), float("inf"), float("nan")
    scale = torch.tensor([0.0, 1.0], device=device)
    xs = ops.gather_columns(x, index, scale, True)
    for op, *arguments in [
        ("sampled_mm", x, w, index, None, scale, True),
        ("sampled_mm_grad_input", grad, w, index, scale, True),
        ("sampled_mm_grad_weight", xs, grad, index, 9, False, True),
        ("sampled_mm_weight", xs, grad.repeat(2, 1), torch.arange(4, device=device), False, True),
    ]:
        twin = ops.REFERENCES[getattr(ops, op)](*arguments)
        assert not twin.isfinite().all()
        torch.testing.assert_close(getattr(sampled, op)(*arguments), twin, equal_nan=True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [True, False])
def test_launchers_agree_with_the_ops(dtype, transposed, device):
    x, w, bias = operands(5, 12, 7, dtype, device)
    index, grad = (
        torch.tensor([1, 4, 11], device=device),
        torch.randn(5, 7, device=device).to(dtype),
    )
    for op, *arguments in [
        ("sampled_mm", x, w, index, bias),
        ("sampled_mm_grad_input", grad, w, index),
        ("sampled_mm_grad_weight", x[:, index], grad, index, 12, transposed),
        ("sampled_mm_weight", x[:3], grad, index[:1].repeat(3), transposed),
    ]:
        twin = ops.REFERENCES[getattr(ops, op)](*arguments)
        torch.testing.assert_close(getattr(sampled, op)(*arguments), twin)


def refuse(*_, **__):
    raise AssertionError("a kernel was launched")


def test_what_takes_the_reference(device, monkeypatch):
    for name in ("fused", "scattered", "taken", "_others", "_weighted"):
        monkeypatch.setattr(sampled, name, refuse)
    x, w, bias = operands(5, 12, 7, torch.float64, device)
    grad, index = torch.randn(5, 7, dtype=torch.float64, device=device), torch.arange(3).to(device)
    scale, xs = torch.rand(3, dtype=torch.float64, device=device), x[:, :4]
    narrow = x.float(), w.float(), grad.float()
    for op, *arguments in [
        ("sampled_mm", x, w, index, bias, scale, True),
        ("sampled_mm", narrow[0], narrow[1], index, None, scale, True),
        ("sampled_mm_grad_input", grad, w, index, scale, True),
        ("sampled_mm_grad_input", narrow[2], narrow[1], index, scale, True),
        ("sampled_mm_grad_weight", xs, grad, index, 12, True, True),
        ("sampled_mm_weight", x[:4], grad, index, False, True),
    ]:
        twin = ops.REFERENCES[getattr(ops, op)](*arguments)
        assert torch.equal(getattr(sampled, op)(*arguments), twin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [True, False])
def test_copies_are_padded_and_lie_as_their_source(dtype, turned, device):
    x = torch.randn(70, 80, dtype=dtype, device=device)
    index, scale = torch.randperm(80, device=device)[:65], torch.rand(65, device=device)
    given = hidden(x.T).T if turned else hidden(x)
    y = sampled.taken(given, index, scale, given[:, 3])
    twin = (x[:, index] * scale).to(dtype)  # the interpreter cuts bfloat16 off instead of rounding
    torch.testing.assert_close(y[:, :65], twin, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(y[:, 65], x[:, 3])
    assert not y[:, 66:].any()
    assert (y.shape, y.stride()) == ((70, 72), (1, 70) if turned else (72, 1))
    plain = sampled.taken(given, index, multiple=1)
    assert torch.equal(plain, x[:, index])
    assert sampled.taken(given, index[:0]).shape == (70, 0)


def test_columns_that_lie_as_rows_are_weighed_as_rows(device, monkeypatch):
    asked = []
    monkeypatch.setattr(sampled._tiles, "columns_in_gemm", lambda *_: asked.append("columns"))
    monkeypatch.setattr(sampled._tiles, "rows_in_gemm", lambda *_, copies: asked.append("rows"))
    x, w, _ = operands(5, 12, 7, torch.float32, device)
    for one in (x, x.T.contiguous().T):
        sampled.sampled_mm(one, w, torch.arange(3, device=device), None)
    assert asked == ["columns", "rows"]


def test_sizes_that_differ_are_named(device):
    x, w, bias = operands(5, 12, 7, torch.float32, device)
    index = torch.tensor([1, 11, 4], device=device)
    with pytest.raises(ValueError, match=r"x \[12, 5\] @ w \[12, 7\]: K differs"):
        sampled.fused(x.T, w, index, bias)
    with pytest.raises(ValueError, match=r"\[5, 12\] @ \[12, 7\] into 3 columns"):
        sampled.scattered(x, w, index, x, gather=False)
