"""Tables and pictures of what was measured, in the look of the compiler's report."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from sparsefx.diagnostics.figures import Error
from sparsefx.errors import DiagnosticsError

Path = str | os.PathLike[str]
FIGURES = ("norm", "relative", "cosine", "bias", "noise", "mean", "std", "max")
WIDTH, _NARROWEST, _MOST_BARS = 120, 16, 60
_ENDINGS = (".png", ".svg", ".pdf")

# --- text


def number(value: object) -> str:
    """Write three digits of a number; text as it is."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"


def count(many: float) -> str:
    """Write a count in three digits: 1234567 as 1.23M."""
    for unit in ("", "K", "M", "G", "T"):
        if many < 999.5:
            return f"{many:.3g}{unit}"
        many /= 1000
    return f"{many:.3g}P"


def figures(error: Error) -> list[str]:
    """Write the figures of a row, in the order of ``FIGURES``."""
    return [number(getattr(error, key)) for key in FIGURES]


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], title: str, text: int = 1) -> str:
    """Print rows under heads; the first ``text`` columns are text, the others are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table  # on first print: a machine that only computes needs no rich

    cells = _fitted([tuple(heads), *(tuple(map(number, row)) for row in rows)], text)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for i, head in enumerate(cells[0]):
        made.add_column(head, no_wrap=True, justify="right" if i >= text else "left")
    for row in cells[1:]:
        made.add_row(*row)
    out = StringIO()
    Console(file=out, width=WIDTH, force_terminal=False, color_system=None, markup=False).print(
        made
    )
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([title, *lines])


def _fitted(cells: list[tuple[str, ...]], text: int) -> list[tuple[str, ...]]:
    """Shorten the widest text column until the table fits."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(range(text), key=lambda place: widths[place])
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
    return [tuple(map(_shorten, row, widths)) for row in cells]


def _shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is longer than ``width``."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def legend(draws: int) -> str:
    """Say what the words mean."""
    lines = [
        "norm: of what is exact; relative: norm of (approximate - exact) over it, root mean square "
        "of draws",
        "mean, std, max: of the entries of (approximate - exact)",
    ]
    if draws > 1:
        lines.append(
            "bias: of the mean over draws; an unbiased estimate is left with about "
            f"noise / sqrt({draws})"
        )
    return "\n".join(["legend:", *(f"  {line}" for line in lines)])


# --- plain data


def finite(value: float) -> float | None:
    """Return a number, None where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as ``json.dumps`` takes it."""
    return {key: finite(v) if isinstance(v, float) else v for key, v in row.items()}


# --- pictures


def figure(path: Path, panels: int, lines: int) -> tuple[Any, Any]:
    """Return (figure, its panels side by side), without a window.

    Raises:
        DiagnosticsError: when matplotlib isn't installed, and for an ending that names no format.
    """
    if not os.fspath(path).lower().endswith(_ENDINGS):
        raise DiagnosticsError(f"plot: {os.fspath(path)!r} must end in {', '.join(_ENDINGS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DiagnosticsError(
            "plot() needs matplotlib: pip install 'sparsefx[examples]', or read .rows"
        ) from error
    drawn = Figure(figsize=(7.5 * panels, 1.4 + 0.22 * lines), layout="constrained")
    return drawn, drawn.subplots(1, panels, squeeze=False)[0]


def bars(path: Path, panels: Sequence[tuple[str, Sequence[tuple[str, Error]]]], label: str) -> None:
    """Draw relative errors as bars and biases as marks, a panel for each (title, named rows).

    Raises:
        DiagnosticsError: as :func:`figure`.
    """
    lines = max(min(len(rows), _MOST_BARS) for _, rows in panels)
    drawn, axes = figure(path, len(panels), lines)
    for panel, (title, rows) in zip(axes, panels, strict=True):
        _bars(panel, title, rows)
        panel.set_xlabel(label)
    drawn.savefig(path, dpi=120)


def _bars(panel: Any, title: str, rows: Sequence[tuple[str, Error]]) -> None:
    if len(rows) > _MOST_BARS:
        title += f" (the {_MOST_BARS} largest of {len(rows)})"
        rows = sorted(rows, key=lambda row: row[1].relative, reverse=True)[:_MOST_BARS]
    places, found = range(len(rows)), [row for _, row in rows]
    panel.barh(places, [row.relative for row in found], color="#9ecae1", label="relative error")
    biases = [row.bias for row in found]
    panel.plot(biases, places, "|", color="#08306b", ms=9, mew=2, label="bias")
    panel.set_yticks(places, [name for name, _ in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(left=0)
    panel.set_title(title, fontsize=10)
    panel.grid(axis="x", alpha=0.3)
    panel.legend(fontsize=8)


def curves(path: Path, rows: Sequence[Any], uniform: float | None) -> None:
    """Draw ratios as bars, and beside them the curves that they were chosen on.

    Args:
        path: of the picture.
        rows: of a tuning.
        uniform: one ratio for all, for a line.

    Raises:
        DiagnosticsError: as :func:`figure`.
    """
    shown = rows[:_MOST_BARS]
    drawn, (ratios, errors) = figure(path, 2, max(len(shown), 14))
    colors = [f"C{place % 10}" for place in range(len(rows))]  # a product's bar and curve alike
    ratios.barh(range(len(shown)), [row.ratio for row in shown], color=colors, alpha=0.7)
    if uniform is not None:
        ratios.axvline(uniform, color="#08306b", lw=1, ls="--", label="one ratio for all")
        ratios.legend(fontsize=8)
    ratios.set_yticks(range(len(shown)), [f"{row.layer} {row.role}" for row in shown], fontsize=8)
    ratios.set_ylim(len(shown) - 0.4, -0.6)
    ratios.set_xlim(0, 1)
    more = f" (the first {_MOST_BARS} of {len(rows)})" if len(rows) > _MOST_BARS else ""
    ratios.set_title("ratio" + more, fontsize=10)
    for row, color in zip(rows, colors, strict=True):
        _, spent, found = zip(*row.curve, strict=True)
        errors.plot(spent, found, lw=1, alpha=0.7, color=color)
        errors.plot([row.flops], [row.relative], "o", ms=5, color=color)
    errors.set_xscale("log")
    errors.set_xlabel("FLOPs")
    errors.set_ylabel("relative error, this one alone")
    errors.set_title("what each ratio costs and spoils; dots: chosen", fontsize=10)
    errors.grid(alpha=0.3)
    drawn.savefig(path, dpi=120)
