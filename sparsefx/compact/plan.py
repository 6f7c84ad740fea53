"""What compaction did, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ShrunkTensor:
    """A parameter or buffer that lost channels.

    Attributes:
        name: its qualified name.
        before: its shape with all channels.
        after: its shape now.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class ShrunkChannels:
    """Channels (heads, groups) that went together.

    Attributes:
        size: how many there were.
        kept: the numbers of those that stayed.
        tensors: (name, dimension) of every parameter and buffer that holds them.
    """

    size: int
    kept: tuple[int, ...]
    tensors: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class LeftZeros:
    """Whole slices of zeros that had to stay.

    Attributes:
        name: of the parameter.
        dim: the dimension that numbers the slices.
        count: how many.
        reason: why.
    """

    name: str
    dim: int
    count: int
    reason: str


@dataclass(frozen=True)
class CompactPlan:
    """What :func:`sparsefx.compact_channels` did.

    Attributes:
        tensors: what shrank, from what to what.
        channels: what was removed together.
        left: zeros that could not go, and why.
        parameters_before: elements of all parameters.
        parameters_after: the same now.
        macs_before: multiply-accumulates of all products on the given inputs, zeros included.
        macs_after: the same now.
        folded: layers whose bias took over a constant that removed channels carried.
        checked: precision in which both models were compared.
        error: largest difference of an output, relative to the largest value of that output.
    """

    tensors: tuple[ShrunkTensor, ...]
    channels: tuple[ShrunkChannels, ...]
    left: tuple[LeftZeros, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    folded: tuple[str, ...]
    checked: str
    error: float

    def why(self, name: str) -> str:
        """Return why a parameter still holds slices of zeros; "" where it holds none."""
        return "; ".join(dict.fromkeys(row.reason for row in self.left if row.name == name))

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Show the tensors in a table, the zeros that stay and why, then the totals."""
        rows = [("tensor", "before", "after")]
        rows += [(t.name, _shape(t.before), _shape(t.after)) for t in self.tensors]
        lines = _table(rows) if self.tensors else ["nothing could be removed"]
        if self.left:
            lines += ["", "zeros that stay:"]
            lines += [f"  {z.name} (dim {z.dim}): {z.count}, {z.reason}" for z in self.left]
        if self.folded:
            lines += ["", f"constants folded into the bias of: {', '.join(self.folded)}"]
        return "\n".join([*lines, "", *self._summary()])

    def _summary(self) -> list[str]:
        counts = (
            ("parameters", self.parameters_before, self.parameters_after),
            ("MACs", self.macs_before, self.macs_after),
        )
        lines = [
            f"{name}: {before:,} -> {after:,} ({after / (before or 1):.1%})"
            for name, before, after in counts
        ]
        return [*lines, f"outputs in {self.checked} differ by {self.error:.1e}"]


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{name:{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}"
        for name, before, after in rows
    ]
    return [lines[0], "─" * len(lines[0]), *lines[1:]]
