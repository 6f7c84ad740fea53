"""Means over seeds, as a table and as a picture."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from methods import ROLES, Method
from rich import box
from rich.table import Table
from task import Run


@dataclass(frozen=True)
class Found:
    """A method's runs, one a seed."""

    method: Method
    runs: list[Run]

    def mean(self, name: str) -> float:
        return statistics.mean(getattr(run, name) for run in self.runs)

    @property
    def spread(self) -> float:
        return statistics.pstdev(run.accuracy for run in self.runs)

    @property
    def verdict(self) -> str:
        """Against the reference: noise is two standard errors of the difference of two means."""
        reference, image = self.method.reference, 0.2  # one test image in percent
        if reference is None:
            return ""
        behind = reference - self.mean("accuracy")
        noise = 2 * math.sqrt(2 / len(self.runs)) * max(self.spread, image)
        return "met" if behind <= 0 else "within noise" if behind <= noise else "missed"


def table(found: Sequence[Found], judged: bool) -> Table:
    title = "M multiply-accumulates of a step with 64 images, as executed"
    made = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("method", no_wrap=True)
    heads = ["accuracy", "reference", "", *ROLES, "kept", "serving", "step ms", "masks ms"]
    for head in (*heads, "in all s", "density"):
        made.add_column(head, justify="right", no_wrap=True)
    for one in found:
        last, reference = one.runs[-1], one.method.reference
        made.add_row(
            one.method.title,
            f"{one.mean('accuracy'):.2f} ± {one.spread:.2f}",
            "" if reference is None else f"{reference:.2f}",
            one.verdict if judged else "",
            *(f"{last.macs[role] / 1e6:.2f}" for role in ROLES),
            *(f"{getattr(last, name) / 1e6:.2f}" for name in ("left", "serving")),
            *(f"{one.mean(name):.2f}" for name in ("step_ms", "masks_ms")),
            f"{one.mean('seconds'):.1f}",
            f"{last.density:.1%}",
        )
    return made


def draw(found: Sequence[Found], path: str) -> None:
    """Accuracy against operations of the training, and against its time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    by_macs, by_time = figure.subplots(1, 2, sharey=True)
    markers = "osD^vPX*<>hp"
    for i, one in enumerate(found):
        look = {"color": f"C{i % 10}", "marker": markers[i % len(markers)]}
        executed, left = (one.mean(name) / 1e6 for name in ("executed", "left"))
        y = one.mean("accuracy")
        by_macs.plot([left, executed], [y, y], color=look["color"], lw=1, alpha=0.4)
        by_macs.plot([left], [y], ls="", ms=8, mfc="white", **look)
        by_macs.plot([executed], [y], ls="", ms=8, **look)
        by_time.errorbar(
            [one.mean("seconds")], [y], [one.spread], ms=8, lw=1, label=one.method.title, **look
        )
    by_macs.set_xlabel(
        "M multiply-accumulates a step\nhollow: what masks leave (of VR-PGE, weight steps alone)"
    )
    by_time.set_xlabel("seconds a training, masks included")
    by_macs.set_ylabel("test accuracy, %")
    for panel in (by_macs, by_time):
        panel.grid(alpha=0.3, which="both")
    by_macs.set_xlim(left=0)
    by_time.set_xscale("log")
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120)
