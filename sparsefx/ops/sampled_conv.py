"""What sampled convolutions mean: channels, or examples, take the place of rows and columns.

    sampled_conv(x, w, S, bias, *where)             S [groups, k]: input channels of each group
    sampled_conv_grad_input(grad, w, S, ...)        its dL/dx: zero outside the channels S
    sampled_conv_grad_weight(xs, grad, S, ...)      its dL/dw from xs = gather_channels(x, S)
    sampled_conv_input(grad, w, S, ...)             dL/dx, sampled over output channels
    sampled_conv_weight(grad, x, S, ...)            dL/dw, sampled over the batch's examples; from
                                                    x = gather_examples(x, S) where ``gathered``

``where`` is (stride, padding, dilation, groups); ``scale`` and ``rest`` as in gathers.py. Every
group samples equally many channels. The reference is its own fake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx.ops import dense
from sparsefx.ops._define import define, differentiate
from sparsefx.ops.gathers import count_of_others, mean_of_others, outside, scaled
from sparsefx.ops.moves import background, spread
from sparsefx.ops.sampled import PAIRS

aten = torch.ops.aten
Ints = Sequence[int]


def channels_of(indices: Tensor, per_group: int) -> Tensor:
    """Positions within groups [groups, k] -> channels [groups * k]."""
    first = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1) * per_group
    return (indices + first).flatten()


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """[n] -> [1, .., n, .., 1], to multiply ``like`` along ``dim``."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return values.reshape(shape)


