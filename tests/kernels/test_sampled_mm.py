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
@pytest.mark.parametrize("drawn", ["sorted", "unsorted", "all"])
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
    ]:
        twin = ops.REFERENCES[getattr(ops, op)](*arguments)
        torch.testing.assert_close(getattr(sampled, op)(*arguments), twin)


def test_sizes_that_differ_are_named(device):
    x, w, bias = operands(5, 12, 7, torch.float32, device)
    index = torch.tensor([1, 11, 4], device=device)
    with pytest.raises(ValueError, match=r"x \[12, 5\] @ w \[12, 7\]: K differs"):
        sampled.fused(x.T, w, index, bias)
    with pytest.raises(ValueError, match=r"\[5, 12\] @ \[12, 7\] into 3 columns"):
        sampled.scattered(x, w, index, x, gather=False)
