"""Whether ``select="profitable"`` keeps what is faster and declines what is slower, on a grid.

    python benchmarks/profit.py [--cases 0 1 2] [--json PATH]    measure; decisions beside times
    python benchmarks/profit.py --fit PATH                       fit the cost model's pace to a file

A case is a layer, a ratio, and what is sampled: the forward and with it both gradients, or one
gradient alone. Forward + backward are timed against dense torch.compile, in turns. An existing
file keeps the rows of other cases, so that a grid can be measured in pieces.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import sparsefx as sfx
from sparsefx import cost
from sparsefx.plan import Role, Site

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from conv import Shape
from conv import compiled as compiled_conv
from linear import compiled, step
from timing import factor, machine, race, show, spread_of, where, write

LINEAR = (  # rows, outputs, inputs
    (64, 64, 64), (1024, 64, 64), (128, 128, 1024), (256, 256, 256), (1024, 256, 64),
    (1024, 64, 256), (4096, 128, 128), (1024, 512, 512), (32, 1024, 1024), (256, 1024, 1024),
    (1024, 1024, 1024), (16, 2048, 2048), (8192, 96, 96), (512, 10, 2048), (2048, 512, 2048),
    (2048, 2048, 512),
)  # fmt: skip
CONV = (
    Shape(2, 16, 16, 8), Shape(16, 32, 32, 16), Shape(8, 64, 64, 28), Shape(8, 128, 128, 14),
    Shape(8, 256, 64, 28, taps=1), Shape(8, 64, 128, 28, stride=2),
    Shape(8, 128, 128, 28, groups=4), Shape(8, 256, 256, 14),
)  # fmt: skip
CASES = (*LINEAR, *CONV)
ASKED: tuple[tuple[Role, float], ...] = (
    ("forward", 0.1), ("forward", 0.5), ("forward", 0.8),
    ("grad_input", 0.1), ("grad_input", 0.5), ("grad_weight", 0.1), ("grad_weight", 0.5),
)  # fmt: skip
Case = tuple[int, int, int] | Shape


@dataclass(frozen=True)
class Row:
    """A layer, and what of it is sampled; times in milliseconds."""

    case: int
    layer: str
    role: Role
    ratio: float
    dense: float
    median: float
    p20: float
    p80: float
    speedup: float


def name_of(case: Case) -> str:
    return str(case) if isinstance(case, Shape) else "{}x{}x{}".format(*case)


def sites_of(case: Case) -> dict[Role, Site]:
    """The products as find_sites tells them."""
    channels, kind = None, "mm"
    if isinstance(case, Shape):
        kind, inner = "conv", case.channels // case.groups
        image = -(-case.image // case.stride)
        channels = (inner, case.out // case.groups, case.groups, case.batch)
        m, n, k = case.batch * image**2, case.out, inner * case.taps**2
    else:
        m, n, k = case
    shapes: dict[Role, tuple[int, int, int]] = {
        "forward": (m, n, k), "grad_input": (m, k, n), "grad_weight": (k, n, m),
    }  # fmt: skip
    return {
        role: Site("layer", role, kind, kind, shape, "float32", "cpu", 0, channels=channels)
        for role, shape in shapes.items()
    }


def unit(case: Case, role: Role) -> list[Site]:
    """Products that stand or fall together: gradients follow a sampled forward."""
    sites = sites_of(case)
    return list(sites.values()) if role == "forward" else [sites[role]]


def rule(role: Role, ratio: float) -> sfx.Rule:
    return sfx.Rule("*", **{role: sfx.Sampled(ratio)})


def works(case: Case, codegen: str) -> list[Callable[[], object]]:
    """One forward and backward: dense, then everything that is asked."""
    rules = [None, *(rule(*asked) for asked in ASKED)]
    if isinstance(case, Shape):
        conv = case.layer()
        x = torch.randn(case.batch, case.channels, case.image, case.image)
        make = partial(compiled_conv, conv, codegen)
        parameters: nn.Module = conv
    else:
        m, n, k = case
        parameters = nn.Linear(k, n)
        x = torch.randn(m, k)
        make = partial(compiled, parameters, codegen)
    grad = torch.randn_like(parameters(x)).detach()
    x.requires_grad_()
    return [partial(step, make(one), x, grad) for one in rules]


def measure(index: int, rounds: int, codegen: str) -> list[Row]:
    case = CASES[index]
    torch.manual_seed(0)
    torch.compiler.reset()
    times = race(works(case, codegen), rounds)
    rows = []
    for (role, ratio), own in zip(ASKED, times[1:], strict=True):
        found = spread_of(own, times[0])
        dense = found["median"] * found["speedup"]
        rows.append(Row(index, name_of(case), role, ratio, dense, **found))
    return rows


# --- the cost model beside it


def verdict(row: Row) -> str:
    return cost.unprofitable(unit(CASES[row.case], row.role), sfx.Sampled(row.ratio))


def judged(rows: Sequence[Row]) -> str:
    """What is kept and slower, what is declined and would be faster."""
    kept = [row for row in rows if not verdict(row)]
    declined = [row for row in rows if verdict(row)]
    slow = [row for row in kept if row.speedup < 0.97]
    missed = [row for row in declined if row.speedup > 1.05]
    least = min((row.speedup for row in kept), default=1.0)
    most = max((row.speedup for row in declined), default=1.0)
    return (
        f"kept {len(kept)} of {len(rows)}, the slowest {least:.2f}x, {len(slow)} below 0.97x; "
        f"declined {len(declined)}, the fastest {most:.2f}x, {len(missed)} above 1.05x"
    )


def sample(row: Row) -> cost.Sample:
    """A whole forward and backward, dense and with some products sampled."""
    sites = list(sites_of(CASES[row.case]).values())
    asked = unit(CASES[row.case], row.role)
    dense = cost.total(map(cost.dense_work, sites))
    others = cost.total(cost.dense_work(site) for site in sites if site not in asked)
    sparse = others.plus(cost.sampled_work(asked, sfx.Sampled(row.ratio)))
    return cost.Sample(dense, sparse, row.dense * 1e3, row.median * 1e3)


def fits(rows: Sequence[Row]) -> dict[str, cost.Fit]:
    """Paces by kind of product."""
    kinds = {"mm": [], "conv": []}
    for row in rows:
        kinds["conv" if isinstance(CASES[row.case], Shape) else "mm"].append(sample(row))
    return {kind: cost.fit(samples) for kind, samples in kinds.items() if len(samples) >= 3}


def cells(row: Row) -> list[str]:
    why = verdict(row).partition(": ")[2]
    times = [f"{row.dense:.2f}", f"{row.median:.2f}", factor(row.speedup)]
    return [row.role, f"{row.ratio:g}", *times, "declined" if why else "kept", why]


def report(rows: Sequence[Row], facts: dict[str, object]) -> None:
    headings = ["layer", "sampled", "ratio", "dense ms", "ms", "x dense", "decision", "why"]
    blocks = []
    for index in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == index]
        names = [own[0].layer, *[""] * len(own)]
        blocks.append([[name, *cells(row)] for name, row in zip(names, own, strict=False)])
    show("forward + backward, float32", f"{where(facts)}; <: slower than dense", headings, blocks)
    print(judged(rows))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure what select='profitable' decides")
    every = list(range(len(CASES)))
    parser.add_argument("--cases", type=int, nargs="+", choices=every, default=every)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--json", type=Path, help="write the numbers here, keep other cases'")
    parser.add_argument("--fit", type=Path, help="measure nothing, fit the model to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, or fit, and print."""
    args = arguments(argv)
    if args.fit is not None:
        content = json.loads(args.fit.read_text("utf-8"))
        rows = [Row(**row) for row in content.pop("rows")]
        report(rows, content)
        for kind, found in fits(rows).items():
            paces = [f"{name} {value:.4g}" for name, value in found.pace.to_dict().items()]
            print(f"{kind}: {', '.join(paces)} us; {found.overhead:.4g} us a step")
        return rows
    rows = []
    for index in args.cases:
        print(f"{name_of(CASES[index])} ...", file=sys.stderr)
        rows += measure(index, args.rounds, args.codegen)
    facts = {**machine("cpu"), "codegen": args.codegen, "rounds": args.rounds}
    report(rows, facts)
    if args.json is not None and args.json.exists():
        known = json.loads(args.json.read_text("utf-8"))["rows"]
        rows += [Row(**row) for row in known if row["case"] not in args.cases]
    rows.sort(key=lambda row: row.case)
    write(args.json, {**facts, "rows": [asdict(row) for row in rows]})
    return rows


if __name__ == "__main__":
    main()
