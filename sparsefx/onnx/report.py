"""What an export wrote: one row per stored tensor, and how far the file is from the model."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

_WIDTH = 44  # of the column of names


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the file.

    Attributes:
        name: of the initializer in the file.
        shape: as stored; the exporter may have transposed the parameter.
        bytes: as stored: of a packed tensor's values and codes, of a sparse one's values and
            indices.
        density: share of elements that aren't zero.
        pattern: "2:4 along dim 1" or "2:4 transposable"; empty where no zeros were asked for.
        parameter: the model's name for it; empty where the exporter made the tensor itself.
        form: "dense", "packed" or "coo".
        why: why in that form, with sizes; empty where no other was asked for.
        dense_bytes: with its zeros.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    density: float
    pattern: str = ""
    parameter: str = ""
    form: str = "dense"
    why: str = ""
    dense_bytes: int = 0


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
        dense_bytes: of a file with all zeros stored, to a few bytes per tensor.
        form: of the weights: "dense", "packed", "coo", or "packed and coo".
        why: why in that form: what was asked for, or what "auto" tried.
        sampled: how many products are sampled in the file.
        missing: entries of the state_dict that ``load_weights`` can't give.
    """

    path: str
    bytes: int
    rows: tuple[TensorRow, ...]
    opset: int
    max_error: float | None = None
    tolerance: float | None = None
    runtimes: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    dense_bytes: int = 0
    form: str = "dense"
    why: str = ""
    sampled: int = 0
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a table that fits 120 columns, by the model's own names where there are some."""
        shown = [row for row in self.rows if row.pattern or len(row.shape) > 1]
        rest = [row for row in self.rows if row not in shown]
        lines = [
            f"{self.path}: {_size(self.bytes)}, opset {self.opset}",
            *self._forms(),
            f"{'tensor':<{_WIDTH}} {'shape':<20} {'bytes':>10} {'density':>8} {'form':<6}  pattern",
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

    def _forms(self) -> list[str]:
        """Say what the form of the weights saves, and what else the file is no plain copy in."""
        lines = []
        if self.why:
            share = self.bytes / self.dense_bytes
            dense = _size(self.dense_bytes)
            lines.append(f"weights {self.form}, {share:.2f} of {dense} dense; {self.why}")
        if self.sampled:
            lines.append(f"{self.sampled} sampled products")
        return [part for line in lines for part in textwrap.wrap(line, 118)]


def _line(row: TensorRow) -> str:
    name = row.parameter or row.name
    if len(name) > _WIDTH:
        name = "…" + name[1 - _WIDTH :]
    shape = " x ".join(map(str, row.shape))
    return (
        f"{name:<{_WIDTH}} {shape:<20} {row.bytes:>10} {row.density:>8.3f} "
        f"{row.form:<6}  {row.pattern}"
    )


def _size(count: int) -> str:
    steps = min(int(math.log(count, 1000)), 3) if count else 0
    return f"{count / 1000**steps:.3g} {('B', 'kB', 'MB', 'GB')[steps]}"
