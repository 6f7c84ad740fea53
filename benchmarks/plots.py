"""Plots of the numbers in results/: what gains beside what loses.

    python benchmarks/render.py        writes them with the tables

Colours are Okabe and Ito's, which colour-blind readers tell apart, and every series has a marker of
its own. What is slower than dense lies in the grey band, or is hatched.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from tables import CSR, DENSE, PACKED, in_order, packed_rows, rows_of

BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#767676", "#CC79A7"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "svg.hashsalt": "sparsefx",
}
LOSES = {"facecolor": "#F0F0F0", "zorder": 0}


def plain(axis: Any) -> None:
    """Plain numbers at the ticks of a log axis."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def shade(ax: Axes, least: float, text: bool = True) -> None:
    """The band below 1: slower than dense."""
    ax.axhspan(least, 1.0, **LOSES)
    ax.axhline(1.0, color=GREY, linewidth=1)
    if text:
        ax.text(
            0.98, 0.02, "slower than dense", transform=ax.transAxes, ha="right", va="bottom",
            color=GREY, fontsize=9,
        )  # fmt: skip


SOURCES = {"steps-cpu": "models-cpu"}  # plots that are called otherwise than their results


def digest(name: str) -> str:
    """Of the results that a plot shows: it is in the picture, so that a stale one is known."""
    rows = json.dumps(rows_of(SOURCES.get(name, name)), sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"Software": None, "Comment": digest(path.stem)}
    figure.savefig(path, metadata=facts, facecolor="white")
    plt.close(figure)


# --- linear layers: by size, one panel a ratio

LINEAR = {
    "sparsefx, forward sampled": (BLUE, "o"),
    "sparsefx, backward sampled": (GREEN, "s"),
    "by hand, eager, forward sampled": (ORANGE, "^"),
}


def linear(path: Path) -> None:
    rows = rows_of("linear-cpu")
    ratios, sizes = in_order(r["ratio"] for r in rows), in_order(r["size"] for r in rows)
    figure, axes = plt.subplots(1, len(ratios), figsize=(11, 4.3), sharey=True)
    for ax, ratio in zip(axes, ratios, strict=True):
        shade(ax, 0.7)
        for method, (colour, marker) in LINEAR.items():
            line = [r for r in rows if (r["method"], r["ratio"]) == (method, ratio)]
            ax.plot(sizes, [r["speedup"] for r in line], color=colour, marker=marker, label=method)
            if method != "by hand, eager, forward sampled":
                ax.axhline(line[0]["ideal"], color=colour, linestyle=(0, (5, 3)), linewidth=1)
                ax.text(
                    sizes[0], line[0]["ideal"] * 1.02, f"ideal {line[0]['ideal']:.2f}",
                    color=colour, fontsize=9, va="bottom",
                )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylim(0.7, 13)
        ax.set_xticks(sizes)
        ax.set_yticks([0.75, 1, 1.5, 2, 3, 5, 10])
        plain(ax.xaxis)
        plain(ax.yaxis)
        ax.tick_params(axis="x", labelrotation=45)
        ax.set_title(f"ratio {ratio:g}")
        ax.set_xlabel("N, of an N x N layer")
    axes[0].set_ylabel("x dense torch.compile")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle("Linear layers, forward + backward, 1024 rows, float32, CPU", x=0.01, ha="left")
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(figure, path)


# --- packed weights: bars by pattern

PEERS = {PACKED: (BLUE, "sparsefx nm_packed_mm"), CSR: (ORANGE, "torch CSR")}


