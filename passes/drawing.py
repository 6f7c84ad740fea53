"""Nodes that choose pairs, for rewrite_sampled: scores, noise, indices, scale.

Noise is drawn in the forward for all three products, and what it chose is marked MUST_SAVE: a
partitioner that drew again in the backward would give silently wrong gradients. It heeds the mark
only for what a result of the forward depends on, so what a gradient alone needs is tied to its
layer's forward by ``after``, which no code is generated for.
"""

import math
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from sparsefx import compat, ops
from sparsefx.config import Sampled
from sparsefx.plan import Plan
from sparsefx.rewriting import emit, plan_of, size, value, wrap

aten = torch.ops.aten
Size = int | Node


class Drawn(NamedTuple):
    """What a product samples: pairs, their scale, whether one pair more stands for the rest."""

    indices: Node
    scale: Node | None = None
    rest: bool = False

    def pairs(self) -> tuple[Node | bool | None, ...]:
        """Trailing arguments of an op that takes a scale; none where both are as by default."""
        return (self.scale, self.rest) if self.scale is not None or self.rest else ()

    def tail(self) -> tuple[bool, ...]:
        """Trailing arguments of an op whose operand holds the scale already."""
        return (True,) if self.rest else ()


_BEFORE_SCALE = {ops.sampled_mm: 4, ops.sampled_bmm: 3, ops.sampled_conv: 8}


def drawn_by(node: Node) -> Drawn | None:
    """Read back what a sampled forward drew; None for any other node."""
    if node.target not in _BEFORE_SCALE:
        return None
    args: Any = node.args
    return Drawn(args[2], *args[_BEFORE_SCALE[node.target] :])


def draw_columns(node: Node, left: Node, right: Node, plan: Plan, pattern: Sampled) -> Drawn:
    """Choose pairs of left [*, M, K] @ right [*, K, N] before ``node``."""
    depth = size(node, left, value(left).dim() - 1)
    scores = side_of(plan, pattern)
    shared = pattern.shared and value(left).dim() == 3
    if _plain(pattern) and scores in ("left", "right", "product") and not shared:
        k = count(node, depth, pattern)
        return Drawn(_kept(emit(node, ops.topk_mm_indices, left, right, k, scores)))
    centred = pattern.estimator == "topk_mean"
    found = emit(node, ops.mm_scores, left, right, scores, centred, shared)
    return choose(node, found, depth, plan, pattern)


def draw_channels(
    node: Node, x: Node, w: Node, axis: str, groups: int, plan: Plan, pattern: Sampled
) -> Drawn:
    """Choose channels, or examples, of a convolution's product before ``node``."""
    depth: Size = value(w).shape[1]
    if axis == "out":
        depth = value(w).shape[0] // groups
    elif axis == "batch":
        depth = size(node, x, 0)
    scores = SIDES.get(pattern.scores, pattern.scores)
    if _plain(pattern) and scores in ("left", "right", "product"):
        k = count(node, depth, pattern)
        return Drawn(_kept(emit(node, ops.topk_conv_indices, x, w, k, axis, groups, scores)))
    centred = pattern.estimator == "topk_mean"
    found = emit(node, ops.conv_scores, x, w, axis, groups, scores, centred)
    return choose(node, found, depth, plan, pattern)


def _plain(pattern: Sampled) -> bool:
    return pattern.estimator == "topk" and pattern.mass is None


SIDES = {"weight": "right", "input": "left"}


def side_of(plan: Plan, pattern: Sampled) -> str:
    """Which operand's norms score: a transposed product has the weight on the left."""
    side = SIDES.get(pattern.scores, pattern.scores)
    turned = plan.flipped != (plan.site.role == "forward" and plan.site.weight == "left")
    if turned and side in ("left", "right"):
        return "left" if side == "right" else "right"
    return side


