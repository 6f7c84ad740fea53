"""How operators that only move values carry the dimensions of a tensor along."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx.permutation.axes import Dim, Prod, Sum, cut, new_dim, pin, regroup, unify
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

aten = torch.ops.aten


def _regrouped(flow: Flow, node: Node) -> list[Dim]:
    return regroup(flow.dims(node.args[0]), shape_of(node))


def _permuted(flow: Flow, node: Node) -> list[Dim]:
    dims = flow.dims(node.args[0])
    order: Any = node.args[1]
    return [dims[i] for i in order]


def _transposed(flow: Flow, node: Node) -> list[Dim]:
    dims = list(flow.dims(node.args[0]))
    if len(dims) > 1:
        one, two = (axis_of(node, i, f"dim{i - 1}", len(dims), i - 1) for i in (1, 2))
        dims[one], dims[two] = dims[two], dims[one]
    return dims


def _expanded(flow: Flow, node: Node) -> list[Dim]:
    """Along a dimension that expand makes, all values are equal: it is free."""
    shape, given = shape_of(node), shape_of(node.args[0])
    dims = flow.dims(node.args[0])
    added = len(shape) - len(given)
    out = [new_dim(size) for size in shape[:added]]
    return out + [
        dim if size == wanted else new_dim(wanted)
        for dim, size, wanted in zip(dims, given, shape[added:], strict=True)
    ]


def _strided(flow: Flow, node: Node) -> list[Dim]:
    source, value = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    whole = source.storage_offset() == 0 and source.numel() == value.numel()
    plain = whole and source.is_contiguous() and value.is_contiguous()
    if plain and not argument(node, 3, "storage_offset"):
        return _regrouped(flow, node)
    reason = f"{place(node)} reads memory by address"
    flow.pin_all(node.all_input_nodes, reason)
    return fresh(value, reason)


def _sliced(flow: Flow, node: Node) -> list[Dim]:
    dims, sizes = list(flow.dims(node.args[0])), shape_of(node.args[0])
    if not dims:
        return []
    dim = axis_of(node, 1, "dim", len(dims))
    step = argument(node, 4, "step", 1)
    if step != 1:
        return pinned_along(flow, node, [dim], f"takes every {step}th")
    start, stop, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(sizes[dim])
    dims[dim] = cut(dims[dim], start, stop)
    return dims


def _selected(flow: Flow, node: Node) -> list[Dim]:
    dims, sizes = list(flow.dims(node.args[0])), shape_of(node.args[0])
    dim = axis_of(node, 1, "dim", len(dims))
    index = argument(node, 2, "index") % sizes[dim]
    cut(dims[dim], index, index + 1)
    return dims[:dim] + dims[dim + 1 :]


def _split(flow: Flow, node: Node) -> list[Any]:
    dims = flow.dims(node.args[0])
    dim = axis_of(node, 2, "dim", len(dims))
    out, at = [], 0
    for value in node.meta["val"]:
        size = int(value.shape[dim])
        out.append([*dims[:dim], cut(dims[dim], at, at + size), *dims[dim + 1 :]])
        at += size
    return out


def _unbound(flow: Flow, node: Node) -> list[Any]:
    dims = flow.dims(node.args[0])
    dim = axis_of(node, 1, "dim", len(dims))
    for i in range(len(node.meta["val"])):
        cut(dims[dim], i, i + 1)
    return [dims[:dim] + dims[dim + 1 :] for _ in node.meta["val"]]


def _joined(flow: Flow, node: Node) -> list[Dim]:
    parts: Any = node.args[0]
    shape = shape_of(node)
    if any(len(shape_of(part)) != len(shape) for part in parts):  # an old empty tensor
        reason = f"{place(node)} joins tensors of different ranks"
        flow.pin_all(node.all_input_nodes, reason)
        return fresh(node.meta["val"], reason)
    dim = axis_of(node, 1, "dim", len(shape))
    given = [flow.dims(part) for part in parts]
    for other in given[1:]:
        for i, (one, two) in enumerate(zip(given[0], other, strict=True)):
            if i != dim:
                unify(one, two)
    out = list(given[0])
    out[dim] = Sum(tuple(dims[dim] for dims in given))
    return out


def _written(flow: Flow, node: Node) -> list[Dim]:
    """slice_scatter: a slice of the first operand is replaced by the second."""
    dims, given = flow.dims(node.args[0]), flow.dims(node.args[1])
    dim = axis_of(node, 2, "dim", len(dims))
    if argument(node, 5, "step", 1) != 1:
        pin(given[dim], f"{place(node)} writes with gaps")
        return pinned_along(flow, node, [dim], "writes with gaps")
    size = shape_of(node)[dim]
    start, stop, _ = slice(argument(node, 3, "start"), argument(node, 4, "end")).indices(size)
    for i, (one, two) in enumerate(zip(dims, given, strict=True)):
        unify(cut(one, start, stop) if i == dim else one, two)
    return list(dims)


def _embedded(flow: Flow, node: Node) -> list[Dim]:
    (rows, *features), index = flow.dims(node.args[0]), flow.dims(node.args[1])
    pin(rows, f"{place(node)} looks rows up by number")
    flow.mix([rows], features)
    return [*index, *features]


def _indexed(flow: Flow, node: Node) -> list[Dim]:
    dims = flow.dims(node.args[0])
    given: Any = node.args[1]
    indices = {i: index for i, index in enumerate(given) if index is not None}
    first = min(indices)
    adjacent = sorted(indices) == list(range(first, first + len(indices)))
    dtypes = {index.meta["val"].dtype for index in indices.values()}
    if not adjacent or dtypes & {torch.bool, torch.uint8}:
        reason = f"{place(node)} picks elements by number"
        flow.pin_all(node.all_input_nodes, reason)
        return fresh(node.meta["val"], reason)
    for i in indices:
        pin(dims[i], f"{place(node)} picks elements by number")
    rest = [dim for i, dim in enumerate(dims) if i not in indices]
    flow.mix([dims[i] for i in indices], rest)
    shapes = [shape_of(index) for index in indices.values()]
    shape: Any = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    picked = [new_dim(size) for size in shape]
    unify_broadcast(picked, shape, *zip(map(flow.dims, indices.values()), shapes, strict=True))
    return [*dims[:first], *picked, *dims[first + len(indices) :]]


def _gathered(flow: Flow, node: Node) -> list[Dim]:
    dims, index = flow.dims(node.args[0]), flow.dims(node.args[2])
    sizes, wanted = shape_of(node.args[0]), shape_of(node.args[2])
    dim = axis_of(node, 1, "dim", len(dims))
    pin(dims[dim], f"{place(node)} picks elements by number")
    for i, (one, two) in enumerate(zip(dims, index, strict=True)):
        if i != dim:
            unify(cut(one, 0, wanted[i]) if sizes[i] != wanted[i] else one, two)
    flow.mix([dims[dim]], [d for i, d in enumerate(dims) if i != dim])
    return list(index)


def _padded(flow: Flow, node: Node) -> list[Dim]:
    given, wanted = shape_of(node.args[0]), shape_of(node)
    pad: Any = node.args[1]
    touched = {len(given) - 1 - i // 2 for i, amount in enumerate(pad) if amount}
    assert len(given) == len(wanted), node.format_node()
    return pinned_along(flow, node, touched, "pads them")


def _repeated(flow: Flow, node: Node) -> list[Dim]:
    dims = flow.dims(node.args[0])
    repeats: Any = node.args[1]
    padded = [*(new_dim(1) for _ in range(len(repeats) - len(dims))), *dims]
    return [Prod((new_dim(n), dim)) for n, dim in zip(repeats, padded, strict=True)]


def _gated(flow: Flow, node: Node) -> list[Dim]:
    """glu: the first half times the sigmoid of the second."""
    dims = list(flow.dims(node.args[0]))
    dim = axis_of(node, 1, "dim", len(dims), -1)
    size = shape_of(node)[dim]
    first, second = cut(dims[dim], 0, size), cut(dims[dim], size, 2 * size)
    unify(first, second)
    dims[dim] = first
    return dims


def _flipped(flow: Flow, node: Node) -> list[Dim]:
    rank, dims = len(shape_of(node)), argument(node, 1, "dims")
    return pinned_along(flow, node, [dim % rank for dim in dims], "reverses their order")


def _picked(flow: Flow, node: Node) -> list[Dim]:
    found = flow.of_node[node.args[0]]  # type: ignore[index]
    number: Any = node.args[1]
    return found[number] if isinstance(node.meta["val"], Tensor) else []


MOVES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default,
            aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
        ),
        _regrouped,
    ),
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    aten.t.default: _transposed,
    aten.expand.default: _expanded,
    aten.as_strided.default: _strided,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbound,
    aten.cat.default: _joined,
    aten.slice_scatter.default: _written,
    aten.embedding.default: _embedded,
    aten.index.Tensor: _indexed,
    aten._unsafe_index.Tensor: _indexed,
    aten.gather.default: _gathered,
    aten.constant_pad_nd.default: _padded,
    aten.flip.default: _flipped,
    torch.ops.prims.rev.default: _flipped,
    aten.repeat.default: _repeated,
    aten.glu.default: _gated,
    operator.getitem: _picked,
}  # fmt: skip
