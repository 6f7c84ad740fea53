"""How operators that compute carry the dimensions of their operands to their result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx.permutation.axes import Dim, Prod, new_dim, pin, size_of, unify
from sparsefx.permutation.flow import (
    Flow,
    Rule,
    argument,
    axis_of,
    fresh,
    pinned_along,
    place,
    shape_of,
    unify_broadcast,
)

aten, prims = torch.ops.aten, torch.ops.prims


def pointwise(flow: Flow, node: Node) -> list[Any]:
    """Each element depends on the elements in its own place."""
    shape = shape_of(node)
    out = [new_dim(size) for size in shape]
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    unify_broadcast(out, shape, *((flow.dims(n), shape_of(n)) for n in operands))
    return out


def _filled(flow: Flow, node: Node) -> list[Any]:
    return fresh(node.meta["val"])


def _counted(flow: Flow, node: Node) -> list[Any]:
    return fresh(node.meta["val"], f"{place(node)} counts positions")


def _reduced_dims(node: Node, rank: int) -> list[int]:
    dims = argument(node, 2 if node.target is aten.linalg_vector_norm.default else 1, "dim")
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])]


def _reduced(flow: Flow, node: Node) -> list[Any]:
    """Sums, means, extremes: in whichever order the values come."""
    dims = flow.dims(node.args[0])
    along = set(_reduced_dims(node, len(dims)) if dims else ())
    rest = [dim for i, dim in enumerate(dims) if i not in along]
    flow.mix([dims[i] for i in along], rest)

    def one(value: Tensor) -> list[Dim]:
        if value.dim() != len(dims):
            return list(rest)
        return [new_dim(1) if i in along else dim for i, dim in enumerate(dims)]

    value = node.meta["val"]
    return one(value) if isinstance(value, Tensor) else [one(item) for item in value]


def _reduced_whole(flow: Flow, node: Node) -> list[Any]:
    return []


def _normalised(flow: Flow, node: Node) -> list[Any]:
    dims = list(flow.dims(node.args[0]))
    if dims:
        along = axis_of(node, 1, "dim", len(dims))
        flow.mix([dims[along]], dims[:along], dims[along + 1 :])
    return dims


def _ordered(flow: Flow, node: Node) -> list[Any]:
    """The result tells places apart: cumsum, argmax, sort, topk."""
    rank = len(shape_of(node.args[0]))
    number = 2 if node.target is aten.topk.default else 1
    default = None if node.target in _WHOLE_BY_DEFAULT else -1
    dim = argument(node, number, "dim", default)
    along = range(rank) if dim is None else [dim % rank] if rank else []
    return pinned_along(flow, node, along, "tells their places apart")


def _triangle(flow: Flow, node: Node) -> list[Any]:
    rank = len(shape_of(node))
    return pinned_along(flow, node, [rank - 2, rank - 1], "tells their places apart")


def _spatial(flow: Flow, node: Node) -> list[Any]:
    """Pooling and resizing: the last dimensions are positions, the others pass."""
    rank = len(shape_of(node.args[0]))
    count = next((n for n in (1, 2, 3) if f"{n}d" in str(node.target)), 0)
    if node.target is prims._low_memory_max_pool_with_offsets.default:
        count = len(argument(node, 1, "kernel_size"))
    return pinned_along(flow, node, range(rank - count, rank), "works on neighbouring positions")


# --- products


def _product(flow: Flow, node: Node) -> list[Any]:
    """mm, bmm, addmm, baddbmm: sums over the last dimension of one and the second last of two."""
    first = 1 if node.target in _WITH_BIAS else 0
    left, right = (flow.dims(arg) for arg in node.args[first : first + 2])
    *batch, rows, inner = left
    *others, again, columns = right
    unify(inner, again)
    for one, two in zip(batch, others, strict=True):
        unify(one, two)
    out = [*batch, rows, columns]
    flow.mix([inner], out)
    if first:
        bias = node.args[0]
        unify_broadcast(out, shape_of(node), (flow.dims(bias), shape_of(bias)))
    return out


def _convolution(flow: Flow, node: Node) -> list[Any]:
    """Carry [N, G x in, *] to [N, G x out, *]; w is [G x out, in, *], or [G x in, out, *]."""
    x, w = (flow.dims(arg) for arg in node.args[:2])
    bias, transposed, groups = node.args[2], node.args[6], node.args[8]
    assert isinstance(groups, int), node.format_node()
    group, reason = new_dim(groups), f"{place(node)} works on neighbouring positions"
    first = new_dim(size_of(w[0]) // groups)
    unify(w[0], Prod((group, first)))
    inner, outer = (first, w[1]) if transposed else (w[1], first)
    unify(x[1], Prod((group, inner)))
    channels = Prod((group, outer))
    if bias is not None:
        unify(flow.dims(bias)[0], channels)
    for dim in (*x[2:], *w[2:]):
        pin(dim, reason)
    flow.mix([inner, *x[2:], *w[2:]], [x[0], group, outer])
    flow.mix([*x[2:], *w[2:]], [inner])
    return [x[0], channels, *(new_dim(size, reason) for size in shape_of(node)[2:])]


def _attention(flow: Flow, node: Node) -> list[Any]:
    """Q [B, H, T, D], k [B, H, S, D], v [B, H, S, E] -> [B, H, T, E] and statistics [B, H, T]."""
    q, k, v = (flow.dims(arg) for arg in node.args[:3])
    name = str(node.target)
    masked = _MASKS.get(name)
    mask = None if masked is None else argument(node, masked, "attn_mask")
    flags = argument(node, _CAUSAL[name], "is_causal", False)
    for i in (0, 1):
        heads, wanted = size_of(k[i]), size_of(q[i])
        for dim in (k[i], v[i]):  # fewer heads of keys than of queries: each serves a run of them
            unify(q[i], Prod((dim, new_dim(wanted // heads))) if heads != wanted else dim)
    unify(k[2], v[2])
    unify(q[3], k[3])
    if flags:
        pin(q[2], f"{place(node)} is causal")
        pin(k[2], f"{place(node)} is causal")
    scores = [q[0], q[1], q[2], k[2]]
    if isinstance(mask, Node):
        sizes = [size_of(dim) for dim in scores]
        unify_broadcast(scores, sizes, (flow.dims(mask), shape_of(mask)))
    flow.mix([q[3]], scores)
    flow.mix([k[2]], [*q[:3], v[3]])
    rest = [fresh(value, f"{place(node)} keeps statistics") for value in node.meta["val"][1:]]
    return [[*q[:3], v[3]], *rest]


_CAUSAL = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": 4,
    "aten._scaled_dot_product_flash_attention.default": 4,
    "aten._scaled_dot_product_efficient_attention.default": 6,
}
_MASKS = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": 5,
    "aten._scaled_dot_product_efficient_attention.default": 3,
}
_WITH_BIAS = {aten.addmm.default, aten.baddbmm.default}
_WHOLE_BY_DEFAULT = {aten.argmax.default, aten.argmin.default}

MATHS: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.clone.default, aten.alias.default, aten.detach.default, aten._to_copy.default,
            aten.lift_fresh_copy.default, prims.convert_element_type.default, aten.copy_.default,
        ),
        pointwise,
    ),
    **dict.fromkeys(
        (
            aten.full.default, aten.scalar_tensor.default, aten.zeros.default, aten.ones.default,
            aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
        ),
        _filled,
    ),
    **dict.fromkeys((aten.arange.start_step, aten.arange.default, prims.iota.default), _counted),
    **dict.fromkeys(
        (
            aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default,
            aten.prod.dim_int, aten.any.dim, aten.any.dims, aten.all.dim, aten.var.correction,
            aten.std.correction, aten.var_mean.correction, aten.logsumexp.default,
            aten.linalg_vector_norm.default,
        ),
        _reduced,
    ),
    **dict.fromkeys(
        (
            aten.sum.default, aten.mean.default, aten.max.default, aten.min.default,
            aten.any.default, aten.all.default, aten.prod.default,
        ),
        _reduced_whole,
    ),
    aten._softmax.default: _normalised,
    aten._log_softmax.default: _normalised,
    **dict.fromkeys(
        (
            aten.cumsum.default, aten.cumprod.default, aten.argmax.default, aten.argmin.default,
            aten.max.dim, aten.min.dim, aten.sort.default, aten.topk.default,
        ),
        _ordered,
    ),
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    **dict.fromkeys(
        (
            aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default,
            aten.avg_pool2d.default, aten.avg_pool3d.default, aten._adaptive_avg_pool2d.default,
            aten._adaptive_avg_pool3d.default, aten.upsample_nearest2d.vec,
            aten.upsample_bilinear2d.vec, prims._low_memory_max_pool_with_offsets.default,
        ),
        _spatial,
    ),
    **dict.fromkeys(
        (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default), _product
    ),
    aten.convolution.default: _convolution,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention.default: _attention,
    aten._scaled_dot_product_efficient_attention.default: _attention,
}  # fmt: skip