def choose(node: Node, scores: Node, depth: Size, plan: Plan, pattern: Sampled) -> Drawn:
    """Choose pairs by their scores [*, K] before ``node``."""
    k = count(node, depth, pattern)
    if pattern.mass is not None:
        return _pair(emit(node, ops.mass_indices, scores, k, pattern.min_k, pattern.mass))
    if not pattern.random:
        chosen = _kept(emit(node, ops.topk_indices, scores, k))
        return Drawn(chosen, None, pattern.estimator == "topk_mean")
    noise = _noise(node, scores, plan, pattern)
    if pattern.estimator == "systematic":
        return _pair(emit(node, ops.systematic_indices, scores, noise, k))
    if pattern.estimator == "bernoulli":
        room = _room(node, depth, k, pattern)
        return _pair(emit(node, ops.bernoulli_indices, scores, noise, k, room))
    return _pair(emit(node, ops.with_replacement_indices, scores, noise, k))


def _pair(both: Node) -> Drawn:
    position = both.next
    indices, scale = (
        emit(both, operator.getitem, both, place, before=position) for place in (0, 1)
    )
    return Drawn(_kept(indices), _kept(scale))


def _kept(node: Node) -> Node:
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return node


# --- sizes


def count(node: Node, depth: Size, pattern: Sampled) -> Size:
    """Pairs kept, as ``Sampled.k`` says; in the graph where K is symbolic."""
    if isinstance(depth, int):
        return pattern.k(depth)
    share = pattern.mass if pattern.ratio is None else pattern.ratio
    exact = emit(node, operator.mul, emit(node, torch.sym_float, depth), share)
    whole = emit(node, math.trunc if pattern.ratio is not None else math.ceil, exact)
    least = emit(node, torch.sym_max, whole, pattern.min_k)
    return emit(node, torch.sym_min, least, depth)


def _room(node: Node, depth: Size, k: Size, pattern: Sampled) -> Size:
    """Pairs computed, as ``Sampled.size`` says."""
    if isinstance(depth, int):
        return pattern.size(depth)
    spare = emit(node, operator.add, emit(node, operator.floordiv, k, 8), 32)
    return emit(node, torch.sym_min, emit(node, operator.add, k, spare), depth)


# --- noise


def forward_of(node: Node, plan: Plan) -> Node | None:
    """The forward product of the layer call that ``node`` belongs to, if it stands before it."""
    if plan.site.role == "forward":
        return node
    for other in node.graph.nodes:
        if other is node:
            return None
        found = plan_of(other)
        if found and found.site.group == plan.site.group and found.site.role == "forward":
            return other  # type: ignore[no-any-return]
    return None


def _noise(node: Node, scores: Node, plan: Plan, pattern: Sampled) -> Node:
    """Uniform numbers [*, n], drawn in the forward where their number is known there."""
    place = forward_of(node, plan) or node
    sizes = [_size_at(place, wanted) for wanted in value(scores).shape]
    if None in sizes:
        place, sizes = node, [size(node, scores, d) for d in range(value(scores).dim())]
    *batch, depth = (found for found in sizes if found is not None)
    numbers: Size = 1
    if pattern.estimator == "bernoulli":
        numbers = depth
    elif pattern.estimator == "with_replacement":
        numbers = count(place, depth, pattern)
    noise = emit(
        place, aten.rand.default, [*batch, numbers], dtype=torch.float32,
        device=value(scores).device, pin_memory=False,
    )  # fmt: skip
    if place is not node:
        hold(place, noise)
    return _kept(noise)


def hold(forward: Node, *drawn: Node | None) -> None:
    """Make the result of ``forward`` depend on what was drawn for a gradient before it."""
    others = [node for node in drawn if node is not None]
    wrap(forward, lambda put: put(ops.after, forward, others))


def _size_at(place: Node, wanted: Any) -> Size | None:
    """A size as ``place`` can read it: an int, or an axis of one of its operands."""
    found = compat.settled(wanted)
    if isinstance(found, int):
        return found
    for operand in place.all_input_nodes:
        if isinstance(operand.meta.get("val"), torch.Tensor):
            for dim, other in enumerate(value(operand).shape):
                if str(other) == str(wanted):  # the same expression: no guard is made
                    return emit(place, aten.sym_size.int, operand, dim)
    return None
