"""What an export wrote: one row per stored tensor, and how far the file is from the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

_WIDTH = 44  # of the column of names


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the file.

    Attributes:
        name: of the initializer in the file.
        shape: as stored; the exporter may have transposed the parameter.
        bytes: as stored.
        density: share of elements that aren't zero.
        pattern: "2:4 along dim 1" or "2:4 transposable"; empty where no zeros were asked for.
        parameter: the model's name for it; empty where the exporter made the tensor itself.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    density: float
    pattern: str = ""
    parameter: str = ""


@dataclass(frozen=True)
class ExportReport:
    """What :func:`sparsefx.export_onnx` did.

    Attributes:
        path: the file.
        bytes: of the file, and of the file with external data beside it where there is one.
        rows: one per stored tensor, in the file's order.
        opset: version of the ONNX operators.
        max_error: largest difference to the eager masked model, divided by that output's largest
            magnitude; None when ``verify=False``.
        tolerance: what ``max_error`` was held against; None when ``verify=False``.
        runtimes: the runtimes that were tried, with their versions.
        hidden: masked parameters whose zeros no stored tensor shows, since the exporter merged
            them with something else; their effect on the results was still compared.
    """

    path: str
    bytes: int
    rows: tuple[TensorRow, ...]
    opset: int
    max_error: float | None = None
    tolerance: float | None = None
    runtimes: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a table that fits 120 columns, by the model's own names where there are some."""
        shown = [row for row in self.rows if row.pattern or len(row.shape) > 1]
        rest = [row for row in self.rows if row not in shown]
        lines = [
            f"{self.path}: {_size(self.bytes)}, opset {self.opset}",
            f"{'tensor':<{_WIDTH}} {'shape':<20} {'bytes':>10} {'density':>8}  pattern",
            *map(_line, shown),
        ]
        if rest:
            lines.append(f"and {len(rest)} smaller, {_size(sum(r.bytes for r in rest))} in all")
        lines += [f"zeros not visible in the file: {name}" for name in self.hidden]
        if self.max_error is None or self.tolerance is None:
            return "\n".join([*lines, "not compared in a runtime (verify=False)"])
        runtimes = ", ".join(self.runtimes)
        lines.append(
            f"largest error against the eager masked model: {self.max_error:.2g} of the largest "
            f"output (allowed {self.tolerance:.2g}; {runtimes})"
        )
        return "\n".join(lines)


def _line(row: TensorRow) -> str:
    name = row.parameter or row.name
    if len(name) > _WIDTH:
        name = "…" + name[1 - _WIDTH :]
    shape = " x ".join(map(str, row.shape))
    return f"{name:<{_WIDTH}} {shape:<20} {row.bytes:>10} {row.density:>8.3f}  {row.pattern}"


def _size(count: int) -> str:
    steps = min(int(math.log(count, 1000)), 3) if count else 0
    return f"{count / 1000**steps:.3g} {('B', 'kB', 'MB', 'GB')[steps]}"
