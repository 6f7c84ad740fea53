"""Probes: what a run of the exact model tells of each product, or has replaced in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from sparsefx.diagnostics.cuts import Lazy
from sparsefx.diagnostics.programs import Call
from sparsefx.diagnostics.streams import Stream
from sparsefx.plan import Role


class Operands:
    """A probe that gathers the operands of each call, and hands them on once all are there.

    A call's operands are let go as soon as its last product is done, so no more of them are held
    than training itself saves.
    """

    def __init__(self, take: Callable[[Call, Mapping[str, Any], list[Role]], None]) -> None:
        """Set what to do with (call, operands by the cut's input, roles that were computed)."""
        self._take = take
        self._open: dict[Call, list[tuple[dict[str, Any], list[Role]]]] = {}

    def __call__(
        self, call: Call, role: Role, values: Mapping[str, Any], exact: Callable[[], Tensor]
    ) -> Tensor:
        """See one product; a backward belongs to the last forward that has none yet."""
        found = self._open.setdefault(call, [])
        if role == "forward":
            found.append(({}, []))
        if found:  # a product that is computed again, by checkpointing, belongs to none
            held, roles = found[-1]
            held.update(values)
            roles.append(role)
            if len(roles) == len(call.sites):
                self._take(call, *found.pop())
        return exact()

    def finish(self) -> None:
        """Hand on calls whose backward never ran."""
        for call, found in self._open.items():
            for held, roles in found:
                self._take(call, held, roles)
        self._open = {}


class Replacing:
    """A probe that has some calls computed by rewritten cuts; the rest stay exact.

    The backward of a call uses what its own forward drew.
    """

    def __init__(self, graphs: Mapping[Call, GraphModule], stream: Stream) -> None:
        """Set what replaces which call, and the stream of the noise."""
        self._graphs, self._stream = graphs, stream
        self._open: dict[Call, list[tuple[Lazy, set[Role]]]] = {}

    def __call__(
        self, call: Call, role: Role, values: Mapping[str, Any], exact: Callable[[], Tensor]
    ) -> Tensor:
        """Compute one product."""
        if call not in self._graphs:
            return exact()
        found = self._open.setdefault(call, [])
        if role == "forward":
            lazy = Lazy(self._graphs[call], tuple(call.cut.feeds), self._stream)
            found.append((lazy, set(call.sites)))
        if not found:
            return exact()
        lazy, left = found[-1]
        lazy.bind(values)
        left.discard(role)
        if not left:
            found.pop()
        return lazy.result(role)
