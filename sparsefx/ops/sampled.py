"""What the sampled ops mean: x[M, K] @ w[K, N] ~= x[:, S] @ w[S, :] (Adelman et al., 2021).

    topk_mm_indices(x, w, k, scores)            S: the k pairs with the largest scores, ascending
    sampled_mm(x, w, S, bias)                   x[:, S] @ w[S, :] + bias
    sampled_mm_grad_input(grad, w, S)           its dL/dx: zero outside the columns S
    sampled_mm_grad_weight(xs, grad, S, K, t)   its dL/dw from xs = x[:, S]: zero outside the rows S
    gather_columns(x, S), gather_channels(x, S) xs, all that a backward needs of x
    sampled_bmm, ...                            the same for [B, M, K] @ [B, K, N], S is [B, k]
    topk_conv_indices, sampled_conv, ...        channels of a convolution, S is [groups, k]
    sampled_conv_input, sampled_conv_weight     a convolution's gradients, sampled on their own:
                                                over output channels, over the batch's examples

Score of pair i: |x_i| * |w_i| (2-norms of column and row), or one of the two. Of equals the earlier
is kept. Norms are computed in at least float32, where those below 1e-22 count as 0 and those above
1e19 as infinite. Indices are int64, unique, ascending: gathers read forwards. ``where`` is
(stride, padding, dilation, groups) throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx.ops import dense
from sparsefx.ops._define import define, differentiate

aten = torch.ops.aten
Ints = Sequence[int]


# --- which pairs


def _squares(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum of squares over ``dims``; ``norm(dim=0)`` is 30 times slower on CPU."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.sum(wide * wide, list(dims))


_BLOCK = 8  # rows: few enough pages that the prefetcher follows all of them


def _squares_across(x: Tensor, dim: int) -> Tensor:
    """Sum of squares over axis -2 or -1 of a matrix, or of each of a batch.

    Inductor's loop over many rows reads one cache line of each, a page apart: less than half of
    memory speed. A sum within blocks of rows, then over the blocks, reads along memory.
    """
    if x.stride(-1) > x.stride(-2):
        x, dim = x.transpose(-2, -1), -3 - dim
    long = isinstance(x.shape[-2], int) and x.shape[-2] >= 32 * _BLOCK
    if dim == -1 or not long:
        return _squares(x, [dim])
    rest = x.shape[-2] % _BLOCK
    whole = x.shape[-2] - rest
    total = _squares(torch.unflatten(x.narrow(-2, 0, whole), -2, (-1, _BLOCK)), [-2]).sum(-2)
    return total + _squares(x.narrow(-2, whole, rest), [-2]) if rest else total


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last axis, ascending; of equals the earlier."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True)[1]
    return torch.sort(order.narrow(-1, 0, k), dim=-1)[0]


def _score(left: Tensor, right: Tensor, scores: str) -> Tensor:
    """Combine squared norms: roots are monotonic, so the order is that of the norms."""
    if scores == "left":
        return left
    return right if scores == "right" else left.sqrt() * right.sqrt()


def _topk_mm(x: Tensor, w: Tensor, k: int, scores: str) -> Tensor:
    return _largest(_score(_squares_across(x, -2), _squares_across(w, -1), scores), k)


def _fake_topk_mm(x: Tensor, w: Tensor, k: int, scores: str) -> Tensor:
    return x.new_empty((*x.shape[:-2], k), dtype=torch.int64)


def _topk_conv(x: Tensor, w: Tensor, k: int, axis: str, groups: int, scores: str) -> Tensor:
    """``axis``: "in" (x, w), "out" (grad, w) or "batch" (x, grad): what the product sums over."""
    others = [d for d in range(x.dim()) if d != 1]
    if axis == "batch":
        left, right = (_squares(t, list(range(1, t.dim()))) for t in (x, w))
        return _largest(_score(left, right, scores), k).unsqueeze(0)
    left = _squares(x, others).view(groups, -1)
    if axis == "in":  # w [groups * out, in, *taps] -> [groups, in]
        right = _squares(w, list(range(2, w.dim()))).view(groups, -1, w.shape[1])
        return _largest(_score(left, right.sum(1), scores), k)
    right = _squares(w, list(range(1, w.dim()))).view(groups, -1)
    return _largest(_score(left, right, scores), k)


def _fake_topk_conv(x: Tensor, w: Tensor, k: int, axis: str, groups: int, scores: str) -> Tensor:
    return x.new_empty((1 if axis == "batch" else groups, k), dtype=torch.int64)


topk_mm_indices = define(
    "topk_mm_indices(Tensor x, Tensor w, SymInt k, str scores) -> Tensor", _topk_mm, _fake_topk_mm
)
topk_conv_indices = define(
    "topk_conv_indices(Tensor x, Tensor w, SymInt k, str axis, SymInt groups, str scores) "
    "-> Tensor",
    _topk_conv,
    _fake_topk_conv,
)

# --- gathers and their transposes


def rows(w: Tensor, indices: Tensor) -> Tensor:
    """w[S, :] of [K, N], read along memory: a transposed view is gathered by its columns."""
    if w.stride(0) < w.stride(1):
        return w.t().index_select(1, indices).t()
    return w.index_select(0, indices)


def columns(x: Tensor, indices: Tensor) -> Tensor:
    """x[:, S] of [M, K], read along memory."""
    return rows(x.t(), indices).t()


def spread(values: Tensor, indices: Tensor, size: int, dim: int) -> Tensor:
    """Zeros of ``size`` along ``dim`` with ``values`` at the indices, which are unique."""
    out = values.new_zeros([*values.shape[:dim], size, *values.shape[dim + 1 :]])
    return out.index_copy(dim, indices, values)


# --- matrix products


def _sampled_mm(x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    xs, ws = columns(x, indices), rows(w, indices)
    return xs @ ws if bias is None else torch.addmm(bias, xs, ws)


def _fake_sampled_mm(x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


def _sampled_mm_grad_input(grad: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    return spread(grad @ rows(w, indices).t(), indices, w.shape[0], 1)


def _fake_sampled_mm_grad_input(grad: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], w.shape[0]))


def _sampled_mm_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, depth: int, transposed: bool
) -> Tensor:
    if transposed:
        return spread(grad.t() @ xs, indices, depth, 1)
    return spread(xs.t() @ grad, indices, depth, 0)


def _fake_sampled_mm_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, depth: int, transposed: bool
) -> Tensor:
    width = grad.shape[1]
    return xs.new_empty((width, depth) if transposed else (depth, width))


def _sampled_mm_flops(x: Ints, w: Ints, indices: Ints, *_: Any, **__: Any) -> int:
    return 2 * x[0] * indices[0] * w[1]


def _grad_input_flops(grad: Ints, w: Ints, indices: Ints, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * indices[0]


def _grad_weight_flops(xs: Ints, grad: Ints, *_: Any, **__: Any) -> int:
    return 2 * xs[0] * xs[1] * grad[1]


sampled_mm = define(
    "sampled_mm(Tensor x, Tensor w, Tensor indices, Tensor? bias) -> Tensor",
    _sampled_mm,
    _fake_sampled_mm,
    _sampled_mm_flops,
)
sampled_mm_grad_input = define(
    "sampled_mm_grad_input(Tensor grad, Tensor w, Tensor indices) -> Tensor",
    _sampled_mm_grad_input,
    _fake_sampled_mm_grad_input,
    _grad_input_flops,
)
sampled_mm_grad_weight = define(
    "sampled_mm_grad_weight(Tensor xs, Tensor grad, Tensor indices, SymInt depth, "
    "bool transposed) -> Tensor",
    _sampled_mm_grad_weight,
    _fake_sampled_mm_grad_weight,
    _grad_weight_flops,
)

# --- what the forward saves


def _gather_columns(x: Tensor, indices: Tensor) -> Tensor:
    if x.dim() == 3:
        return batch_columns(x, indices)
    return columns(x, indices).contiguous()


gather_columns = define(
    "gather_columns(Tensor x, Tensor indices) -> Tensor", _gather_columns, _gather_columns
)

# --- batched products: each batch its own indices


def _batch_rows(w: Tensor, indices: Tensor) -> Tensor:
    """w[b, S[b], :]: [B, K, N], [B, k] -> [B, k, N], read along memory."""
    if w.stride(1) < w.stride(2):
        return batch_columns(w.transpose(1, 2), indices).transpose(1, 2)
    return w.gather(1, indices.unsqueeze(2).expand(-1, -1, w.shape[2]))


def batch_columns(x: Tensor, indices: Tensor) -> Tensor:
    """x[b, :, S[b]]: [B, M, K], [B, k] -> [B, M, k], read along memory."""
    if x.stride(2) > x.stride(1):
        return _batch_rows(x.transpose(1, 2), indices).transpose(1, 2)
    return x.gather(2, indices.unsqueeze(1).expand(-1, x.shape[1], -1))


def _sampled_bmm(x: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    return torch.bmm(batch_columns(x, indices), _batch_rows(w, indices))


def _fake_sampled_bmm(x: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], w.shape[2]))


def _sampled_bmm_grad_input(grad: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    values = torch.bmm(grad, _batch_rows(w, indices).transpose(1, 2))  # [B, M, k]
    out = grad.new_zeros((grad.shape[0], grad.shape[1], w.shape[1]))
    return out.scatter(2, indices.unsqueeze(1).expand(-1, grad.shape[1], -1), values)


def _fake_sampled_bmm_grad_input(grad: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[1], w.shape[1]))


def _sampled_bmm_grad_weight(xs: Tensor, grad: Tensor, indices: Tensor, depth: int) -> Tensor:
    values = torch.bmm(xs.transpose(1, 2), grad)  # [B, k, N]
    out = grad.new_zeros((grad.shape[0], depth, grad.shape[2]))
    return out.scatter(1, indices.unsqueeze(2).expand(-1, -1, grad.shape[2]), values)


def _fake_sampled_bmm_grad_weight(xs: Tensor, grad: Tensor, indices: Tensor, depth: int) -> Tensor:
    return grad.new_empty((grad.shape[0], depth, grad.shape[2]))


def _bmm_flops(x: Ints, w: Ints, indices: Ints, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * indices[1] * w[2]


def _bmm_grad_input_flops(grad: Ints, w: Ints, indices: Ints, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * grad[2] * indices[1]


def _bmm_grad_weight_flops(xs: Ints, grad: Ints, *_: Any, **__: Any) -> int:
    return 2 * xs[0] * xs[1] * xs[2] * grad[2]


sampled_bmm = define(
    "sampled_bmm(Tensor x, Tensor w, Tensor indices) -> Tensor",
    _sampled_bmm,
    _fake_sampled_bmm,
    _bmm_flops,
)
sampled_bmm_grad_input = define(
    "sampled_bmm_grad_input(Tensor grad, Tensor w, Tensor indices) -> Tensor",
    _sampled_bmm_grad_input,
    _fake_sampled_bmm_grad_input,
    _bmm_grad_input_flops,
)
sampled_bmm_grad_weight = define(
    "sampled_bmm_grad_weight(Tensor xs, Tensor grad, Tensor indices, SymInt depth) -> Tensor",
    _sampled_bmm_grad_weight,
    _fake_sampled_bmm_grad_weight,
    _bmm_grad_weight_flops,
)

# --- convolutions: every group samples equally many channels; the reference is its own fake


def _channels(indices: Tensor, per_group: int) -> Tensor:
    """Positions within groups [groups, k] -> channels [groups * k]."""
    first = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1) * per_group
    return (indices + first).flatten()


def input_channels(x: Tensor, indices: Tensor) -> Tensor:
    """x[:, S] for S [groups, k] of [batch, groups * per_group, *spatial]."""
    return x.index_select(1, _channels(indices, x.shape[1] // indices.shape[0]))


gather_channels = define(
    "gather_channels(Tensor x, Tensor indices) -> Tensor", input_channels, input_channels
)


def _weight_inputs(w: Tensor, indices: Tensor) -> Tensor:
    """w[o, S[group of o]]: [groups * out, in, *taps] -> [groups * out, k, *taps]."""
    groups = indices.shape[0]
    if groups == 1:
        return w.index_select(1, indices[0])
    each = indices.repeat_interleave(w.shape[0] // groups, 0)  # [groups * out, k]
    each = each.view(*each.shape, *[1] * (w.dim() - 2)).expand(-1, -1, *w.shape[2:])
    return w.gather(1, each)


def _sampled_conv(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None, *where: Any
) -> Tensor:
    stride, padding, dilation, groups = where
    out: Tensor = aten.convolution(
        input_channels(x, indices), _weight_inputs(w, indices), bias,
        stride, padding, dilation, False, [0] * len(stride), groups,
    )  # fmt: skip
    return out


def _sampled_conv_grad_input(
    grad: Tensor, w: Tensor, indices: Tensor, input_size: Ints, *where: Any
) -> Tensor:
    groups, k = indices.shape
    size = [input_size[0], groups * k, *input_size[2:]]
    values = dense._grad_input(grad, _weight_inputs(w, indices), size, *where)
    return spread(values, _channels(indices, w.shape[1]), input_size[1], 1)


def _sampled_conv_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, weight_size: Ints, *where: Any
) -> Tensor:
    groups, k = indices.shape
    out, per_group, *taps = weight_size
    values = dense._grad_weight(grad, xs, [out, k, *taps], *where)
    if groups == 1:
        return spread(values, indices[0], per_group, 1)
    each = indices.repeat_interleave(out // groups, 0)
    each = each.view(out, k, *[1] * len(taps)).expand(-1, -1, *taps)
    return values.new_zeros(list(weight_size)).scatter(1, each, values)


def _sampled_conv_input(
    grad: Tensor, w: Tensor, indices: Tensor, input_size: Ints, *where: Any
) -> Tensor:
    # a group's sampled output channels are adjacent in both operands, so groups stay what they are
    taken = _channels(indices, w.shape[0] // indices.shape[0])
    gs, ws = grad.index_select(1, taken), w.index_select(0, taken)
    return dense._grad_input(gs, ws, input_size, *where)


def _sampled_conv_weight(
    grad: Tensor, x: Tensor, indices: Tensor, weight_size: Ints, *where: Any
) -> Tensor:
    examples = indices[0]
    gs, xs = grad.index_select(0, examples), x.index_select(0, examples)
    return dense._grad_weight(gs, xs, weight_size, *where)


def _conv_flops(x: Ints, w: Ints, indices: Ints, *_: Any, out_shape: Any = (), **__: Any) -> int:
    return dense.conv_flops(out_shape, [w[0], indices[1], *w[2:]])


def _conv_grad_input_flops(grad: Ints, w: Ints, indices: Ints, *_: Any, **__: Any) -> int:
    return dense.conv_flops(grad, [w[0], indices[1], *w[2:]])


def _conv_grad_weight_flops(
    xs: Ints, grad: Ints, indices: Ints, weight_size: Ints, *_: Any, **__: Any
) -> int:
    return dense.conv_flops(grad, [weight_size[0], indices[1], *weight_size[2:]])


def _conv_input_flops(grad: Ints, w: Ints, indices: Ints, *_: Any, **__: Any) -> int:
    return dense.conv_flops([grad[0], indices[0] * indices[1], *grad[2:]], w)


def _conv_weight_flops(
    grad: Ints, x: Ints, indices: Ints, weight_size: Ints, *_: Any, **__: Any
) -> int:
    return dense.conv_flops([indices[1], *grad[1:]], weight_size)


sampled_conv = define(
    f"sampled_conv(Tensor x, Tensor w, Tensor indices, Tensor? bias, {dense.GEOMETRY}) -> Tensor",
    _sampled_conv,
    _sampled_conv,
    _conv_flops,
)
sampled_conv_grad_input = define(
    "sampled_conv_grad_input(Tensor grad, Tensor w, Tensor indices, SymInt[] input_size, "
    f"{dense.GEOMETRY}) -> Tensor",
    _sampled_conv_grad_input,
    _sampled_conv_grad_input,
    _conv_grad_input_flops,
)
sampled_conv_grad_weight = define(
    "sampled_conv_grad_weight(Tensor xs, Tensor grad, Tensor indices, SymInt[] weight_size, "
    f"{dense.GEOMETRY}) -> Tensor",
    _sampled_conv_grad_weight,
    _sampled_conv_grad_weight,
    _conv_grad_weight_flops,
)
sampled_conv_input = define(
    "sampled_conv_input(Tensor grad, Tensor w, Tensor indices, SymInt[] input_size, "
    f"{dense.GEOMETRY}) -> Tensor",
    _sampled_conv_input,
    _sampled_conv_input,
    _conv_input_flops,
)
sampled_conv_weight = define(
    "sampled_conv_weight(Tensor grad, Tensor x, Tensor indices, SymInt[] weight_size, "
    f"{dense.GEOMETRY}) -> Tensor",
    _sampled_conv_weight,
    _sampled_conv_weight,
    _conv_weight_flops,
)

# --- exact derivatives given the indices, for those who call the ops eagerly


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, indices, *rest = inputs
    ctx.rest = rest[1:]  # after the bias
    ctx.save_for_backward(x, w, indices)


def _backward_mm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, indices = ctx.saved_tensors
    need_x, need_w, _, need_bias = ctx.needs_input_grad
    return (
        sampled_mm_grad_input(grad, w, indices) if need_x else None,
        sampled_mm_grad_weight(columns(x, indices), grad, indices, w.shape[0], False)
        if need_w
        else None,
        None,
        grad.sum(0) if need_bias else None,
    )


def _backward_bmm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, indices = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    xs = batch_columns(x, indices)
    return (
        sampled_bmm_grad_input(grad, w, indices) if need_x else None,
        sampled_bmm_grad_weight(xs, grad, indices, w.shape[1]) if need_w else None,
        None,
    )


def _backward_conv(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, indices = ctx.saved_tensors
    need_x, need_w, _, need_bias, *_ = ctx.needs_input_grad
    xs = input_channels(x, indices)
    others = [d for d in range(grad.dim()) if d != 1]
    return (
        sampled_conv_grad_input(grad, w, indices, x.shape, *ctx.rest) if need_x else None,
        sampled_conv_grad_weight(xs, grad, indices, w.shape, *ctx.rest) if need_w else None,
        None,
        grad.sum(others) if need_bias else None,
        *[None] * 4,
    )


differentiate(sampled_mm, _setup, _backward_mm)
differentiate(sampled_bmm, _setup, _backward_bmm)
differentiate(sampled_conv, _setup, _backward_conv)