def input_channels(
    x: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    """x[:, S] for S [groups, k] of [batch, groups * per_group, *spatial].

    With ``rest`` every group gets one channel more: the sum of its others.
    """
    groups = indices.shape[0]
    per_group = x.shape[1] // groups
    xs = x.index_select(1, channels_of(indices, per_group))
    if scale is not None:
        xs = scaled(xs, _along(scale, xs, 1))
    if not rest:
        return xs
    others = x * _along(outside(indices, per_group, x), x, 1)
    return _with_rest(xs, torch.unflatten(others, 1, (groups, -1)).sum(2), groups)


def _with_rest(picked: Tensor, rest: Tensor, groups: int) -> Tensor:
    """Put one channel [*, groups, ..] behind each group's [*, groups * k, ..], along axis 1."""
    rest = rest.to(picked.dtype)
    if groups == 1:
        return torch.cat([picked, rest], 1)
    each = torch.cat([torch.unflatten(picked, 1, (groups, -1)), rest.unsqueeze(2)], 2)
    return each.flatten(1, 2)


def _weight_inputs(
    w: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    """w[o, S[group of o]]: [groups * out, in, *taps] -> [groups * out, k, *taps].

    With ``rest`` the mean of the other input channels is the last one.
    """
    groups = indices.shape[0]
    if groups == 1:
        ws = w.index_select(1, indices[0])
    else:
        ws = w.gather(1, _each_output(indices, w, indices.shape[1]))
    if scale is not None:
        ws = scaled(ws, _each_filter(scale, w))
    if rest:
        others = (w * _each_filter(outside(indices, w.shape[1], w), w)).sum(1, keepdim=True)
        ws = torch.cat([ws, mean_of_others(others, w, ws, 1)], 1)
    return ws


def _each_filter(values: Tensor, w: Tensor) -> Tensor:
    """[groups, n] -> [groups * out, n, 1, ..], or [1, n, 1, ..] for one group."""
    groups = values.shape[0]
    if groups > 1:
        values = values.repeat_interleave(w.shape[0] // groups, 0)
    return values.view(*values.shape, *[1] * (w.dim() - 2))


def _each_output(indices: Tensor, w: Tensor, k: int) -> Tensor:
    """[groups, k] -> [groups * out, k, *taps]: where each filter's values are."""
    each = indices.repeat_interleave(w.shape[0] // indices.shape[0], 0)
    return each.view(-1, k, *[1] * (w.dim() - 2)).expand(-1, -1, *w.shape[2:])


def output_channels(w: Tensor, indices: Tensor, rest: bool = False) -> Tensor:
    """w[S] for S [groups, k] of [groups * out, in, *taps]; with ``rest`` and each group's mean."""
    groups = indices.shape[0]
    per_group = w.shape[0] // groups
    ws = w.index_select(0, channels_of(indices, per_group))
    if not rest:
        return ws
    others = w * _along(outside(indices, per_group, w), w, 0)
    total = torch.unflatten(others, 0, (groups, -1)).sum(1, keepdim=True)  # [groups, 1, in, *taps]
    mean = (total / count_of_others(per_group, indices.shape[1])).to(w.dtype)
    return torch.cat([torch.unflatten(ws, 0, (groups, -1)), mean], 1).flatten(0, 1)


def examples_of(
    x: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    """x[S] for S [1, k] of [batch, ...]; with ``rest`` the sum of the other examples is last."""
    xs = x.index_select(0, indices[0])
    if scale is not None:
        xs = scaled(xs, _along(scale, xs, 0))
    if rest:
        others = x * _along(outside(indices, x.shape[0], x), x, 0)
        xs = torch.cat([xs, others.sum(0, keepdim=True).to(x.dtype)])
    return xs


def _mean_examples(grad: Tensor, indices: Tensor, rest: bool) -> Tensor:
    gs = grad.index_select(0, indices[0])
    if rest:
        others = grad * _along(outside(indices, grad.shape[0], grad), grad, 0)
        gs = torch.cat([gs, mean_of_others(others.sum(0, keepdim=True), grad, gs, 0)])
    return gs


# --- the products


def _sampled_conv(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    out: Tensor = aten.convolution(
        input_channels(x, indices, scale, rest), _weight_inputs(w, indices, None, rest), bias,
        stride, padding, dilation, False, [0] * len(stride), groups,
    )  # fmt: skip
    return out


def _sampled_conv_grad_input(
    grad: Tensor, w: Tensor, indices: Tensor, input_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    count, k = indices.shape
    size = [input_size[0], count * (k + rest), *input_size[2:]]
    ws = _weight_inputs(w, indices, scale, rest)
    values = dense._grad_input(grad, ws, size, stride, padding, dilation, groups)
    chosen, others = channels_of(indices, w.shape[1]), None
    if rest:
        each = torch.unflatten(values, 1, (count, k + 1))
        values = each[:, :, :k].flatten(1, 2)
        others = each[:, :, k:].expand(-1, -1, w.shape[1], *input_size[2:]).flatten(1, 2)
    return spread(values, chosen, input_size[1], 1, others)


def _sampled_conv_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, weight_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, rest: bool = False,
) -> Tensor:  # fmt: skip
    count, k = indices.shape
    out, per_group, *taps = weight_size
    size = [out, k + rest, *taps]
    values = dense._grad_weight(grad, xs, size, stride, padding, dilation, groups)
    others = None
    if rest:
        others = values[:, k:] / count_of_others(per_group, k)
        values = values[:, :k]
    if count == 1:
        return spread(values, indices[0], per_group, 1, others)
    full = background(values, per_group, 1, others)
    return full.scatter(1, _each_output(indices, full, k), values)


def _sampled_conv_input(
    grad: Tensor, w: Tensor, indices: Tensor, input_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    # a group's sampled output channels are adjacent in both operands, so groups stay what they are
    gs, ws = input_channels(grad, indices, scale, rest), output_channels(w, indices, rest)
    return dense._grad_input(gs, ws, input_size, stride, padding, dilation, groups)


def _sampled_conv_weight(
    grad: Tensor, x: Tensor, indices: Tensor, weight_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
    gathered: bool = False,
) -> Tensor:  # fmt: skip
    xs = x if gathered else examples_of(x, indices, scale, rest)
    gs = _mean_examples(grad, indices, rest)
    return dense._grad_weight(gs, xs, weight_size, stride, padding, dilation, groups)


# --- what they cost


def _conv_flops(
    x: Ints, w: Ints, indices: Ints, *args: Any, out_shape: Any = (), rest: bool = False, **_: Any
) -> int:
    rest = args[6] if len(args) > 6 else rest  # bias, *where, scale, rest
    return dense.conv_flops(out_shape, [w[0], indices[1] + rest, *w[2:]])


def _conv_grad_input_flops(
    grad: Ints, w: Ints, indices: Ints, *args: Any, rest: bool = False, **_: Any
) -> int:
    rest = args[6] if len(args) > 6 else rest  # input_size, *where, scale, rest
    return dense.conv_flops(grad, [w[0], indices[1] + rest, *w[2:]])


def _conv_grad_weight_flops(
    xs: Ints, grad: Ints, indices: Ints, weight_size: Ints, *_: Any, **__: Any
) -> int:
    return dense.conv_flops(grad, [weight_size[0], xs[1] // indices[0], *weight_size[2:]])


def _conv_input_flops(
    grad: Ints, w: Ints, indices: Ints, *args: Any, rest: bool = False, **_: Any
) -> int:
    rest = args[6] if len(args) > 6 else rest  # input_size, *where, scale, rest
    return dense.conv_flops([grad[0], indices[0] * (indices[1] + rest), *grad[2:]], w)


def _conv_weight_flops(
    grad: Ints, x: Ints, indices: Ints, weight_size: Ints, *args: Any, rest: bool = False, **_: Any
) -> int:
    rest = args[5] if len(args) > 5 else rest  # *where, scale, rest
    return dense.conv_flops([indices[1] + rest, *grad[1:]], weight_size)


gather_channels = define(
    f"gather_channels(Tensor x, Tensor indices, {PAIRS}) -> Tensor", input_channels, input_channels
)
gather_examples = define(
    f"gather_examples(Tensor x, Tensor indices, {PAIRS}) -> Tensor", examples_of, examples_of
)
sampled_conv = define(
    f"sampled_conv(Tensor x, Tensor w, Tensor indices, Tensor? bias, {dense.GEOMETRY}, {PAIRS}) "
    "-> Tensor",
    _sampled_conv,
    _sampled_conv,
    _conv_flops,
)
sampled_conv_grad_input = define(
    "sampled_conv_grad_input(Tensor grad, Tensor w, Tensor indices, SymInt[] input_size, "
    f"{dense.GEOMETRY}, {PAIRS}) -> Tensor",
    _sampled_conv_grad_input,
    _sampled_conv_grad_input,
    _conv_grad_input_flops,
)
sampled_conv_grad_weight = define(
    "sampled_conv_grad_weight(Tensor xs, Tensor grad, Tensor indices, SymInt[] weight_size, "
    f"{dense.GEOMETRY}, bool rest=False) -> Tensor",
    _sampled_conv_grad_weight,
    _sampled_conv_grad_weight,
    _conv_grad_weight_flops,
)
sampled_conv_input = define(
    "sampled_conv_input(Tensor grad, Tensor w, Tensor indices, SymInt[] input_size, "
    f"{dense.GEOMETRY}, {PAIRS}) -> Tensor",
    _sampled_conv_input,
    _sampled_conv_input,
    _conv_input_flops,
)
sampled_conv_weight = define(
    "sampled_conv_weight(Tensor grad, Tensor x, Tensor indices, SymInt[] weight_size, "
    f"{dense.GEOMETRY}, {PAIRS}, bool gathered=False) -> Tensor",
    _sampled_conv_weight,
    _sampled_conv_weight,
    _conv_weight_flops,
)

# --- the exact derivative given indices and scale, for those who call the op eagerly


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, indices, _, *where, scale, rest = inputs
    ctx.where, ctx.rest = where, rest
    ctx.save_for_backward(x, w, indices, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, indices, scale = ctx.saved_tensors
    need_x, need_w, _, need_bias, *_ = ctx.needs_input_grad
    gx = gw = None
    if need_x:
        gx = sampled_conv_grad_input(grad, w, indices, x.shape, *ctx.where, scale, ctx.rest)
    if need_w:
        xs = input_channels(x, indices, scale, ctx.rest)
        gw = sampled_conv_grad_weight(xs, grad, indices, w.shape, *ctx.where, ctx.rest)
    others = [d for d in range(grad.dim()) if d != 1]
    return gx, gw, None, grad.sum(others) if need_bias else None, *[None] * 6


differentiate(sampled_conv, _setup, _backward)
