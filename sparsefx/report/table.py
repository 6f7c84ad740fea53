"""A report as text: a table of products, totals, and what the words mean; 120 columns at most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from sparsefx import cost
from sparsefx.config import Masked
from sparsefx.lowering import MASKED_DENSE
from sparsefx.report.rows import Row
from sparsefx.report.totals import Totals

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 120
_COLUMNS = ("layer", "role", "M×N×K", "dtype", "decision", "runs as", "FLOPs")  # noqa: RUF001
_GAP = 2
_SHORTEST_LAYER, _LONGEST_LOWERING, _LONGEST_TIMED = 16, 24, 40


def format_rows(rows: Sequence[Row]) -> str:
    """Print one line a product; reasons stand below, numbered, each once."""
    numbers = {reason: i for i, reason in enumerate(_reasons(rows), 1)}
    lines = [_cells(row, numbers) for row in rows]
    used = [max(map(len, column)) for column in zip(_COLUMNS, *lines, strict=True)]
    room = max(_SHORTEST_LAYER, WIDTH - sum(used[1:]) - _GAP * len(used[1:]))
    from rich import box
    from rich.table import Table  # on first print: a machine that only computes needs no rich

    padding = (0, _GAP - 1, 0, 0)  # the box puts one more space between columns
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding, show_edge=False)
    for name in _COLUMNS:
        table.add_column(name, no_wrap=True, justify="right" if name == "FLOPs" else "left")
    before: tuple[object, ...] = ()
    for row, cells in zip(rows, lines, strict=True):
        if before and row.graph != before[0]:
            table.add_section()
        here = row.graph, row.layer
        first = here != before or row.role == "forward"  # a layer may be called twice
        table.add_row(shorten(cells[0], room) if first else "", *cells[1:])
        before = here
    return _render(table)


def format_reasons(rows: Sequence[Row]) -> str:
    """Print why products are dense: number, reason, how many."""
    lines = [
        f"  [{number}] {reason} ({count_of(sum(row.reason == reason for row in rows), 'product')})"
        for number, reason in enumerate(_reasons(rows), 1)
    ]
    return "\n".join(["why dense:", *lines]) if lines else ""


def format_notes(rows: Sequence[Row]) -> str:
    """Print what of a rule does not act, and which weights hold N:M zeros without a mask."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        found = [row.note] if row.note else []
        found += [f"holds {row.holds} zeros; nothing is changed by that"] if row.holds else []
        for note in found:
            layers = notes.setdefault(note, [])
            layers += [row.layer] if row.layer not in layers else []
    lines = [f"  {_names(layers, WIDTH - len(note) - 4)}: {note}" for note, layers in notes.items()]
    return "\n".join(["notes:", *lines]) if lines else ""


def _names(layers: Sequence[str], width: int) -> str:
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    every = ", ".join(layers)
    short = shorten(layers[0], max(_SHORTEST_LAYER, width - len(more))) + more
    return every if len(every) <= width else short


def format_totals(totals: Totals) -> str:
    """Print the sums, dense against sparse."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for name in ("totals", "dense", "sparse", "", "executed"):
        table.add_column(name, no_wrap=True, justify="left" if name == "totals" else "right")
    for role, flops in totals.flops.items():
        table.add_row(
            f"FLOPs, {role}",
            number(flops.dense),
            number(flops.sparse),
            share(flops.sparse, flops.dense),
            number(flops.executed),
        )
    for name, dense, sparse in (
        ("weight bytes, packed", totals.weight_bytes, totals.packed_bytes),
        ("saved activation bytes", totals.saved_bytes, totals.saved_bytes_sparse),
    ):
        table.add_row(name, number(dense), number(sparse), share(sparse, dense), "")
    note = f"\n  not counted: {count_of(totals.unknown, 'product')} whose sizes depend on data"
    return _render(table) + (note if totals.unknown else "")


def format_times(rows: Sequence[Row]) -> str:
    """Print what the cost model expects: dense, and what runs; "?" where sizes depend on data."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for name in ("layer", "role", "runs as", "dense", "expected", ""):
        words = name in ("layer", "role", "runs as")
        table.add_column(name, no_wrap=True, justify="left" if words else "right")
    for row in rows:
        dense, own = row.predicted_dense_us, row.predicted_us
        told = ["?" if time is None else cost.told(time) for time in (dense, own)]
        factor = f"{dense / own:.2f}x" if dense is not None and own else ""
        lowering = shorten(row.lowering, _LONGEST_LOWERING)
        table.add_row(shorten(row.layer, _LONGEST_TIMED), row.role, lowering, *told, factor)
    return _render(table)


def format_legend(rows: Sequence[Row]) -> str:
    """Say what the words in the table mean, of those that occur."""
    lowerings = {row.lowering for row in rows}
    derived = any(row.derived and row.decision is not None for row in rows)
    notes = {
        "FLOPs: of the full product, then what the pattern leaves": True,
        f"{MASKED_DENSE}: the full product runs with a masked operand: right, but no faster": (
            MASKED_DENSE in lowerings
        ),
        "gathered: the sampled rows and columns are copied together, and a smaller dense product "
        "runs": any(name.startswith("gathered") for name in lowerings),
        "stored mask: the model's own, with what it was when this was compiled; its values may "
        "change": any(isinstance(row.decision, Masked) for row in rows),
        "(fwd): follows the forward's pattern": derived,
        "~: a dynamic size; figures are for the sizes that were traced": any(
            row.symbols for row in rows
        ),
    }
    return "\n".join(["legend:", *(f"  {note}" for note, shown in notes.items() if shown)])


def shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is longer than ``width``."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def number(count: float | None) -> str:
    """Write a count in three digits: 1234567 as 1.23M."""
    if count is None:
        return "?"
    for unit in ("", "K", "M", "G", "T"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}P"


def share(part: float, whole: float) -> str:
    """Write a share in percent."""
    return f"{100 * part / whole:.0f}%" if whole else ""


def _cells(row: Row, numbers: Mapping[str, int]) -> tuple[str, ...]:
    decision = f"dense [{numbers[row.reason]}]" if row.decision is None else row.decided
    if row.decision is not None and row.derived:
        decision += " (fwd)"
    flops = number(row.flops_dense)
    if row.decision is not None:
        flops += f" → {number(row.flops_sparse)}"
    lowering = shorten(row.lowering, _LONGEST_LOWERING)
    return row.layer, row.role, _shape(row), row.dtype, decision, lowering, flops


def _shape(row: Row) -> str:
    sizes = dict(zip("MNK", row.shape, strict=True))
    written = [f"{'~' * (name in row.symbols)}{number_or(size)}" for name, size in sizes.items()]
    batch = "" if row.batch == 1 else f"{'~' * ('batch' in row.symbols)}{number_or(row.batch)}·"
    return batch + "×".join(written)  # noqa: RUF001


def number_or(size: int | None) -> str:
    """Write a size, "?" where it is not known."""
    return "?" if size is None else str(size)


def _reasons(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.reason for row in rows if row.reason))


def count_of(how_many: int, what: str) -> str:
    """Write a count and its noun: 2 graphs."""
    return f"{how_many} {what}{'s' * (how_many != 1)}"


def _render(table: Table) -> str:
    out = StringIO()
    from rich.console import Console

    Console(file=out, width=WIDTH, force_terminal=False, color_system=None, markup=False).print(
        table
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
