"""nm_conv, masked_conv and their grad_inputs: both ways against a float64 twin, odd geometries."""

import pytest
import torch

from sparsefx import ops
from sparsefx.errors import MaskError
from sparsefx.kernels.nm_conv import triton as nm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = ["nm_conv", "masked_conv", "nm_conv_grad_input", "masked_conv_grad_input"]
GEOMETRIES = {  # x, w, (stride, padding, dilation, groups), pattern
    "plain": ((2, 8, 4, 3), (6, 8, 2, 2), ((1, 1), (1, 1), (1, 1), 1), (2, 4, 1)),
    "strided": ((1, 8, 7, 6), (12, 4, 2, 2), ((2, 3), (1, 2), (3, 2), 2), (1, 2, 0)),
    "points": ((3, 6, 3, 5), (5, 6, 1, 1), ((2, 1), (0, 0), (1, 1), 1), (2, 3, 1)),
    "tiles": ((1, 20, 9, 7), (34, 20, 1, 2), ((1, 1), (0, 1), (1, 1), 1), (3, 4, -3)),
    "gaps": ((1, 4, 7, 6), (4, 4, 1, 2), ((4, 3), (0, 0), (1, 1), 1), (1, 2, 1)),
    "even": ((2, 4, 5, 3), (4, 2, 3, 1), ((2, 1), (1, 0), (2, 1), 2), (1, 2, 1)),
}


@pytest.fixture(params=[True, False], ids=["fused", "copied"])
def way(request, monkeypatch):
    """Have the tiles choose one way at every size; the other one would raise."""
    monkeypatch.setattr(nm._tiles, "mask_in_conv", lambda *shape: request.param)
    monkeypatch.setattr(nm, "copied" if request.param else "fused", None)
    return request.param


def hidden(t):
    """The same values strided inside a larger NaN buffer: any read outside the view shows."""
    size = [2 * side + 3 for side in t.shape]
    buffer = torch.full(size, float("nan")).to(t) if t.is_floating_point() else t.new_ones(size)
    return buffer[tuple(slice(1, 2 * side + 1, 2) for side in t.shape)].copy_(t)


def operands(name, dtype, device, layout=torch.contiguous_format):
    x_size, w_size, where, pattern = GEOMETRIES[name]
    x = torch.randn(x_size).to(device, dtype, memory_format=layout)
    w = torch.randn(w_size).to(device, dtype, memory_format=layout)
    bias, mask = torch.randn(w_size[0]).to(x), torch.rand(w_size, device=device) < 0.5
    sides = nm.geometry.result_size(x_size, w_size, where)
    grad = torch.randn(sides).to(device, dtype, memory_format=layout)
    return {
        "nm_conv": (x, w, bias, *where, *pattern, False),
        "masked_conv": (x, w, mask, bias, *where),
        "nm_conv_grad_input": (grad, w, x_size, *where, *pattern, False),
        "masked_conv_grad_input": (grad, w, mask, x_size, *where),
    }


def twins(op, arguments):
    """The op in float64, of the values and of their magnitudes; a weight ranks alike in both."""
    reference = ops.REFERENCES[getattr(ops, op)]
    floats = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    sizes = [
        f.abs() if isinstance(f, torch.Tensor) and f.is_floating_point() else f for f in floats
    ]
    return reference(*floats), reference(*sizes)


def check(op, arguments, shown=None):
    """Bound the error by a float32 sum's in any order, one rounding, and eager's own error."""
    x, w = arguments[:2]
    got = getattr(nm, op)(*(shown or arguments))
    eager = ops.REFERENCES[getattr(ops, op)](*(shown or arguments))
    twin, size = twins(op, arguments)
    terms = w[0].numel() if "grad" not in op else w[:, 0].numel()
    info = torch.finfo(x.dtype)
    bound = (eager.double() - twin).abs().max() + info.eps * twin.abs()
    bound = bound + (terms + 2) * torch.finfo(torch.float32).eps * size + info.smallest_normal
    assert got.dtype == x.dtype
    assert got.stride() == eager.stride()
    assert ((got.double() - twin).abs() <= bound).all()


@pytest.mark.parametrize("name", ["plain", "strided", "points", "gaps", "even"])
def test_ranked(name, way, device):
    calls = operands(name, torch.float32, device)
    check("nm_conv", calls["nm_conv"])
    check("nm_conv_grad_input", calls["nm_conv_grad_input"])


