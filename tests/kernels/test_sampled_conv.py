"""Sampled convolutions and their four gradients: the kernels against float64 twins."""

import pytest
import torch

from sparsefx import ops
from sparsefx.kernels.sampled_conv import triton as sampled

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = [
    *("sampled_conv", "sampled_conv_grad_input", "sampled_conv_grad_weight"),
    *("sampled_conv_input", "sampled_conv_weight"),
]
GEOMETRIES = {  # x, w, (stride, padding, dilation, groups)
    "plain": ((2, 8, 4, 3), (6, 8, 2, 2), ((1, 1), (1, 1), (1, 1), 1)),
    "strided": ((3, 8, 7, 6), (12, 4, 2, 2), ((2, 3), (1, 2), (3, 2), 2)),
    "points": ((2, 6, 3, 5), (5, 6, 1, 1), ((2, 1), (0, 0), (1, 1), 1)),
    "gaps": ((2, 4, 7, 6), (4, 4, 1, 2), ((4, 3), (0, 0), (1, 1), 1)),
    "tiles": ((2, 40, 7, 4), (34, 40, 1, 2), ((1, 1), (0, 1), (1, 1), 1)),
}


@pytest.fixture
def inside(monkeypatch):
    """Have the tiles choose the kernel at every size."""
    monkeypatch.setattr(sampled._tiles, "gathers_in_conv", lambda *shape: True)


@pytest.fixture(params=[1, 3])
def splits(request, monkeypatch):
    monkeypatch.setattr(sampled._tiles, "conv_weight_splits", lambda *shape: request.param)


def picked(groups, size, k):
    return torch.stack([torch.randperm(size)[:k] for _ in range(groups)])


