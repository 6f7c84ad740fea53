"""What a graph sums over, where a term of a sum is 0 or a constant, and what is no plain sum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx.compact.evaluate import NORMALISED, evaluate, reduced_dims
from sparsefx.compact.known import Env, Known
from sparsefx.compact.products import (
    ATTENTION,
    PRODUCTS,
    WITH_BIAS,
    grouped,
    moves_off_the_edge,
    taps,
)
from sparsefx.permutation.axes import UNIT, Axis, Dim, Prod, factors, leaves, take
from sparsefx.permutation.flow import Flow, argument, entries, place, shape_of
from sparsefx.permutation.maths import MATHS
from sparsefx.permutation.moves import MOVES
from sparsefx.permutation.propagate import Model
from sparsefx.permutation.state import State

aten = torch.ops.aten
_FILLED = MATHS[aten.full_like.default]
_CARRIES = {  # a stored weight, seen through these, is still that weight
    aten.t.default, aten.permute.default, aten.transpose.int, aten.view.default,
    aten.clone.default, aten.expand.default, aten._unsafe_view.default, aten.unsqueeze.default,
}  # fmt: skip


@dataclass(eq=False)
class Contraction:
    """A sum over a dimension.

    Attributes:
        where: the weight's name, or the operator and its line.
        along: what is summed over, K coordinates.
        out: the dimension of the result that chooses among N columns of the weight.
        matters: bool [K, N]: whether a term may be other than 0.
        constants: [K]: the constant that multiplies the weight, where that is known and not 0.
        right: [K, N]: the weight, summed over taps, where constants can be folded into a bias.
        weight: the parameter; None where it is no plain one.
    """

    where: str
    along: Dim
    out: Dim
    matters: Tensor
    constants: Tensor | None = None
    right: Tensor | None = None
    weight: State | None = None


@dataclass(eq=False)
class Cost:
    """Multiply-accumulates of a product: the product of these sizes, and of ``fixed``."""

    dims: list[Dim]
    fixed: int


@dataclass
class Found:
    """All that a model's graphs say.

    Attributes:
        sums: every sum.
        bars: axes from which nothing may be removed, with the reason.
        costs: of every product.
        groups: by a convolution's weight: the dimension of its groups.
    """

    sums: list[Contraction] = field(default_factory=list)
    bars: dict[Axis, str] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    groups: dict[State, Dim] = field(default_factory=dict)

    def bar(self, dims: Iterable[Dim], reason: str) -> None:
        """Forbid to remove anything of these; the first reason stays."""
        for dim in dims:
            for axis in leaves(dim):
                self.bars.setdefault(axis, reason)


def contractions(model: Model) -> Found:
    """Evaluate the graphs of a model as far as they are known, and gather what they sum over."""
    found = Found()
    by_dims = {id(state.dims): state for state in model.states.values()}
    graphs: dict[Any, list[Node]] = {}
    for node in model.flow.of_node:
        graphs.setdefault(node.graph, []).append(node)
    for nodes in graphs.values():
        sources = {n: by_dims[id(model.flow.of_node[n])] for n in nodes
                   if n.op == "placeholder" and id(model.flow.of_node[n]) in by_dims}  # fmt: skip
        given = {node: state.tensor for node, state in sources.items()}
        looker = _Looker(model.flow, sources, found)
        evaluate(nodes, given, looker.look)
    return found


@dataclass
class _Looker:
    flow: Flow
    sources: Mapping[Node, State]
    found: Found

    def look(self, node: Node, env: Env) -> None:
        target = node.target
        if target in PRODUCTS:
            self._product(node, env)
        elif target is aten.convolution.default:
            self._convolution(node, env)
        elif target in ATTENTION:
            self._attention(node, env)
        elif target is aten.sum.dim_IntList:
            self._sum(node, env)
        elif target not in MOVES and MATHS.get(target) is not _FILLED:
            self._barriers(node)

    def _product(self, node: Node, env: Env) -> None:
        first = 1 if node.target in WITH_BIAS else 0
        nodes: Sequence[Any] = node.args[first : first + 2]
        left, right = (env[n] for n in nodes)
        rank = left.value.dim()
        batch = list(range(rank - 2))
        is_known, value = left.constant([*batch, rank - 1])
        live = ~is_known | (value != 0)  # [*, K]
        matters = live.unsqueeze(-1) & right.live()  # [*, K, N]
        matters = matters.flatten(0, -3).any(0) if batch else matters
        dims = self.flow.dims(nodes[1])
        self.found.costs.append(Cost([*self.flow.dims(node), dims[-2]], 1))
        one = Contraction(place(node), dims[-2], dims[-1], matters)
        if not batch and (weight := self._origin(nodes[1])) is not None:
            one.where, one.weight, one.constants, one.right = (
                weight.name,
                weight,
                value,
                right.value,
            )
        self.found.sums.append(one)

    def _origin(self, node: Any) -> State | None:
        while node.op == "call_function" and node.target in _CARRIES:
            node = node.args[0]
        return self.sources.get(node)

    def _convolution(self, node: Node, env: Env) -> None:
        x, w = taps(node, env)
        groups: Any = node.args[8]
        is_known, value = (grouped(t, groups) for t in x.constant([1]))  # [G, in]
        live = ~is_known | (value != 0)
        matters = (live.unsqueeze(-1) & w.unknown).transpose(0, 1).flatten(1)  # [in, G x out]
        dims = self.flow.dims(node.args[0])
        group, inner = (Prod(tuple(part)) for part in take(list(factors(dims[1])), groups))
        weight = self._origin(node.args[1])
        if weight is not None:
            self.found.groups[weight] = group
        where = place(node) if weight is None else weight.name
        one = Contraction(where, inner, self.flow.dims(node)[1], matters, weight=weight)
        if groups == 1 and not moves_off_the_edge(node):
            one.constants, one.right = value[0], w.value[0]
        self.found.sums.append(one)
        spread = shape_of(node.args[0] if node.args[6] else node)[2:]
        channels = [self.flow.dims(node)[0], self.flow.dims(node)[1], inner]
        fixed = math.prod(spread) * math.prod(shape_of(node.args[1])[2:])
        self.found.costs.append(Cost(channels, fixed))

    def _attention(self, node: Node, env: Env) -> None:
        q, k, v = (self.flow.dims(n) for n in node.args[:3])
        self.found.costs += [Cost([*q, k[2]], 1), Cost([*q[:3], v[3], k[2]], 1)]
        self.found.bar([k[2]], f"{place(node)} normalises over it")
        if node.kwargs.get("scale") is None:
            self.found.bar([q[3]], f"{place(node)} divides by the root of its size")
            return
        ends = [env[n].live().flatten(0, 2).any(0) for n in node.args[:2]]  # type: ignore[index]
        matters = (ends[0] & ends[1]).unsqueeze(1)
        self.found.sums.append(Contraction(place(node), q[3], UNIT, matters))

    def _sum(self, node: Node, env: Env) -> None:
        held: Known = env[node.args[0]]  # type: ignore[index]
        live, dims = held.live(), self.flow.dims(node.args[0])
        for dim in reduced_dims(node, live.dim()):
            matters = live.movedim(dim, 0).flatten(1).any(1, keepdim=True) if live.dim() > 1 else (
                live.unsqueeze(1))  # fmt: skip
            self.found.sums.append(Contraction(place(node), dims[dim], UNIT, matters))

    def _barriers(self, node: Node) -> None:
        """Whatever else makes one value of many depends on how many there are."""
        out = [d for dims in entries(self.flow.of_node[node]) for d in dims]
        stays = {axis for dim in out for axis in leaves(dim)}
        for n in node.all_input_nodes:
            given = [d for dims in entries(self.flow.of_node[n]) for d in dims]
            gone = [axis for dim in given for axis in leaves(dim) if axis not in stays]
            self.found.bar(gone, f"{place(node)} depends on how many channels there are")
        if MATHS.get(node.target) is NORMALISED:
            dim: Any = argument(node, 1, "dim")
            along = self.flow.dims(node.args[0])[dim]
            self.found.bar([along], f"{place(node)} normalises over it")
