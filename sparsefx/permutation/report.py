"""What a permutation did, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PermutedClass:
    """Channels that were permuted together.

    Attributes:
        size: how many channels; of one block where there are several.
        blocks: how many blocks have a permutation of their own (heads, groups).
        moved: how many channels left their place, in all blocks.
        tensors: (name, dimension) of every parameter and buffer that was permuted.
        layers: names of the layers that sum over these channels.
        order: the channel that each place took, one list for each block.
    """

    size: int
    blocks: int
    moved: int
    tensors: tuple[tuple[str, int], ...]
    layers: tuple[str, ...]
    order: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PermutedLayer:
    """A product with a weight.

    Attributes:
        layer: its name.
        weight: the parameter's name; "" where the weight is computed.
        dim: the dimension that is summed over.
        total: sum of the weight's magnitudes; 0 where it isn't counted.
        before: what N:M kept of that.
        after: what it keeps now.
        reason: why its channels weren't permuted; "" where they were.
    """

    layer: str
    weight: str
    dim: int
    total: float
    before: float
    after: float
    reason: str


@dataclass(frozen=True)
class PermutationReport:
    """What :func:`sparsefx.permute_channels` did.

    Attributes:
        n: number kept of every m.
        m: size of a group.
        classes: what was permuted.
        layers: every product with a weight, in the order of the graph.
        checked: precision in which a copy of the model was compared.
        error: largest difference of an output, relative to the largest output.
        tolerance: what was allowed.
    """

    n: int
    m: int
    classes: tuple[PermutedClass, ...]
    layers: tuple[PermutedLayer, ...]
    checked: str
    error: float
    tolerance: float

    @property
    def before(self) -> float:
        """Share of all counted magnitude that N:M kept; 1.0 where nothing is counted."""
        return self._share([layer.before for layer in self.layers])

    @property
    def after(self) -> float:
        """The same now: never less."""
        return self._share([layer.after for layer in self.layers])

    def _share(self, kept: list[float]) -> float:
        total = sum(layer.total for layer in self.layers)
        return sum(kept) / total if total else 1.0

    def why(self, layer: str) -> str:
        """Return why a layer's channels were not permuted; "" where they were.

        Raises:
            KeyError: no such layer.
        """
        found = {row.layer: row.reason for row in self.layers}
        if layer not in found:
            raise KeyError(f"no layer {layer!r}; there are {sorted(found)}")
        return found[layer]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, for JSON."""
        return {**asdict(self), "before": self.before, "after": self.after}

    def __str__(self) -> str:
        """Show the layers in a table, the reasons below it, then the totals."""
        reasons = list(dict.fromkeys(row.reason for row in self.layers if row.reason))
        rows = [("layer", f"kept by {self.n}:{self.m}", "now", "gain", "")]
        for row in self.layers:
            mark = f"[{reasons.index(row.reason) + 1}]" if row.reason else "permuted"
            if row.total:
                shares = row.before / row.total, row.after / row.total
                gain = f"{100 * (shares[1] - shares[0]):+.2f}"
                rows.append((row.layer, f"{shares[0]:.2%}", f"{shares[1]:.2%}", gain, mark))
            else:
                rows.append((row.layer, "", "", "", mark))
        gain = f"{100 * (self.after - self.before):+.2f}"
        rows.append(("all", f"{self.before:.2%}", f"{self.after:.2%}", gain, ""))
        lines = _table(rows)
        if reasons:
            lines += ["", "why not permuted:"]
            lines += [f"  [{i}] {reason}" for i, reason in enumerate(reasons, 1)]
        return "\n".join([*lines, "", self._summary()])

    def _summary(self) -> str:
        tensors = len({name for one in self.classes for name, _ in one.tensors})
        return (
            f"{len(self.classes)} classes of channels permuted, in {tensors} tensors; outputs of a "
            f"copy in {self.checked} differ by {self.error:.1e} (allowed: {self.tolerance:.1e})"
        )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:4], widths[1:4], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[4]]).rstrip())
    rule = "─" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
