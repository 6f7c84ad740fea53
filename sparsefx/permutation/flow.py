"""What is known of the tensors of a model while its graphs are walked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from sparsefx import naming
from sparsefx.permutation.axes import Dim, new_dim, pin, unify


@dataclass
class Flow:
    """The dimensions of every tensor, and what operators did across them.

    Attributes:
        of_node: dimensions of a node's value: one list, or one for each tensor of a tuple.
        tensors: the dimensions of every tensor, parameters included.
        mixes: (R, O): an operator combined coordinates of the dimensions R with one another, so
            the permutation of a dimension in O can't depend on the coordinate in R.
        training: whether it is the training graph, where noise is drawn alike for each channel.
    """

    of_node: dict[Node, list[Any]] = field(default_factory=dict)
    tensors: list[list[Dim]] = field(default_factory=list)
    mixes: list[tuple[list[Dim], list[Dim]]] = field(default_factory=list)
    training: bool = False

    def dims(self, node: Any) -> list[Dim]:
        """Return the dimensions of a tensor."""
        return self.of_node[node]

    def mix(self, along: Sequence[Dim], *others: Sequence[Dim]) -> None:
        """Note that coordinates of ``along`` are combined, for each coordinate of ``others``."""
        self.mixes.append((list(along), [dim for group in others for dim in group]))

    def pin_all(self, nodes: Iterable[Node], reason: str) -> None:
        """Pin whatever these nodes hold."""
        for node in nodes:
            for dims in entries(self.of_node.get(node, [])):
                for dim in dims:
                    pin(dim, reason)


Rule = Callable[[Flow, Node], list[Any]]


def entries(found: list[Any]) -> list[list[Dim]]:
    """Return the tensors of a node's value: one, or those of a tuple."""
    return found if found and isinstance(found[0], list) else [found]


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of a node's value, which must be a tensor."""
    return tuple(node.meta["val"].shape)


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """Return an argument by place or name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def axis_of(node: Node, place: int, name: str, rank: int, default: int = 0) -> int:
    """Return an argument that numbers a dimension, counted from the front."""
    dim: int = argument(node, place, name, default)
    return dim % rank if rank else 0


def fresh(value: Any, reason: str = "") -> list[Any]:
    """Return new dimensions for a value: a tensor or several."""
    if isinstance(value, Tensor):
        return [new_dim(int(size), reason) for size in value.shape]
    if isinstance(value, list | tuple):
        return [fresh(item, reason) for item in value]
    return []


def place(node: Node) -> str:
    """Name an operator and its line, for reasons: ``cumsum (model.py:12)``."""
    target: Any = node.target
    line = naming.source_line(node)
    return naming.op_name(target) + (f" ({line})" if line else "")


def unify_broadcast(out: Sequence[Dim], shape: Sequence[int], *inputs: tuple[Any, Any]) -> None:
    """Unify inputs, as (dimensions, shape), with the tensor that they are broadcast to."""
    for dims, sizes in inputs:
        for dim, size, target, wanted in zip(
            reversed(dims), reversed(sizes), reversed(out), reversed(shape), strict=False
        ):
            if size == wanted:
                unify(target, dim)


def pinned_along(flow: Flow, node: Node, dims: Iterable[int], why: str) -> list[Any]:
    """Pin dimensions of the first operand in which places matter; the others pass.

    Args:
        flow: what is known.
        node: its value, or each tensor of it, has the rank of the operand, or lacks ``dims``.
        dims: of the operand, counted from the front.
        why: says what the operator does to them.
    """
    operand = node.args[0]
    given, along = flow.dims(operand), set(dims)
    reason = f"{place(node)} {why}"
    for dim in along:
        pin(given[dim], reason)
    rest = [dim for i, dim in enumerate(given) if i not in along]
    flow.mix([given[dim] for dim in along], rest)

    def one(value: Tensor) -> list[Dim]:
        if value.dim() != len(given):
            return list(rest)
        sizes = list(value.shape)
        return [
            new_dim(int(sizes[i]), reason) if i in along else dim for i, dim in enumerate(given)
        ]

    value = node.meta["val"]
    return one(value) if isinstance(value, Tensor) else [one(item) for item in value]
