"""2-d convolutions over sampled channels, and their gradients: gathered and scattered inside.

Meaning: sparsefx/ops/sampled_conv.py.  Tiles, and which way: kernels/_tiles.py.  Why: README.md.
Indices lie in 0..channels - 1; the gradients by x and w need them unique.
"""

import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.kernels.nm_conv import geometry
from sparsefx.kernels.nm_conv.geometry import Ints, Where
from sparsefx.kernels.sampled_conv.triton.products import fused
from sparsefx.kernels.sampled_conv.triton.weights import weight_sums


def sampled_conv(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Convolve the channels indices [groups, k] of x with those of w, add bias, sum in float32.

    Anything but 2 spatial axes, float64, mixed dtypes, filters of one channel, empty tensors,
    pairs that are scaled or stood in for, and large shapes take the reference: gathered copies and
    the library's convolution.

    Args:
        x: [batch, in, H, W], any strides.
        w: [out, in / groups, KH, KW], any strides.
        indices: [groups, k], positions within each group, any order, repeats count again.
        bias: [out] or None.
        stride: Of the two spatial axes, as the next two.
        padding: Zeros on either side.
        dilation: Between taps.
        groups: Of the convolution.
        scale: Leaves it to the reference, unless None.
        rest: Leaves it to the reference, if true.

    Returns:
        [batch, out, OH, OW] in x's dtype, contiguous.
    """
    where = stride, padding, dilation, groups
    size = geometry.result_size(x.shape, w.shape, where)
    if scale is None and not rest and _served(x.shape, w, size, where, indices, x, bias):
        k, (out, per_group, *_) = indices.shape[1], w.shape
        shape = _pixels_of(size), out // groups, k * _taps(w.shape), groups, x.itemsize
        moved = (x.numel() + w.numel()) * k // per_group
        if _tiles.gathers_in_conv(*shape, moved, 2, _tiles.COLUMNS_SHARE):
            return fused(x, w, indices, bias, where, size)
    arguments = x, w, indices, bias, *where, scale, rest
    return ops.REFERENCES[ops.sampled_conv](*arguments)


def sampled_conv_grad_input(
    grad: Tensor, w: Tensor, indices: Tensor, input_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Return sampled_conv's gradient by x: zeros, but for channels indices [groups, k], unique.

    Served as sampled_conv is; [batch, in, H, W] in grad's dtype, contiguous.
    """
    where = stride, padding, dilation, groups
    served = _served(input_size, w, grad.shape, where, indices, grad, None)
    if scale is None and not rest and served:
        k, (out, per_group, *_) = indices.shape[1], w.shape
        shape = _pixels_of(grad.shape), k, out // groups * _taps(w.shape), groups, grad.itemsize
        moved = w.numel() * k // per_group + _pixels_of(input_size) * groups * k
        if _tiles.gathers_in_conv(*shape, moved, 2, _tiles.CONV_SHARE):
            return fused(grad, w, indices, None, where, input_size, back=True, columns=True)
    arguments = grad, w, indices, input_size, *where, scale, rest
    return ops.REFERENCES[ops.sampled_conv_grad_input](*arguments)


def sampled_conv_input(
    grad: Tensor, w: Tensor, indices: Tensor, input_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Return a convolution's gradient by x, summed over filters indices [groups, k] alone.

    Served as sampled_conv is; [batch, in, H, W] in grad's dtype, contiguous.
    """
    where = stride, padding, dilation, groups
    served = _served(input_size, w, grad.shape, where, indices, grad, None)
    if scale is None and not rest and served:
        k, (out, per_group, *_) = indices.shape[1], w.shape
        shape = _pixels_of(grad.shape), per_group, k * _taps(w.shape), groups, grad.itemsize
        moved = (grad.numel() + w.numel()) * k * groups // out
        if _tiles.gathers_in_conv(*shape, moved, 2, _tiles.COLUMNS_SHARE):
            return fused(grad, w, indices, None, where, input_size, back=True)
    arguments = grad, w, indices, input_size, *where, scale, rest
    return ops.REFERENCES[ops.sampled_conv_input](*arguments)


def sampled_conv_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, weight_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Return sampled_conv's gradient by w, zero but for the channels indices [groups, k], unique.

    Served as sampled_conv is; xs [batch, groups * k, H, W] are the sampled channels of x.
    """
    where, (out, _, *taps) = (stride, padding, dilation, groups), weight_size
    arguments = xs, grad, indices, weight_size, *where, rest
    reference = ops.REFERENCES[ops.sampled_conv_grad_weight]
    if rest or len(xs) != len(grad) or not _drawn(indices, groups):
        return reference(*arguments)
    size = [out, indices.shape[1], *taps]  # of the part that is not zero
    if not _adds_to_weight(xs, grad, size, where):
        return reference(*arguments)
    shape = out // groups, size[1] * _taps(size), _pixels_of(grad.shape), groups, xs.itemsize
    if not _tiles.gathers_in_conv(*shape, out * size[1] * _taps(size), 1, _tiles.CONV_SHARE):
        return reference(*arguments)
    y = xs.new_zeros(weight_size)
    return weight_sums(xs, grad, y, size[1], where, columns=indices)


def sampled_conv_weight(
    grad: Tensor, x: Tensor, indices: Tensor, weight_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
    gathered: bool = False,
) -> Tensor:  # fmt: skip
    """Return a convolution's gradient by w, summed over the examples indices [1, k] alone.

    Served as sampled_conv is; ``gathered`` says that x holds those examples and no others.
    """
    where = stride, padding, dilation, groups
    arguments = grad, x, indices, weight_size, *where, scale, rest, gathered
    reference = ops.REFERENCES[ops.sampled_conv_weight]
    known = scale is None and not rest and _drawn(indices, 1)
    examples = len(x) == (indices.shape[-1] if gathered else len(grad))
    if not known or not examples or not _adds_to_weight(x, grad, weight_size, where):
        return reference(*arguments)
    out, per_group, k = *weight_size[:2], indices.shape[1]
    depth = k * _pixels_of(grad.shape) // len(grad)
    shape = out // groups, per_group * _taps(weight_size), depth, groups, x.itemsize
    each, launches = (0, 1) if gathered else (x[0].numel(), 2)
    moved = k * (grad[0].numel() + each)
    if not _tiles.gathers_in_conv(*shape, moved, launches, _tiles.CONV_SHARE):
        return reference(*arguments)
    memory = torch.contiguous_format
    if gathered:  # the reference copies examples into contiguous memory, else
        like = x.new_empty(()).expand(weight_size)
        memory = geometry.layout(tuple(weight_size), x, lambda: like, False, [0, 0], where)
    y = geometry.new(x, weight_size, memory)
    return weight_sums(x, grad, y, per_group, where, examples=indices[0], gathered=gathered)


def _drawn(indices: Tensor, groups: int) -> bool:
    return indices.dim() == 2 and len(indices) == groups and indices.shape[1] > 0


def _served(
    image: Ints, w: Tensor, result: Ints, where: Where, indices: Tensor, x: Tensor,
    bias: Tensor | None,
) -> bool:  # fmt: skip
    sizes = geometry.served(image, w.shape, result, where) and _drawn(indices, where[3])
    return sizes and geometry.adds_up(w.shape[0], bias, x, w)


def _adds_to_weight(x: Tensor, grad: Tensor, size: Ints, where: Where) -> bool:
    """Whether x and grad give a weight's gradient of this size, as far as their images go."""
    image, result = [1, *x.shape[1:]], [1, *grad.shape[1:]]
    sizes = min(len(x), len(grad)) > 0 and geometry.served(image, size, result, where)
    return sizes and _pixels_of(grad.shape) < 1 << 30 and geometry.adds_up(size[0], None, x, grad)


def _pixels_of(size: Ints) -> int:
    """Of all images [batch, channels, high, wide]."""
    return size[0] * size[2] * size[3]


def _taps(size: Ints) -> int:
    return size[2] * size[3]
