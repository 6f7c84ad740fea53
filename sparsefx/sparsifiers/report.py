"""What a sparsifier did, as rows, as plain data, and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsefx.masks import density, retained
from sparsefx.sparsifiers.mask import full

if TYPE_CHECKING:
    from sparsefx.sparsifiers.base import Layer
    from sparsefx.sparsifiers.unstructured import P


@dataclass(frozen=True)
class Row:
    """One masked layer.

    Args:
        layer: its qualified name.
        shape: of the stored weight.
        pattern: as text, "2:4" or "4:8 transposable".
        kept: share of the weights inside the mask.
        retained: share of the total |w| inside the mask, of the unmasked weight.
        flips: mask entries that the last refresh turned.
        total_flips: those of all refreshes together.
    """

    layer: str
    shape: tuple[int, ...]
    pattern: str
    kept: float
    retained: float
    flips: int
    total_flips: int


@dataclass(frozen=True)
class Report:
    """The layers of one sparsifier; ``print`` it.

    Args:
        steps: step() calls so far.
        rows: the masked layers.
        skipped: layer -> why it is dense.
    """

    steps: int
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: numbers, strings, lists, dicts."""
        rows = [{**dataclasses.asdict(row), "shape": list(row.shape)} for row in self.rows]
        return {"steps": self.steps, "rows": rows, "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        """Return a table, and below it what was skipped and why."""
        head = ("layer", "shape", "pattern", "kept", "retained |w|", "flips", "in all")
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i < 3 else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        dense = [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, f"after {self.steps} steps", *(["dense:", *dense] * bool(dense))])


def make_report(layers: Mapping[str, Layer[P]], skipped: Mapping[str, str], steps: int) -> Report:
    """Look at every layer once. Waits for the device; gathers shards."""
    rows = []
    for name, layer in layers.items():
        weight, mask = full(layer.weight.detach()), layer.mask.mask
        last, total = layer.mask.flips.tolist()
        share = density(mask), retained(weight, mask)
        rows.append(Row(name, tuple(weight.shape), str(layer.pattern), *share, last, total))
    return Report(steps, tuple(rows), dict(skipped))


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape))
    kept, held = f"{row.kept:.1%}", f"{row.retained:.1%}"
    return row.layer, shape, row.pattern, kept, held, str(row.flips), str(row.total_flips)