def operands(name, dtype, device, layout=torch.contiguous_format):
    """Arguments of each op; what is drawn comes in any order."""
    x_size, w_size, where = GEOMETRIES[name]
    groups, deep = where[3], 33 if name == "tiles" else 3
    sides = sampled.geometry.result_size(x_size, w_size, where)
    x, w, grad = (
        torch.randn(size).to(device, dtype, memory_format=layout)
        for size in (x_size, w_size, sides)
    )
    bias = torch.randn(w_size[0]).to(x)
    inner = picked(groups, w_size[1], deep).to(device)
    outer = picked(groups, w_size[0] // groups, deep).to(device)
    examples = picked(1, x_size[0], 2).to(device)
    xs = ops.gather_channels(x, inner)
    return {
        "sampled_conv": (x, w, inner, bias, *where),
        "sampled_conv_grad_input": (grad, w, inner, x_size, *where),
        "sampled_conv_grad_weight": (xs, grad, inner, w_size, *where),
        "sampled_conv_input": (grad, w, outer, x_size, *where),
        "sampled_conv_weight": (grad, x, examples, w_size, *where),
    }


def mapped(arguments, change):
    """The arguments, their floating-point tensors changed."""
    return [
        change(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    ]


def check(op, arguments, shown=None):
    """Bound the error by a float32 sum's in any order, one rounding, and eager's own error."""
    reference = ops.REFERENCES[getattr(ops, op)]
    got, eager = getattr(sampled, op)(*(shown or arguments)), reference(*(shown or arguments))
    twin = reference(*mapped(arguments, torch.Tensor.double))
    size = reference(*mapped(arguments, lambda t: t.double().abs()))
    terms = arguments[0].numel() if "weight" in op else arguments[1].numel()  # no sum has more
    info = torch.finfo(got.dtype)
    bound = (eager.double() - twin).abs().max() + info.eps * twin.abs()
    bound = bound + (terms + 2) * torch.finfo(torch.float32).eps * size + info.smallest_normal
    assert got.dtype == arguments[0].dtype
    assert got.stride() == eager.stride()
    assert ((got.double() - twin).abs() <= bound).all()
    return got


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("name", ["plain", "strided", "points", "gaps"])
@pytest.mark.parametrize("op", OPS[:2] + OPS[3:4])
def test_products(name, op, device):
    check(op, operands(name, torch.float32, device)[op])


@pytest.mark.usefixtures("inside", "splits")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["plain", "strided", "points"])
def test_gradients_of_the_weight(name, layout, device):
    calls = operands(name, torch.float32, device, layout)
    check("sampled_conv_grad_weight", calls["sampled_conv_grad_weight"])
    grad, x, examples, *rest = calls["sampled_conv_weight"]
    check("sampled_conv_weight", (grad, x, examples, *rest))
    xs = x[examples[0]].to(memory_format=layout)
    check("sampled_conv_weight", (grad, xs, examples, *rest, None, False, True))


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_dtypes(op, dtype, device):
    name = "tiles" if dtype is torch.float32 else "points"  # several tiles a side
    check(op, operands(name, dtype, device, torch.channels_last)[op])


def hidden(t):
    """The same values strided inside a larger NaN buffer: any read outside the view shows."""
    size = [2 * side + 3 for side in t.shape]
    buffer = torch.full(size, float("nan")).to(t) if t.is_floating_point() else t.new_ones(size)
    return buffer[tuple(slice(1, 2 * side + 1, 2) for side in t.shape)].copy_(t)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("op", OPS)
def test_any_strides(op, device):
    arguments = operands("points", torch.float32, device)[op]
    check(op, arguments, [hidden(a) if isinstance(a, torch.Tensor) else a for a in arguments])


@pytest.mark.usefixtures("inside")
def test_what_is_not_drawn_is_not_read(device):
    calls = operands("plain", torch.float32, device)
    x, w, index, *rest = calls["sampled_conv"]
    undrawn = torch.ones(8, dtype=torch.bool, device=device).index_fill_(0, index[0], False)
    twin = sampled.sampled_conv(x, w, index, *rest)
    x[:, undrawn], w[:, undrawn] = float("nan"), float("nan")
    assert torch.equal(sampled.sampled_conv(x, w, index, *rest), twin)
    grad, _, _, *rest = calls["sampled_conv_grad_input"]
    gx = sampled.sampled_conv_grad_input(grad, w, index, *rest)
    assert gx[:, index[0]].isfinite().all()
    assert not gx[:, undrawn].any()


@pytest.mark.usefixtures("inside")
def test_a_repeated_channel_counts_again(device):
    x, w, _, *rest = operands("plain", torch.float32, device)["sampled_conv"]
    index = torch.tensor([[5, 5, 0]], device=device)
    check("sampled_conv", (x, w, index, *rest))


CHANGES = {  # of the arguments by position, given (op, arguments)
    "float64": lambda op, a: mapped(a, torch.Tensor.double),
    "rest": lambda op, a: [*a, True] if op == "sampled_conv_grad_weight" else [*a, None, True],
    "large": lambda op, a: list(a),  # the tiles say so
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", OPS)
def test_what_is_left_to_the_reference(op, change, monkeypatch, device):
    monkeypatch.setattr(sampled, "fused", None)  # a call would raise
    monkeypatch.setattr(sampled, "weight_sums", None)
    monkeypatch.setattr(sampled._tiles, "gathers_in_conv", lambda *shape: change != "large")
    arguments = operands("plain", torch.float32, device)[op]
    if change == "rest" and op == "sampled_conv_grad_weight":
        _, grad, index, *rest = arguments
        x = operands("plain", torch.float32, device)["sampled_conv"][0]
        arguments = ops.gather_channels(x, index, None, True), grad, index, *rest
    call = CHANGES[change](op, arguments)
    twin = ops.REFERENCES[getattr(ops, op)](*call)
    assert torch.equal(getattr(sampled, op)(*call), twin)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("op", OPS)
def test_other_axes_are_left_to_the_reference(op, axes, monkeypatch, device):
    monkeypatch.setattr(sampled, "fused", None)  # a call would raise
    monkeypatch.setattr(sampled, "weight_sums", None)

    def shaped(a):
        if isinstance(a, torch.Tensor) and a.dim() == 4:
            return a[..., 0] if axes == 1 else a[..., None]
        if isinstance(a, tuple):
            return {2: a[:axes] + a[:1] * (axes - 2), 4: (*a[:3], *a[3:], 1)[: 2 + axes]}[len(a)]
        return a

    call = [shaped(a) for a in operands("points", torch.float32, device)[op]]
    assert torch.equal(getattr(sampled, op)(*call), ops.REFERENCES[getattr(ops, op)](*call))


@pytest.mark.usefixtures("inside")
def test_nothing_drawn_and_no_images(device):
    x, w, index, bias, *where = operands("plain", torch.float32, device)["sampled_conv"]
    y = sampled.sampled_conv(x[:0], w, index, bias, *where)
    assert y.shape == (0, 6, 5, 4)
    grad = torch.ones(2, 6, 5, 4, device=device)
    gx = sampled.sampled_conv_grad_input(grad[:0], w, index, (0, 8, 4, 3), *where)
    gw = sampled.sampled_conv_weight(grad[:0], x[:0], index[:, :0], w.shape, *where)
    assert gx.shape == (0, 8, 4, 3)
    assert not gw.any()


@pytest.mark.usefixtures("inside")
def test_what_is_wrong_is_said_by_the_reference(device):
    x, w, index, bias, *where = operands("plain", torch.float32, device)["sampled_conv"]
    with pytest.raises(RuntimeError, match="type"):
        sampled.sampled_conv(x, w.half(), index, None, *where)
    with pytest.raises(RuntimeError, match="size"):
        sampled.sampled_conv(x[:, :, :1, :1], w, index, bias, (1, 1), (0, 0), (1, 1), 1)


def test_small_images_gather_inside_and_large_ones_outside():
    inside, share = sampled._tiles.gathers_in_conv, sampled._tiles.COLUMNS_SHARE
    assert inside(49, 128, 64 * 9, 1, 2, 64 * 49, 2, share)
    assert not inside(64 * 28 * 28, 512, 256 * 9, 1, 2, 64 * 28 * 28 * 256, 2, share)
    assert sampled._tiles.conv_weight_splits(1, 1 << 20, 64, sampled._tiles.Chip()) == 264
    assert sampled._tiles.conv_weight_splits(300, 1 << 20, 64, sampled._tiles.Chip()) == 1
    assert sampled._tiles.conv_weight_splits(1, 64, 64, sampled._tiles.Chip()) == 1