def packed(path: Path) -> None:
    rows = packed_rows()
    groups = in_order((r["batch"], r["layer"], r["dtype"]) for r in rows)
    groups.sort(key=lambda group: (group[0], group[2] == "float32"))
    columns = (len(groups) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(11, 6.6), sharey=True, squeeze=False)
    for ax, group in zip(axes.flat, groups, strict=False):
        own = [r for r in rows if (r["batch"], r["layer"], r["dtype"]) == group]
        _bars(ax, own)
        lines = "one row" if group[0] == 1 else f"{group[0]} rows"
        ax.set_title(f"{group[1]}, {lines}\n{group[2]}")
    for ax in list(axes.flat)[len(groups) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("x the faster dense product")
    handles = [Patch(color=colour, label=name) for colour, name in PEERS.values()]
    handles.append(
        Patch(facecolor="white", edgecolor=GREY, hatch="////", label="slower than dense")
    )
    figure.suptitle("Packed N:M weights, CPU", x=0.01, ha="left")
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save(figure, path)


def _bars(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    patterns = in_order(row["pattern"] for row in rows)
    for shift, (method, (colour, _)) in zip((-0.19, 0.19), PEERS.items(), strict=True):
        found = {r["pattern"]: r["speedup"] for r in rows if r["method"] == method}
        for place, pattern in enumerate(patterns):
            if pattern in found:
                bar(ax, place + shift, found[pattern], colour)
    ax.axhline(1.0, color=GREY, linewidth=1)
    ax.set_xticks(range(len(patterns)), patterns)
    ax.set_xlim(-0.6, max(1.6, len(patterns) - 0.4))
    ax.margins(y=0.1)
    ax.grid(axis="x", visible=False)


def bar(ax: Axes, place: float, speedup: float, colour: str) -> None:
    """Filled where it gains, hatched where it loses, its number above."""
    loses = speedup < 0.995
    fill = {"facecolor": "white" if loses else colour, "hatch": "////" if loses else ""}
    ax.bar(place, speedup, 0.36, edgecolor=colour, linewidth=1.2, **fill)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # over the line at 1
    ax.text(place, speedup + 0.09, f"{speedup:.2f}", ha="center", va="bottom", fontsize=8, bbox=box)


# --- whole training steps

MODELS = {"gpt": "GPT-2, width 512", "resnet": "ResNet-18"}


def steps(path: Path) -> None:
    rows = [row for row in rows_of("models-cpu") if row["method"] != DENSE]
    models = in_order(row["model"] for row in rows)
    figure, axes = plt.subplots(1, len(models), figsize=(11, 4.4), sharey=True)
    methods = in_order(row["method"] for row in rows)
    for ax, model in zip(axes, models, strict=True):
        found = {r["method"]: r for r in rows if r["model"] == model}
        for place, method in enumerate(reversed(methods)):
            speedup, loses = found[method]["speedup"], found[method]["speedup"] < 0.995
            colour = ORANGE if method.startswith("by hand") else BLUE
            fill = {"facecolor": "white" if loses else colour, "hatch": "////" if loses else ""}
            ax.barh(place, speedup, 0.65, edgecolor=colour, **fill)
            text = {"color": "black" if loses else "white", "weight": "bold", "fontsize": 9}
            ax.text(speedup - 0.04, place, f"{speedup:.2f}", va="center", ha="right", **text)
            if (share := found[method]["executed"]) is not None:
                ax.plot([1 / share] * 2, [place - 0.33, place + 0.33], color="black", linewidth=2)
        ax.axvline(1.0, color=GREY, linewidth=1)
        ax.set_yticks(range(len(methods)), list(reversed(methods)))
        ax.set_xlim(0, 3)
        ax.set_title(MODELS.get(model, model))
        ax.set_xlabel("x dense torch.compile")
        ax.grid(axis="y", visible=False)
    handles = [
        Patch(color=BLUE, label="sparsefx"),
        Patch(color=ORANGE, label="by hand, eager"),
        Line2D([], [], color="black", linewidth=2, label="ideal by FLOPs"),
        Patch(facecolor="white", edgecolor=GREY, hatch="////", label="slower than dense"),
    ]
    figure.suptitle("Whole training steps, float32, CPU", x=0.01, ha="left")
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(figure, path)


# --- transposable masks: time and what is kept

SOLVERS = {
    "exact": (BLUE, "o", "exact (default)"),
    "exact, torch alone": (PURPLE, "D", "exact, torch operators"),
    "greedy": (GREEN, "s", "greedy"),
    "entropic": (ORANGE, "^", "entropic"),
    "min-cost flow, networkx": (GREY, "x", "min-cost flow, networkx"),
    "linear program, HiGHS": ("#000000", "+", "linear program, HiGHS"),
}


def masks(path: Path) -> None:
    rows = [row for row in rows_of("masks-cpu") if row["size"] == 1024]
    patterns = in_order(row["pattern"] for row in rows)
    figure, (times, kept) = plt.subplots(1, 2, figsize=(11, 4.6))
    for method, (colour, marker, name) in SOLVERS.items():
        own = {r["pattern"]: r for r in rows if r["method"] == method}
        line = [own[p] for p in patterns if p in own]
        looks = {"color": colour, "marker": marker, "label": name, "markersize": 7}
        places = [patterns.index(row["pattern"]) for row in line]
        times.plot(places, [row["median"] for row in line], **looks)
        if method in ("greedy", "entropic", "exact"):
            kept.plot(places, [100 * row["of_best"] for row in line], **looks)
    times.set_yscale("log")
    times.set_title("milliseconds, 1024 x 1024 (lower is better)")
    kept.set_title("% of the best mask's |w| (higher is better)")
    for ax in (times, kept):
        ax.set_xticks(range(len(patterns)), patterns)
    handles, labels = times.get_legend_handles_labels()
    figure.suptitle("Transposable masks, CPU, 2 threads", x=0.01, ha="left")
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    save(figure, path)


PLOTS = {"linear-cpu": linear, "packed-cpu": packed, "steps-cpu": steps, "masks-cpu": masks}


def main(folder: Path) -> list[Path]:
    """Draw all into a folder; their paths."""
    paths = [folder / f"{name}.png" for name in PLOTS]
    with plt.rc_context(STYLE):
        for path, draw in zip(paths, PLOTS.values(), strict=True):
            draw(path)
    return paths
