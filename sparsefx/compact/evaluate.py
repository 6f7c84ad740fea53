"""Which values of a graph follow from its weights alone: zeros of masks, constants behind them.

A partial evaluation: inputs are unknown, parameters are known, 0 times anything finite is 0, and an
operator that isn't described here knows nothing unless it knows all of its operands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx import compat
from sparsefx.compact.known import Env, Known, nothing, of, some, unknown_like
from sparsefx.compact.products import ATTENTION, PRODUCTS, attention, convolution, product
from sparsefx.permutation.flow import argument
from sparsefx.permutation.maths import MATHS, pointwise
from sparsefx.permutation.moves import MOVES

aten = torch.ops.aten

REDUCED, NORMALISED = MATHS[aten.mean.dim], MATHS[aten._softmax.default]
_SPATIAL = MATHS[aten.avg_pool2d.default]
_NOT_PLAIN = {  # moves that need more than the same move of what is unknown
    aten.embedding.default, aten.index.Tensor, aten._unsafe_index.Tensor, aten.gather.default,
    aten.constant_pad_nd.default, aten.slice_scatter.default, aten.glu.default, operator.getitem,
    aten.as_strided.default,
}  # fmt: skip
_OF_ANY_STRIDE: dict[Any, Any] = {  # what is known is kept expanded
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
_PLAIN = MOVES.keys() - _NOT_PLAIN


def evaluate(
    nodes: Sequence[Node], given: Mapping[Node, Tensor], see: Callable[[Node, Env], None]
) -> None:
    """Evaluate a graph as far as its parameters go.

    Args:
        nodes: of the graph, in order.
        given: parameters and buffers by placeholder.
        see: told of every call with all that is known so far, before it is evaluated.
    """
    env: Env = {}
    last = {before: node for node in nodes for before in node.all_input_nodes}
    for node in nodes:
        if node.op == "call_function":
            see(node, env)
        env[node] = _value(node, env, given)
        for before in node.all_input_nodes:
            if last[before] is node:
                env.pop(before, None)


def _value(node: Node, env: Env, given: Mapping[Node, Tensor]) -> Any:
    if node in given:
        return of(given[node].detach())
    meta = node.meta.get("val")
    if node.op == "call_function" and not _opaque(node):
        known = [env[n] for n in node.all_input_nodes]
        if _complete(known):
            return _wrapped(_call(node, env, "value"))
        rule = _rule(node)
        if rule is not None:
            return rule(node, env)
    return unknown_like(meta)


def _complete(known: Sequence[Any]) -> bool:
    parts = [p for k in known for p in (k if isinstance(k, list) else [k])]
    return all(isinstance(p, Known) and not bool(p.unknown.any()) for p in parts)


def _opaque(node: Node) -> bool:
    """Whether the result is drawn or left as it lies in memory, or an operand would be written."""
    target: Any = node.target
    if not isinstance(target, compat.OpOverload):
        return False
    drawn = torch.Tag.nondeterministic_seeded in target.tags or "empty" in str(target)
    return drawn or bool(target._schema.is_mutable)


def _wrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return of(value)
    return [_wrapped(item) for item in value] if isinstance(value, list | tuple) else value


def _call(node: Node, env: Env, part: str) -> Any:
    """Call the operator on one part of what is known of its operands."""

    def one(n: Node) -> Any:
        held = env[n]
        if isinstance(held, list):
            return [getattr(item, part) for item in held]
        return getattr(held, part) if isinstance(held, Known) else held

    target: Any = _OF_ANY_STRIDE.get(node.target, node.target)
    args = torch.fx.map_arg(node.args, one)
    return target(*args, **torch.fx.map_arg(node.kwargs, one))


# --- operators


def _rule(node: Node) -> Callable[[Node, Env], Any] | None:
    target: Any = node.target
    if target in _RULES:
        return _RULES[target]
    if target in _PLAIN:
        return _moved
    rule = MATHS.get(target)
    if rule in _KINDS:
        return _KINDS[rule]
    tags = target.tags if isinstance(target, compat.OpOverload) else ()
    is_pointwise = rule is pointwise or (rule is None and torch.Tag.pointwise in tags)
    return _pointwise if is_pointwise else None


def _moved(node: Node, env: Env) -> Any:
    values, unknown = _call(node, env, "value"), _call(node, env, "unknown")
    if isinstance(values, Tensor):
        return Known(values, unknown)
    return [Known(v, u) for v, u in zip(values, unknown, strict=True)]


def _picked(node: Node, env: Env) -> Any:
    held: Any = env[node.args[0]]  # type: ignore[index]
    return held[node.args[1]]


def _pointwise(node: Node, env: Env) -> Any:
    unknown = torch.zeros((), dtype=torch.bool, device=node.meta["val"].device)
    for n in node.all_input_nodes:
        if isinstance(env[n], Known):
            unknown = unknown | env[n].unknown
    if bool(unknown.all()):
        return nothing(node.meta["val"])
    return some(_call(node, env, "value"), unknown)


def _multiplied(node: Node, env: Env) -> Any:
    found = _pointwise(node, env)
    for n in node.all_input_nodes:  # 0 times anything
        zero = ~env[n].live()
        if bool(zero.any()):
            found = Known(found.value, found.unknown & ~zero)
    return found


def _padded(node: Node, env: Env) -> Any:
    held = env[node.args[0]]  # type: ignore[index]
    unknown = aten.constant_pad_nd.default(held.unknown.to(torch.uint8), node.args[1], 0)
    return some(_call(node, env, "value"), unknown.bool())


def _gated(node: Node, env: Env) -> Any:
    held: Known = env[node.args[0]]  # type: ignore[index]
    dim = argument(node, 1, "dim", -1)
    values, gates = held.value.chunk(2, dim), held.unknown.chunk(2, dim)
    zero = ~gates[0] & (values[0] == 0)
    return some(_call(node, env, "value"), (gates[0] | gates[1]) & ~zero)


def _embedded(node: Node, env: Env) -> Any:
    """Whichever row is looked up: known where all rows are alike."""
    known, value = env[node.args[0]].constant([1])  # type: ignore[index]
    shape = node.meta["val"].shape
    return some(value.expand(shape), (~known).expand(shape))


def _pooled(node: Node, env: Env) -> Any:
    """Each channel of each sample by itself."""
    held: Known = env[node.args[0]]  # type: ignore[index]
    meta = node.meta["val"]
    metas = [meta] if isinstance(meta, Tensor) else list(meta)
    count = next((n for n in (1, 2, 3) if f"{n}d" in str(node.target)), 2)
    unknown = held.unknown.flatten(-count).any(-1)
    values = _call(node, env, "value")
    values = [values] if isinstance(values, Tensor) else values
    out = [
        some(v, unknown.reshape(*unknown.shape, *[1] * count)) if m.is_floating_point()
        else nothing(m)
        for v, m in zip(values, metas, strict=True)
    ]  # fmt: skip
    return out[0] if isinstance(meta, Tensor) else out


def reduced_dims(node: Node, rank: int) -> list[int]:
    """Return the dimensions that a reduction runs over."""
    dims: Any = argument(node, 2 if node.target is aten.linalg_vector_norm.default else 1, "dim")
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])]


def _reduced(node: Node, env: Env) -> Any:
    held: Known = env[node.args[0]]  # type: ignore[index]
    dims = reduced_dims(node, held.value.dim())
    whole = held.unknown.any(dims, keepdim=True) if dims else held.unknown

    def one(value: Tensor) -> Known:
        return some(value, whole if value.dim() == whole.dim() else whole.squeeze(dims))

    values = _call(node, env, "value")
    return one(values) if isinstance(values, Tensor) else [one(value) for value in values]


def _normalised(node: Node, env: Env) -> Any:
    held: Known = env[node.args[0]]  # type: ignore[index]
    dim: Any = argument(node, 1, "dim")
    return some(_call(node, env, "value"), held.unknown.any(dim, keepdim=True))


_KINDS: dict[Any, Callable[[Node, Env], Any]] = {
    REDUCED: _reduced,
    NORMALISED: _normalised,
    _SPATIAL: _pooled,
}
_RULES: dict[Any, Callable[[Node, Env], Any]] = {
    operator.getitem: _picked,
    aten.mul.Tensor: _multiplied,
    aten.constant_pad_nd.default: _padded,
    aten.glu.default: _gated,
    aten.embedding.default: _embedded,
    aten.convolution.default: convolution,
    **dict.fromkeys(PRODUCTS, product),
    **dict.fromkeys(ATTENTION, attention),
}
