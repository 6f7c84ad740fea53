"""The graphs behind a report: before and after each pass, and split into forward and backward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from sparsefx import compat, pipeline
from sparsefx.capture import Compilation, trace_again
from sparsefx.compat import OpOverload
from sparsefx.errors import SparsefxWarning
from sparsefx.naming import op_name
from sparsefx.pipeline import Outcome
from sparsefx.report.printer import format_graph
from sparsefx.rewriting import PassResult, copy_graph_module

CAPTURED = "captured"


@dataclass(frozen=True)
class Trace:
    """A run of the pipeline on one graph.

    Attributes:
        outcome: what it decided and did.
        stages: the graph as it was captured, and after each pass, by name.
        final: the graph that is compiled: the captured one where nothing became sparse.
        results: how many outputs of the joint graph belong to the forward.
        joint: whether forward and backward are in one graph; else there is no backward.
    """

    outcome: Outcome
    stages: list[tuple[str, GraphModule]]
    final: GraphModule
    results: int
    joint: bool


class TracedGraph:
    """One graph of a report. What was recorded is told at once; the rest is traced when asked."""

    def __init__(self, record: Compilation) -> None:
        """Keep the record; nothing is traced yet."""
        self.record = record

    @property
    def outcome(self) -> Outcome:
        """What became of every product: as it ran, else as it comes out when traced again."""
        return self.record.outcome or self.trace.outcome

    @cached_property
    def trace(self) -> Trace:
        """The passes, run again on a fresh trace."""
        if self.record.outcome is None:
            return _trace(self.record)
        with warnings.catch_warnings():  # the first run has said it already
            warnings.simplefilter("ignore", SparsefxWarning)
            return _trace(self.record)

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """The graph as text, as captured and after each pass."""
        return [(name, format_graph(gm)) for name, gm in self.trace.stages]

    @cached_property
    def rewritten(self) -> tuple[GraphModule, GraphModule | None]:
        """Forward and backward with every sparse product still one op, as after ``cleanup``."""
        done = [gm for name, gm in self.trace.stages if name == "cleanup"]
        return self._split(done[-1] if done else self.trace.stages[-1][1])

    @cached_property
    def saved_bytes(self) -> tuple[int, int]:
        """Activations kept for the backward: (dense, sparse)."""
        return self._saved(self.trace.stages[0][1]), self._saved(self.trace.final)

    def _split(self, gm: GraphModule) -> tuple[GraphModule, GraphModule | None]:
        work = copy_graph_module(gm)
        if not self.trace.joint:
            work.recompile()
            return work, None
        return compat.partition(work, self.trace.results)

    def _saved(self, gm: GraphModule) -> int:
        if not self.trace.joint:
            return 0
        forward, _ = self._split(gm)
        saved = next(iter(forward.graph.find_nodes(op="output"))).args[0][self.trace.results :]
        kept = dict.fromkeys(base for node in saved for base in _bases(node))
        return sum(_bytes(node) for node in kept)


def _trace(record: Compilation) -> Trace:
    stages: list[tuple[str, GraphModule]] = []
    done: list[tuple[Outcome, GraphModule]] = []
    seen: list[tuple[str, int]] = []

    def rewrite(graph: GraphModule) -> None:
        stages.append((CAPTURED, copy_graph_module(graph)))
        outcome = pipeline.run(graph, record.config, stage)
        done.append((outcome, copy_graph_module(graph)))

    def stage(name: str, graph: GraphModule, _: PassResult) -> None:
        stages.append((name, graph))

    trace_again(record, rewrite, lambda kind, _, results: seen.append((kind, results)))
    (outcome, final), (kind, results) = done[0], seen[0]
    return Trace(outcome, stages, final, results, kind != "inference")


def _bases(node: Node) -> Iterator[Node]:
    """What a saved value keeps alive: nothing of its own if it is an input or a view of one."""
    while node.op == "call_function" and _is_view(node):
        node = node.all_input_nodes[0]
    if node.op == "call_function":
        yield node


def _is_view(node: Node) -> bool:
    if isinstance(node.target, OpOverload):
        return bool(node.target.is_view) or op_name(node.target) == "_unsafe_view"
    return False


def _bytes(node: Node) -> int:
    found: Any = node.meta.get("val")
    if not isinstance(found, Tensor) or not all(map(compat.has_size, found.shape)):
        return 0
    return math.prod(map(compat.size_hint, found.shape)) * found.element_size()
