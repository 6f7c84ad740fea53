"""Which values of a graph follow from its weights alone: zeros of masks, constants behind them.

A partial evaluation. Of every tensor it says which elements are known and what they are, whatever
the inputs: inputs are unknown, parameters are known, 0 times anything finite is 0, and an operator
that isn't described here knows nothing unless it knows all of its operands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx import compat
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


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a tensor.

    Attributes:
        value: its elements; 0 where they are unknown.
        unknown: bool, of the same shape.
    """

    value: Tensor
    unknown: Tensor

    def live(self) -> Tensor:
        """Return where it isn't known to be 0, bool."""
        return self.unknown | (self.value != 0)

    def constant(self, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what is alike along every dimension but ``kept``: (known, value), of their sizes.

        The value is 0 where it isn't known.
        """
        others = [d for d in range(self.value.dim()) if d not in kept]
        if not others:
            return ~self.unknown, self.value
        low, high = self.value.amin(others), self.value.amax(others)
        known = ~self.unknown.any(others) & (low == high)  # [others] isn't empty: not all dims
        return known, torch.where(known, low, torch.zeros_like(low))


def of(tensor: Tensor) -> Known:
    """Say that all of a tensor is known."""
    return Known(tensor, torch.zeros((), dtype=torch.bool, device=tensor.device).expand_as(tensor))


def nothing(value: Tensor) -> Known:
    """Say that nothing is known of a tensor of this shape, dtype and device."""
    shape = tuple(value.shape)
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    return Known(zero.expand(shape), torch.ones_like(zero, dtype=torch.bool).expand(shape))


def some(value: Tensor, unknown: Tensor) -> Known:
    """Say that all but ``unknown`` is known; whatever stands there is dropped."""
    unknown = unknown.expand(value.shape)
    return Known(torch.where(unknown, torch.zeros_like(value), value), unknown)


Env = dict[Node, Any]


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
    if node.op == "call_function":
        known = [env[n] for n in node.all_input_nodes]
        if _complete(known) and not _seeded(node):
            return _wrapped(_call(node, env, "value"))
        rule = _rule(node)
        if rule is not None:
            return rule(node, env)
    return _nothing(meta)


def _nothing(meta: Any) -> Any:
    if isinstance(meta, Tensor):
        return nothing(meta)
    return [_nothing(item) for item in meta] if isinstance(meta, list | tuple) else meta


def _complete(known: Sequence[Any]) -> bool:
    parts = [p for k in known for p in (k if isinstance(k, list) else [k])]
    return all(isinstance(p, Known) and not bool(p.unknown.any()) for p in parts)


def _seeded(node: Node) -> bool:
    target: Any = node.target
    tags = target.tags if isinstance(target, compat.OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags


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
    return _pointwise if is_pointwise and not _seeded(node) else None


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


def _product(node: Node, env: Env) -> Any:
    """mm and its kin: a column is known where all that it sums is."""
    first = 1 if node.target in WITH_BIAS else 0
    left, right = (env[n] for n in node.args[first : first + 2])  # type: ignore[index]
    batch = list(range(left.value.dim() - 2))
    known, value = left.constant([*batch, left.value.dim() - 1])  # [*, K]
    live = (~known | (value != 0)).to(torch.float32)
    unknown = _any(~known, right.live()) | _any(live.bool(), right.unknown)  # [*, N]
    total = torch.matmul(value.unsqueeze(-2), right.value)  # [*, 1, N]
    shape = node.meta["val"].shape
    found = some(total.expand(shape), unknown.unsqueeze(-2).expand(shape))
    if not first:
        return found
    bias = env[node.args[0]]  # type: ignore[index]
    scaled = argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1
    if scaled:
        return nothing(node.meta["val"])
    return some(found.value + bias.value, found.unknown | bias.unknown)


def _any(left: Tensor, right: Tensor) -> Tensor:
    """Whether both hold for any k: bool [*, K] and [*, K, N] -> [*, N]."""
    return torch.matmul(left.float().unsqueeze(-2), right.float()).squeeze(-2) > 0


def taps(node: Node, env: Env) -> tuple[Known, Known]:
    """Return a convolution's input and its weight as [G x in] x [G, in, out] over all taps.

    Returns:
        The weight's ``value`` is the sum over taps, its ``unknown`` says where any tap isn't 0.
    """
    x, w = (env[n] for n in node.args[:2])  # type: ignore[index]
    groups: Any = node.args[8]
    live, total = w.live().flatten(2).any(2), w.value.flatten(2).sum(2)
    sums = [t.unflatten(0, (groups, -1)) for t in (total, live)]  # [G, out, in], or [G, in, out]
    if not node.args[6]:
        sums = [t.transpose(1, 2) for t in sums]
    return x, Known(*sums)


def moves_off_the_edge(node: Node) -> bool:
    """Whether a constant input makes a constant output nowhere but inside: padding, or transposed."""
    padding: Any = node.args[4]
    return bool(node.args[6]) or any(amount != 0 for amount in padding)


def _convolution(node: Node, env: Env) -> Any:
    x, w = taps(node, env)
    groups: Any = node.args[8]
    known, value = (t.unflatten(0, (groups, -1)) for t in x.constant([1]))
    unknown = _any(~known, w.unknown)  # [G, out]
    if moves_off_the_edge(node):
        unknown = unknown | _any(value != 0, w.unknown)
    total = torch.matmul(value.unsqueeze(1).to(w.value.dtype), w.value).flatten()
    shape = node.meta["val"].shape
    unknown = unknown.flatten()
    if isinstance(node.args[2], Node):
        total, unknown = total + env[node.args[2]].value, unknown | env[node.args[2]].unknown
    form = (1, -1, *[1] * (len(shape) - 2))
    return some(total.view(form).expand(shape), unknown.view(form).expand(shape))


def _attention(node: Node, env: Env) -> Any:
    """A mean of values with weights that sum to 1: constants stay, unless a mask hides all keys."""
    v: Known = env[node.args[2]]  # type: ignore[index]
    metas = node.meta["val"]
    known, value = v.constant([0, 1, 3])
    masked = any(isinstance(a, Node) for a in [*node.args[3:], node.kwargs.get("attn_mask")])
    if masked:
        known = known & (value == 0)
    shape = metas[0].shape
    repeat = shape[1] // value.shape[1]  # each head of keys serves a run of queries' heads
    known, value = (t.repeat_interleave(repeat, 1).unsqueeze(2) for t in (known, value))
    return [some(value.expand(shape), (~known).expand(shape)), *map(_nothing, metas[1:])]


PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
WITH_BIAS = {aten.addmm.default, aten.baddbmm.default}
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}
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
    aten.convolution.default: _convolution,
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(ATTENTION, _attention),
}
