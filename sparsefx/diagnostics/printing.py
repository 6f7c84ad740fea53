"""Tables and pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO

from sparsefx.errors import DiagnosticsError

WIDTH = 118


def number(value: object) -> str:
    """Write three digits of a number; text as it is."""
    if not isinstance(value, float):
        return str(value)
    return "0" if value == 0 else f"{value:.3g}"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], title: str) -> str:
    """Print rows under heads; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, head in enumerate(heads):
        made.add_column(head, no_wrap=True, justify="right" if i else "left", overflow="ellipsis")
    for row in rows:
        made.add_row(*map(number, row))
    out = StringIO()
    Console(file=out, width=WIDTH, force_terminal=False, color_system=None, markup=False).print(
        made
    )
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([title, *lines])


def bars(
    path: str, names: Sequence[str], series: Mapping[str, Sequence[float]], label: str
) -> None:
    """Draw horizontal bars, a group by name, into a picture.

    Raises:
        DiagnosticsError: when matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DiagnosticsError(
            "plot() needs matplotlib: pip install 'sparsefx[examples]', or read .rows"
        ) from error
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(names) * len(series)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(series)
    for i, (key, values) in enumerate(series.items()):
        axes.barh([place + i * height for place in range(len(names))], values, height, label=key)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
