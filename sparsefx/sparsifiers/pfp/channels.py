"""Which input channels belong together, and which filters make them, read off the graph.

The walk is ``sparsefx.permutation``'s: dimensions of parameters are made of axes, and a producer's
rows and its consumers' columns are the same axis, through residual sums, concatenations, norms,
pooling and flattening alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from sparsefx import compat
from sparsefx.permutation.axes import Axis, Dim, Prod, UnifyError, factors, leaves, size_of, take
from sparsefx.permutation.flow import Flow, argument, entries
from sparsefx.permutation.places import places
from sparsefx.permutation.propagate import Model, understand
from sparsefx.permutation.state import State
from sparsefx.sparsifiers.targets import Target

aten = torch.ops.aten
_WEIGHT = {  # operator -> place of the right operand
    aten.mm.default: 1, aten.addmm.default: 2, aten.convolution.default: 1,
}  # fmt: skip
Coordinates = dict[Axis, Tensor]  # by axis, its coordinate at each place of a dimension
_NORMALISED = {aten._softmax.default, aten._log_softmax.default}


@dataclass(frozen=True, eq=False)
class Link:
    """Which rows feed which columns of one consumer: those with equal numbers.

    Args:
        consumer: name of the layer.
        rows: int64 [rows], numbers below ``count``; ``count + 1`` where they aren't meant.
        columns: int64 [input channels]; ``count`` where the rows have no part.
        count: how many numbers there are.
    """

    consumer: str
    rows: Tensor
    columns: Tensor
    count: int

    @property
    def fed(self) -> Tensor:
        """Rows that feed this consumer at all, bool [rows]."""
        return torch.isin(self.rows, self.columns)

    def needed(self, kept: Tensor) -> Tensor:
        """Rows that a kept column reads, bool [rows]; ``kept`` is bool [input channels]."""
        table = torch.zeros(self.count + 2, dtype=torch.bool)
        table[self.columns[kept]] = True
        return table[self.rows]


@dataclass(frozen=True, eq=False)
class Rows:
    """Filters of a layer, or entries of a bias or of a norm's vector.

    Args:
        size: how many.
        links: to every consumer; none where something else reads them, too.
    """

    size: int
    links: tuple[Link, ...] = ()

    def needed(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Return what stays, bool [size]: what a kept channel reads, or what nobody accounts for.

        Args:
            kept: by consumer, bool [input channels].
        """
        out = torch.zeros(self.size, dtype=torch.bool)
        fed = torch.zeros_like(out)
        for link in self.links:
            out |= link.needed(kept[link.consumer])
            fed |= link.fed
        return out | ~fed


@dataclass
class Wiring:
    """How the layers hang together.

    Attributes:
        units: layer -> number of the unit of each input channel, int64 [input channels]. A unit is
            one channel; behind a flattened image, all positions of a channel together.
        groups: sets of layers that read the same units, and so decide together.
        rows: layer -> its filters.
        vectors: parameter -> its entries, for biases and norms.
    """

    units: dict[str, Tensor] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    rows: dict[str, Rows] = field(default_factory=dict)
    vectors: dict[str, Rows] = field(default_factory=dict)


def wiring_of(
    model: nn.Module, targets: Sequence[Target], left_alone: Iterable[str], batch: Any
) -> Wiring:
    """Trace the model in eval mode on a batch and read off how its layers hang together.

    Args:
        model: a plain one; left as it is.
        targets: layers whose input channels are pruned.
        left_alone: names of parameters that keep their values.
        batch: a tensor, a tuple or list of arguments, or a mapping of them.
    """
    named = dict(batch) if isinstance(batch, Mapping) else {}
    args = () if named else tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    with compat.as_written(model) as written:
        known = understand(written, args, named, keep_output_dense=False, training=False)
    states = {target.name: known.states[id(target.weight)] for target in targets}
    inputs = {t.name: _input(t, states[t.name]) for t in targets}
    outputs = {t.name: states[t.name].dims[1 if t.kind == "conv1d" else 0] for t in targets}
    columns = {states[t.name]: set(leaves(states[t.name].dims[t.axis])) for t in targets}
    free, readers = _free(known, columns), {n: _coordinates(dim) for n, dim in inputs.items()}
    wiring = _grouped(inputs, readers, outputs.values())
    for name, dim in outputs.items():
        wiring.rows[name] = _rows(dim, readers, free)
    for state in known.states.values():
        if _is_vector(state) and state.name not in left_alone:
            rows = _rows(state.dims[0], readers, free)
            if rows.links:
                wiring.vectors[state.name] = rows
    return wiring


def _is_vector(state: State) -> bool:
    tensor = state.tensor
    is_plain = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return state.read and is_plain and tensor.dim() == 1


