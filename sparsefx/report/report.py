"""What a compilation did: rows, totals, graphs before and after each pass."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule

from sparsefx.capture import Compilation
from sparsefx.config import SparseConfig
from sparsefx.errors import ConfigError
from sparsefx.report import table
from sparsefx.report.graphs import TracedGraph
from sparsefx.report.printer import diff_graphs
from sparsefx.report.rows import Row, rows_of
from sparsefx.report.totals import Totals, totals_of


class Report:
    """What became of every product of a model, and why.

    ``str(report)`` is a table of at most 120 columns. Graphs are traced and printed when they are
    asked for.

    Attributes:
        config: what was asked for.
        sites: one row per product of every graph; see :class:`sparsefx.report.rows.Row`.
        failures: passes that failed, with node and layer; what they failed at stayed dense.
    """

    def __init__(self, records: Sequence[Compilation], config: SparseConfig) -> None:
        """Make the rows of every graph; one that a compile cache answered is traced again."""
        self.config = config
        self._graphs = [TracedGraph(record) for record in records]
        self.sites: tuple[Row, ...] = tuple(
            row for i, graph in enumerate(self._graphs) for row in rows_of(graph.outcome, i)
        )
        failures = (text for graph in self._graphs for text in graph.outcome.failures)
        self.failures: tuple[str, ...] = tuple(dict.fromkeys(failures))

    # --- figures

    @cached_property
    def totals(self) -> Totals:
        """Operations, weight bytes and saved-activation bytes, dense and sparse."""
        plans = [plan for graph in self._graphs for plan in graph.outcome.plans]
        return totals_of(self.sites, plans, [graph.saved_bytes for graph in self._graphs])

    def why(self, layer: str = "*") -> list[str]:
        """Say what became of the products of some layers.

        Args:
            layer: a glob on layer names.

        Returns:
            One line a product: ``"fc1 grad_weight: dense: the rule says Dense()"``.
        """
        return [
            f"{row.layer} {row.role}: "
            + (f"dense: {row.reason}" if row.decision is None else row.decided)
            + (f" ({row.note})" if row.note else "")
            for row in self.sites
            if fnmatch.fnmatchcase(row.layer, layer)
        ]

    def times(self) -> str:
        """Return a table of the times that the cost model expects, dense and as compiled.

        A time is of one call. Where the batch is dynamic, ``why`` says from which one on sparse
        wins.
        """
        return table.format_times(self.sites)

    # --- graphs

    @property
    def forward(self) -> tuple[GraphModule, ...]:
        """The rewritten forward of each graph, every sparse product one sparsefx op."""
        return tuple(graph.rewritten[0] for graph in self._graphs)

    @property
    def backward(self) -> tuple[GraphModule | None, ...]:
        """The rewritten backward of each graph; None where a graph has none."""
        return tuple(graph.rewritten[1] for graph in self._graphs)

    @property
    def stages(self) -> list[list[tuple[str, str]]]:
        """For each graph: (name, text) as "captured", then after each pass.

        Forward and backward are still one graph here. Where the passes failed as a whole, only
        "captured" is there.
        """
        return [graph.texts for graph in self._graphs]

    @property
    def before(self) -> tuple[str, ...]:
        """Each graph as it was captured, as text."""
        return tuple(graph.texts[0][1] for graph in self._graphs)

    @property
    def after(self) -> tuple[str, ...]:
        """Each graph after the last pass, as text."""
        return tuple(graph.texts[-1][1] for graph in self._graphs)

    def diff(self, stage: str | int, graph: int = 0) -> str:
        """Return what one pass changed, as a unified diff; "" where it changed nothing.

        Args:
            stage: the pass's name, or its place in ``stages[graph]`` (0 is "captured").
            graph: which graph.

        Raises:
            ValueError: for a pass or a graph that isn't there, listing those that are.
        """
        if not 0 <= graph < len(self._graphs):
            raise ValueError(
                f"graph={graph}: this report has {table.count_of(len(self._graphs), 'graph')}"
            )
        stages = self._graphs[graph].trace.stages
        names = [name for name, _ in stages]
        places = [i for i, name in enumerate(names) if i and stage in (i, name)]
        if not places:
            raise ValueError(f"{stage!r} is not a pass of graph {graph}: {', '.join(names[1:])}")
        place = places[0]
        (before, old), (after, new) = stages[place - 1 : place + 1]
        return diff_graphs(old, new, (before, after))

    # --- forms

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json.dumps`` takes; dynamic sizes are strings."""
        return {
            "versions": {"sparsefx": _version(), "torch": torch.__version__},
            "config": _plain(self.config),
            "graphs": len(self._graphs),
            "sites": [row.to_dict() for row in self.sites],
            "totals": self.totals.to_dict(),
            "failures": list(self.failures),
        }

    def __repr__(self) -> str:
        """Say how much there is, without the table."""
        sparse = sum(row.decision is not None for row in self.sites)
        return (
            f"<sparsefx Report: {sparse} of {len(self.sites)} products sparse, "
            f"{table.count_of(len(self._graphs), 'graph')}>"
        )

    def __str__(self) -> str:
        """Return the table, the reasons, the totals, the failures and a legend."""
        if not self.sites:
            return f"{self!r}: nothing to list"
        parts = [
            table.format_rows(self.sites),
            table.format_reasons(self.sites),
            table.format_notes(self.sites),
            table.format_totals(self.totals),
            "\n".join(["failures:", *(f"  {text}" for text in self.failures)])
            if self.failures
            else "",
            table.format_legend(self.sites),
        ]
        return "\n\n".join(part for part in parts if part)


def _plain(config: SparseConfig) -> Any:
    try:
        return config.to_dict()
    except ConfigError:  # a predicate or a pass without an importable name
        return repr(config)


def _version() -> str:
    # the package's own module stands above this room, and is always imported before it
    return str(sys.modules["sparsefx"].__version__)
