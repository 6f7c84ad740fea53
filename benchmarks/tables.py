"""Tables in Markdown from the numbers in results/, each by its name; render.py writes them."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Row = dict[str, Any]
Lines = list[str]


def rows_of(name: str) -> list[Row]:
    """The rows of results/NAME.json."""
    return list(json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))["rows"])


def factor(value: float) -> str:
    """As timing.factor, without torch: "<" is slower than dense."""
    return f"{value:.2f}" + (" <" if value < 0.995 else "")


def table(heading: Sequence[str], body: Iterable[Sequence[str]]) -> Lines:
    return [_line(heading), "|" + "---|" * len(heading), *map(_line, body)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def in_order(values: Iterable[Any]) -> list[Any]:
    """Without repeats, in the order of their first place."""
    return list(dict.fromkeys(values))


# --- linear layers

DENSE = "dense, torch.compile"


def _linear(methods: Sequence[tuple[str, float]]) -> Lines:
    rows = rows_of("linear-cpu")
    sizes = in_order(row["size"] for row in rows)
    found = {(r["method"], r["ratio"], r["size"]): r for r in rows}
    body = [
        [
            f"{method} {ratio:g}",
            *(factor(found[method, ratio, size]["speedup"]) for size in sizes),
            f"{found[method, ratio, sizes[0]]['ideal']:.2f}",
        ]
        for method, ratio in methods
    ]
    return table(["x dense", *map(str, sizes), "ideal"], body)


def linear() -> Lines:
    rows = rows_of("linear-cpu")
    methods = in_order(row["method"] for row in rows if row["method"] != DENSE)
    return _linear([(m, r) for r in in_order(row["ratio"] for row in rows) for m in methods])


def linear_short() -> Lines:
    forward, backward = "sparsefx, forward sampled", "sparsefx, backward sampled"
    return _linear([(forward, 0.1), (forward, 0.3), (forward, 0.5), (backward, 0.3)])


def linear_limit() -> Lines:
    rows = [row for row in rows_of("linear-cpu") if row["limit"] is not None and row["size"] >= 256]
    sizes, ratios = in_order(r["size"] for r in rows), in_order(r["ratio"] for r in rows)
    found = {(r["ratio"], r["size"]): r for r in rows}

    def cell(row: Row) -> str:
        return f"{row['speedup'] / row['limit']:.0%} of {row['limit']:.2f}"

    body = [[f"forward sampled {r:g}", *(cell(found[r, s]) for s in sizes)] for r in ratios]
    return table(["of the roofline's limit", *map(str, sizes)], body)


def linear_ms() -> Lines:
    rows = [row for row in rows_of("linear-cpu") if row["size"] >= 1024]
    sizes, ratios = in_order(r["size"] for r in rows), in_order(r["ratio"] for r in rows)
    found = {(r["method"], r["ratio"], r["size"]): r for r in rows}

    def cell(row: Row) -> str:
        return f"{row['median']:.1f} ({row['p20']:.1f}-{row['p80']:.1f})"

    names = {DENSE: f"{DENSE}, beside", "sparsefx, forward sampled": "sparsefx, forward sampled"}
    body = [
        [f"{name} {r:g}", *(cell(found[method, r, s]) for s in sizes)]
        for r in ratios
        for method, name in names.items()
    ]
    return table(["ms, median (p20-p80)", *map(str, sizes)], body)


# --- convolutions, whole steps


def conv() -> Lines:
    rows = [row for row in rows_of("conv-cpu") if row["ratio"] == 0.5]
    methods = [
        "sparsefx, forward sampled",
        "sparsefx, backward sampled",
        "by hand, eager, forward sampled",
    ]
    found = {(r["layer"], r["layout"], r["method"]): r["speedup"] for r in rows}
    body = [
        [*place, *(factor(found[*place, m]) if (*place, m) in found else "" for m in methods)]
        for place in in_order((r["layer"], r["layout"]) for r in rows)
    ]
    heading = ["layer, ratio 0.5", "layout", "forward sampled", "backward sampled"]
    return table([*heading, "by hand, eager"], body)


def steps() -> Lines:
    def cells(row: Row) -> list[str]:
        share = "" if row["executed"] is None else f"{row['executed']:.0%}"
        return [row["model"], row["method"], share, f"{row['median']:.0f}", factor(row["speedup"])]

    heading = ["step", "method", "FLOPs executed", "ms", "x dense"]
    return table(heading, map(cells, rows_of("models-cpu")))


# --- packed weights


def packed_rows() -> list[Row]:
    """Rows with the parts of their case: "512x4096x2048 float32 1:8"."""
    found = []
    for row in rows_of("packed-cpu"):
        shape, dtype, pattern, *role = row["case"].split()
        batch, out, deep = map(int, shape.split("x"))
        layer = f"{out} x {deep}"
        parts = {"batch": batch, "layer": layer, "dtype": dtype, "pattern": pattern}
        found.append({**row, **parts, "role": " ".join(role) or "forward"})
    return found


PACKED, CSR = "nm_packed_mm", "torch CSR"


def packed_one() -> Lines:
    rows = [row for row in packed_rows() if row["batch"] == 1]
    found = {(r["layer"], r["dtype"], r["method"], r["pattern"]): r["speedup"] for r in rows}
    columns = [(method, pattern) for method in (PACKED, CSR) for pattern in ("2:4", "1:4")]
    body = [
        [
            ", ".join(place),
            *(factor(found[*place, *c]) if (*place, *c) in found else "" for c in columns),
        ]
        for place in in_order((r["layer"], r["dtype"]) for r in rows)
    ]
    return table(["one row", *(" ".join(c) for c in columns)], body)


def packed_batch() -> Lines:
    rows = [r for r in packed_rows() if r["batch"] == 512 and r["method"] in (PACKED, CSR)]
    patterns = in_order(row["pattern"] for row in rows)
    found = {(r["layer"], r["method"], r["pattern"]): r["speedup"] for r in rows}
    body = [
        [", ".join(place), *(factor(found[*place, pattern]) for pattern in patterns)]
        for place in in_order((r["layer"], r["method"]) for r in rows)
    ]
    return table(["512 rows, float32", *patterns], body)


MASKED = ("masked_mm, compressing", "torch CSR, made anew")


def masked_batch() -> Lines:
    """Masks that keep little, the weight compressed at every call: what training does."""
    rows = [row for row in packed_rows() if row["method"] in MASKED]
    patterns = in_order(row["pattern"] for row in rows)
    found = {(r["layer"], r["role"], r["method"], r["pattern"]): r["speedup"] for r in rows}
    body = [
        [", ".join(place), *(factor(found[*place, pattern]) for pattern in patterns)]
        for place in in_order((r["layer"], r["role"], r["method"]) for r in rows)
    ]
    if not body:
        return ["Not measured yet: `python benchmarks/run.py cpu_nm_gemv`."]
    return table(["512 rows, float32", *patterns], body)


# --- memory


def memory() -> Lines:
    rows = rows_of("memory-cpu")
    dense, most = rows[0], {row["method"]: row["batch"] for row in rows}

    def times(own: float, base: float) -> str:
        return "" if own == base else f" ({base / own:.2f}x)"

    def cells(row: Row) -> list[str]:
        sizes = (f"{row[k] / 2**20:.1f} MiB{times(row[k], dense[k])}" for k in ("saved", "peak"))
        batch = most[row["method"]]
        return [row["method"], *sizes, f"{batch}{times(1 / batch, 1 / most[dense['method']])}"]

    heading = ["", "saved for the backward", "peak of a step", "largest batch in 1 GiB"]
    return table(heading, (cells(row) for row in rows if row["batch"] == dense["batch"]))


# --- masks, permutations

SOLVERS = {
    "exact": "exact (default)",
    "exact, torch alone": "exact, torch alone",
    "greedy": "greedy",
    "entropic": "entropic",
    "min-cost flow, networkx": "min-cost flow, networkx (scaled from 16 tiles)",
    "linear program, HiGHS": "linear program, HiGHS (likewise)",
}


def masks() -> Lines:
    rows = rows_of("masks-cpu")
    found = {(r["method"], r["size"], r["pattern"]): r for r in rows}
    places = [(1024, p) for p in ("2:4", "4:8", "8:16", "16:32")] + [(4096, "4:8")]

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        near = row["method"] in ("greedy", "entropic")
        return f"{row['median']:.0f}" + (f", {100 * row['of_best']:.2f} %" if near else "")

    body = [
        [name, *(cell(found.get((method, *place))) for place in places)]
        for method, name in SOLVERS.items()
    ]
    return table(["ms", *(f"{size}, {pattern}" for size, pattern in places)], body)


def permutation() -> Lines:
    rows = rows_of("permutation-cpu")
    patterns = in_order(row["pattern"] for row in rows)
    names = {"normal": "normal weights", "scaled": "columns of log-normal size"}
    found = {(r["weights"], r["pattern"]): r for r in rows}

    def cell(row: Row) -> str:
        shares = f"{100 * row['before']:.1f} → {100 * row['after']:.1f} %"
        return f"{shares}, {row['seconds']:.0f} s"

    body = [[name, *(cell(found[kind, p]) for p in patterns)] for kind, name in names.items()]
    return table(["1024 x 1024, share of the weight kept: before, after, seconds", *patterns], body)


# --- CUDA devices: what was wanted beside what was measured


def device_results() -> list[dict[str, Any]]:
    files = sorted((HERE / "results").glob("*-cuda.json"))
    found = [json.loads(path.read_text("utf-8")) for path in files]
    return [one for one in found if "cases" in one]


def device_goals() -> Lines:
    found = device_results()
    if not found:
        return ["No row has run on a CUDA device yet: `make gpu` (GPU.md)."]
    body = [
        [f"`{one['row']}`", block["case"], goal["method"], *goal_cells(goal)]
        for one in found
        for block in one["cases"]
        for goal in block["goals"]
    ]
    where = f"{found[0]['device']}, torch {found[0]['torch']}"
    return [*table(["row", "case", "method", "measured", "goal", ""], body), "", where]


def goal_cells(goal: Row) -> list[str]:
    verdict = "met" if goal["met"] else "**missed**"
    if goal["at_most"] is not None:
        return [f"{goal['found']:.3f} ms", f"{goal['at_most']:g} ms", verdict]
    return [f"{goal['found']:.2f} x {goal['against']}", f"{goal['least']:g}", verdict]


def device_cases() -> Lines:
    body = [
        [
            f"`{one['row']}`",
            block["case"],
            row["method"],
            f"{row['median']:.3f}",
            factor(row["speedup"]),
        ]
        for one in device_results()
        for block in one["cases"]
        for row in block["rows"]
    ]
    return table(["row", "case", "method", "ms", "x dense"], body) if body else device_goals()


TABLES: dict[str, Callable[[], Lines]] = {
    "linear-cpu": linear,
    "linear-short-cpu": linear_short,
    "linear-limit-cpu": linear_limit,
    "linear-ms-cpu": linear_ms,
    "conv-cpu": conv,
    "steps-cpu": steps,
    "packed-one-cpu": packed_one,
    "packed-batch-cpu": packed_batch,
    "masked-batch-cpu": masked_batch,
    "memory-cpu": memory,
    "masks-cpu": masks,
    "permutation-cpu": permutation,
    "goals-cuda": device_goals,
    "cases-cuda": device_cases,
}