@pytest.mark.parametrize("name", ["strided", "points", "even"])
def test_stored(name, way, device):
    calls = operands(name, torch.float32, device, torch.channels_last)
    check("masked_conv", calls["masked_conv"])
    check("masked_conv_grad_input", calls["masked_conv_grad_input"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, way, device):
    name = "tiles" if dtype is torch.float32 else "points"  # several tiles a side
    calls = operands(name, dtype, device, torch.channels_last)
    for op in ("nm_conv", "masked_conv_grad_input"):
        check(op, calls[op])


@pytest.mark.parametrize("op", OPS)
def test_any_strides(op, way, device):
    arguments = operands("even", torch.float32, device)[op]
    shown = [hidden(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    check(op, arguments, shown)


# numpy, under the interpreter, remarks on the infinity times zero that this test is about
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("pattern", [(1, 2, 0), (2, 4, 1), (3, 4, 1)])
def test_ties_and_nan_rank_as_the_mask_says(pattern, way, device):
    """A product by one of 1 x 1 filters is the filters: equal bits, or nothing is equal."""
    levels = torch.tensor([-1.0, 0.0, 1.0, 2.0, -2.0, float("nan"), float("inf")], device=device)
    w = levels[torch.randint(5, (8, 8, 2, 1), device=device)]
    x = torch.eye(8, device=device)[:, :, None, None]
    w_nan = levels[torch.randint(7, (8, 8, 1, 1), device=device)]
    where = (1, 1), (1, 0), (1, 1), 1
    y = nm.nm_conv(x, w, None, *where, *pattern, False)
    assert torch.equal(y, ops.REFERENCES[ops.nm_conv](x, w, None, *where, *pattern, False))
    kept = nm.masked_filters(w_nan, *pattern)
    mask = ops.nm_mask(w_nan, *pattern, False)
    torch.testing.assert_close(kept, w_nan.masked_fill(~mask, 0), equal_nan=True, rtol=0, atol=0)
    point = x[:1] * 0 + 1
    y = nm.nm_conv(point, w_nan, None, (1, 1), (0, 0), (1, 1), 1, *pattern, False)
    assert torch.equal(y.isfinite()[0, :, 0, 0], kept.isfinite().all(1)[:, 0, 0])


def test_what_a_mask_drops_is_not_read_into_sums(device):
    x, w, mask, bias, *where = operands("plain", torch.float32, device)["masked_conv"]
    spoilt = w.masked_fill(~mask, float("nan"))
    whole = nm.fused(x, w, mask, bias, tuple(where))
    assert torch.equal(nm.fused(x, spoilt, mask, bias, tuple(where)), whole)


def changed(*operands, **rest):
    """What differs from the call below: its first operands, and others by their names."""
    return dict(enumerate(operands)) | {PLACES[name]: value for name, value in rest.items()}


PLACES = {"padding": 4, "groups": 6, "m": 8, "dim": 9, "transposable": 10}
LEFT = {
    "float64": lambda x, w: changed(x.double(), w.double()),
    "transposable": lambda x, w: changed(transposable=True),
    "line": lambda x, w: changed(x[..., 0], w[..., 0], None, [1], [0], [1]),
    "volume": lambda x, w: changed(x[..., None], w[..., None], None, [1] * 3, [0] * 3, [1] * 3),
    "a channel a filter": lambda x, w: changed(x, w[:, :1], groups=8, dim=0),
    "spanning groups": lambda x, w: changed(x, w[:, :2], groups=4, dim=0),
    "along taps": lambda x, w: changed(x, w.repeat(1, 1, 1, 2), padding=[1, 1], dim=3),
    "of 64": lambda x, w: changed(x.repeat(1, 8, 1, 1), w.repeat(1, 8, 1, 1), m=64),
    "no images": lambda x, w: changed(x[:0]),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_the_reference(name, monkeypatch, device):
    monkeypatch.setattr(nm, "fused", None)  # a call would raise
    monkeypatch.setattr(nm, "copied", None)
    x, w = torch.randn(2, 8, 4, 3, device=device), torch.randn(8, 8, 2, 2, device=device)
    call = [x, w, None, [1, 1], [0, 0], [1, 1], 1, 2, 4, 1, False]
    for place, value in LEFT[name](x, w).items():
        call[place] = value
    y = nm.nm_conv(*call)
    torch.testing.assert_close(y, ops.REFERENCES[ops.nm_conv](*call))
    x, w, _, *where = call[:7]
    gradient = torch.ones_like(y), w, x.shape, *where
    if len(x):
        torch.testing.assert_close(
            nm.nm_conv_grad_input(*gradient, *call[7:]),
            ops.REFERENCES[ops.nm_conv_grad_input](*gradient, *call[7:]),
        )


def test_masks_that_broadcast_are_left_to_the_reference(monkeypatch, device):
    monkeypatch.setattr(nm, "fused", None)  # a call would raise
    calls = operands("plain", torch.float32, device)
    for op in ("masked_conv", "masked_conv_grad_input"):
        x, w, mask, *rest = calls[op]
        call = x, w, mask[:1], *rest
        assert torch.equal(getattr(nm, op)(*call), ops.REFERENCES[getattr(ops, op)](*call))


def test_what_is_wrong_is_said_by_the_reference(device):
    x, w, bias, *where, _, _, _, _ = operands("plain", torch.float32, device)["nm_conv"]
    with pytest.raises(MaskError, match="3"):
        nm.nm_conv(x, w, bias, *where, 1, 3, 1, False)
    with pytest.raises(MaskError, match="4"):
        nm.nm_conv(x, w, bias, *where, 4, 4, 1, False)
    with pytest.raises(RuntimeError, match="type"):
        nm.nm_conv(x, w.half(), None, *where, 2, 4, 1, False)
    with pytest.raises(RuntimeError, match="size"):
        nm.nm_conv(x[:, :, :1, :1], w, bias, (1, 1), (0, 0), (1, 1), 1, 2, 4, 1, False)


def test_few_pixels_mask_inside_and_many_outside():
    inside = nm._tiles.mask_in_conv
    assert inside(49, 512, 512 * 9, 512 * 49, 1, 2, (2, 4))
    assert not inside(64 * 56 * 56, 64, 64 * 9, 64 * 56 * 56 * 64, 1, 2, (2, 4))
    assert not inside(64 * 56 * 56, 64, 64 * 9, 64 * 56 * 56 * 64, 1, 4, None)