def _input(target: Target, state: State) -> Dim:
    """The input channels of a layer: its columns, for each group of a convolution."""
    columns = state.dims[target.axis]
    if target.groups == 1:
        return columns
    try:
        group = take(list(factors(state.dims[0])), target.groups)[0]
    except UnifyError:  # its places in the output don't fit the groups
        group = [Axis(target.groups, reason="its groups can't be told apart")]
    return Prod((*group, columns))


# --- axes that nothing but our layers sums over


def _free(known: Model, columns: Mapping[State, set[Axis]]) -> set[Axis]:
    """Axes whose coordinates may fall to zero when our layers' columns for them are zero.

    Args:
        known: the walked model; what it pinned is not free.
        columns: by our layers' weights, the axes that they are meant to sum over.
    """
    flow = known.flow
    by_dims = {id(state.dims): state for state in known.states.values()}
    axes = {a for s in known.states.values() for dim in s.dims for a in leaves(dim)}
    for node in flow.of_node:
        if node.op == "call_function":
            weight = _weight_of(flow, node, by_dims)
            ours = columns.get(weight, set()) if weight is not None else set()
            axes -= _lost(flow, node) - ours
    return {axis for axis in axes if not axis.reason}


def _lost(flow: Flow, node: Node) -> set[Axis]:
    """Axes over which a node sums, or does anything but carry them on."""
    lost = _axes(flow, node.all_input_nodes) - _axes(flow, [node])
    if node.target in _NORMALISED:
        operand: Any = node.args[0]
        lost |= set(leaves(flow.dims(operand)[argument(node, 1, "dim")]))
    return lost


def _axes(flow: Flow, nodes: Iterable[Node]) -> set[Axis]:
    found = (dim for n in nodes for dims in entries(flow.of_node.get(n, [])) for dim in dims)
    return {axis for dim in found for axis in leaves(dim)}


def _weight_of(flow: Flow, node: Node, by_dims: Mapping[int, State]) -> State | None:
    """The parameter that a product multiplies with, seen through views and casts."""
    if node.target not in _WEIGHT:
        return None
    source: Any = node.args[_WEIGHT[node.target]]
    while source.op == "call_function" and len(source.all_input_nodes) == 1:
        source = source.all_input_nodes[0]
    return by_dims.get(id(flow.of_node[source]))


# --- coordinates


def _coordinates(dim: Dim) -> Coordinates:
    """Return, by axis, its coordinate at each place of a dimension; -1 where it has none."""
    found: Coordinates = {}
    for spot in places(dim):
        at = found.setdefault(spot.axis, torch.full((size_of(dim),), -1))
        at[spot.positions] = spot.local
    return found


def _grouped(
    inputs: Mapping[str, Dim], readers: Mapping[str, Coordinates], outputs: Iterable[Dim]
) -> Wiring:
    made = {axis for dim in outputs for axis in leaves(dim)}
    wiring, same = Wiring(), dict[Any, list[str]]()
    for name, dim in inputs.items():
        found = readers[name]
        axes = sorted([a for a in found if a in made] or found, key=id)
        every = torch.arange(size_of(dim))
        alone = torch.stack([found[a] for a in axes]).amax(0) < 0 if axes else every >= 0
        keys = torch.stack([*(found[a] for a in axes), torch.where(alone, every, -1)], 1)
        unique, wiring.units[name] = torch.unique(keys, dim=0, return_inverse=True)
        where = tuple(map(id, axes)) if axes else name
        same.setdefault((where, tuple(unique.flatten().tolist())), []).append(name)
    wiring.groups = list(same.values())
    return wiring


def _rows(dim: Dim, readers: Mapping[str, Coordinates], free: set[Axis]) -> Rows:
    mine = _coordinates(dim)
    if not mine or not set(mine) <= free:
        return Rows(size_of(dim))
    present = torch.stack([mine[axis] >= 0 for axis in mine], 1)
    links = list[Link]()
    for pattern in torch.unique(present, dim=0):  # the parts of a sum, one after another
        inside = (present == pattern).all(1)
        axes = [axis for axis, is_there in zip(mine, pattern.tolist(), strict=True) if is_there]
        rows = torch.stack([mine[axis] for axis in axes], 1)
        for name, theirs in readers.items():
            if (link := _link(name, rows, inside, axes, theirs)) is not None:
                links.append(link)
    return Rows(size_of(dim), tuple(links))


def _link(
    name: str, rows: Tensor, inside: Tensor, axes: Sequence[Axis], theirs: Coordinates
) -> Link | None:
    """Match rows and columns that have all axes in common.

    A layer without one of them reads what another one summed over it, which has its own link.
    """
    if any(axis not in theirs for axis in axes):
        return None
    columns = torch.stack([theirs[axis] for axis in axes], 1)
    unique, numbers = torch.unique(torch.cat([rows, columns]), dim=0, return_inverse=True)
    count = len(unique)
    ours = torch.where(inside, numbers[: len(rows)], count + 1)
    others = torch.where(columns.amin(1) < 0, count, numbers[len(rows) :])
    return Link(name, ours, others, count)
