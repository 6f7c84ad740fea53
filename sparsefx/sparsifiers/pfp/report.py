"""What a pruner keeps of every layer, and what its error bound is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsefx.sparsifiers.report import Report

if TYPE_CHECKING:
    from sparsefx.sparsifiers.base import Layer
    from sparsefx.sparsifiers.unstructured import Unstructured

VACUOUS = "the bound is vacuous at this ratio"


@dataclass(frozen=True)
class FilterRow:
    """One pruned layer.

    Args:
        layer: its qualified name.
        inputs: input channels.
        kept_inputs: those that it still reads.
        filters: output units.
        kept_filters: those that some layer still reads.
        sensitivity: sum of s_j over the channels that decide together.
        draws: m(eps).
        eps: bound on the relative error of this layer's outputs alone, for drawn channels.
        bound: "" or what the bound is worth.
    """

    layer: str
    inputs: int
    kept_inputs: int
    filters: int
    kept_filters: int
    sensitivity: float
    draws: float
    eps: float
    bound: str


@dataclass(frozen=True)
class FilterReport(Report):
    """A :class:`Report` with channels and filters; ``print`` it.

    Args:
        filters: the pruned layers.
        examples: how many were seen.
        wanted: how many the bound asks for.
    """

    filters: tuple[FilterRow, ...] = ()
    examples: int = 0
    wanted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: numbers, strings, lists, dicts."""
        rows = [dataclasses.asdict(row) for row in self.filters]
        more = {"filters": rows, "examples": self.examples, "wanted": self.wanted}
        return super().to_dict() | more

    def __str__(self) -> str:
        """Return the table of masks, then one line for each layer and what the bound is worth."""
        lines = [super().__str__(), "channels:"]
        for row in self.filters:
            lines.append(
                f"  {row.layer}: inputs {row.kept_inputs} of {row.inputs}, "
                f"filters {row.kept_filters} of {row.filters}, "
                f"sum of sensitivities {row.sensitivity:.4g}, eps {row.eps:.4g}"
                + (f": {row.bound}" if row.bound else "")
            )
        lines.append(f"examples: {self.examples}, and the bound asks for {self.wanted}")
        return "\n".join(lines)


def kept_inputs(layer: Layer[Unstructured]) -> Tensor:
    """Return which input channels a layer reads, bool [groups * in/groups], on the CPU."""
    mask = layer.target.matrix(layer.mask.mask)
    split = mask.reshape(layer.target.groups, -1, mask.shape[1], mask[0, 0].numel())
    return split.any(3).any(1).flatten().cpu()


def make_filter_report(report: Report, layers: Mapping[str, Layer[Unstructured]]) -> FilterReport:
    """Add channels, filters and bounds to a report."""
    rows, examples, wanted = [], 0, 0
    for name, layer in layers.items():
        eps, draws, total, seen, asked = layer.mask.get_buffer("allocation").tolist()
        kept, filters = kept_inputs(layer), layer.target.matrix(layer.mask.mask).flatten(1).any(1)
        examples, wanted = int(seen), int(asked)
        rows.append(
            FilterRow(
                name, len(kept), int(kept.sum()), len(filters), int(filters.sum()),
                total, draws, eps, VACUOUS if eps >= 1 else "",
            )
        )  # fmt: skip
    return FilterReport(report.steps, report.rows, report.skipped, tuple(rows), examples, wanted)
