"""VR-PGE's weight step on a CIFAR ResNet: dense, and with the drawn channels alone.

    python benchmarks/vrpge.py [--keep .25 .1] [--backend inductor] [--rounds 5] [--json FILE]

One step is forward, backward and SGD on 32 x 32 images; speed-ups are over the dense step that is
compiled. "late" is a net whose gates are decided (s of 0 or 1, the same share of every stage),
"early" one where every gate has the same s and each step draws anew. What the gates cost beside it,
the structure step (two forward passes) and the draw of the next masks, stands in columns of its
own: neither is part of a weight step. Before anything is timed, the outputs and gradients of the
weight step are compared with the masked net's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.sparsifiers.vrpge import VRPGE, CompactStep

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

import timing


class Block(nn.Module):
    """Two convolutions around a shortcut, a projection where sizes change."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


def resnet(blocks: int, widths: tuple[int, ...] = (32, 64, 128)) -> nn.Sequential:
    """ResNet-(6 blocks + 2)."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    body, channels = [], widths[0]
    for stage, width in enumerate(widths):
        for i in range(blocks):
            body.append(Block(channels, width, 2 if stage and not i else 1))
            channels = width
    return nn.Sequential(
        *stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )


class Contestant:
    """A net, its optimizer and, but for the dense one, its gates."""

    def __init__(self, name: str, args: Any, keep: float = 1.0, backend: Any = None) -> None:
        self.name, self.keep, self.early = name, keep, "early" in name
        self.model = resnet(args.blocks)
        self.x = torch.randn(args.batch, 3, 32, 32)
        self.y = torch.randint(10, (args.batch,))
        self.gates: VRPGE | None = None
        if keep < 1:
            self.gates = VRPGE(self.model, keep, args=self.x[:2])
            if not self.early:
                decide(self.gates, keep)
            self.run: Any = self.gates.compact(backend)
            check(self.gates, self.run, self.x[:4])
        else:
            self.run = self.model
            if "compiled" in name:
                self.run = torch.compile(self.model, backend=args.backend)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.run(self.x), self.y)

    def step(self) -> None:
        """One weight step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def draw(self) -> None:
        """The masks of the next step."""
        if self.gates is not None:
            self.gates.step()


@torch.no_grad()
def decide(gates: VRPGE, keep: float) -> None:
    """Set s to 1 for a share of every group, to 0 for the rest."""
    parts = []
    for group in gates.groups:
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(group.size))
        parts.append((order < max(round(keep * group.size), 1)).float())
    gates.state.probability.copy_(torch.cat(parts))
    gates.keep, gates.schedule = keep, lambda step: 1.0  # rounding may lie a little above keep
    gates.step()


def check(gates: VRPGE, compact: CompactStep, x: Tensor) -> None:
    """Compare outputs and gradients with the masked net's, in float64."""
    model, found = gates.model.double(), []
    backend, compact.backend = compact.backend, None
    assert not compact.whole, compact.whole
    for run in (model, compact):
        model.zero_grad()
        out = run(x.double())
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for masked, small in zip(*found, strict=True):
        assert (masked - small).abs().max() <= 1e-9 * masked.abs().max() + 1e-12
    model.zero_grad()
    model.float()
    compact.backend = backend


def cells(one: Contestant, times: list[float], dense: list[float], args: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"method": one.name, "keep": one.keep}
    row |= timing.spread_of(times, dense)
    if one.gates is not None:
        gates = one.gates
        macs = one.run.macs()
        row |= {"live": macs.live / macs.dense, "computed": macs.computed / macs.dense}
        row["draw_ms"] = statistics.median(timing.timed(one.draw) for _ in range(args.rounds))
        row["structure_ms"] = statistics.median(
            timing.timed(lambda: gates.structure_step(one.loss)) for _ in range(args.rounds)
        )
        row["programs"] = len(one.run._compiled)
    return row


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    out = []
    for row in rows:
        line = [row["method"], f"{row['median']:.1f}", timing.factor(row["speedup"])]
        if "live" in row:
            line += [f"{row['live']:.3f}", f"{row['computed']:.3f}", f"{row['draw_ms']:.1f}"]
            line += [f"{row['structure_ms']:.1f}", str(row["programs"])]
        out.append(line + [""] * (8 - len(line)))
    return out


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--blocks", type=int, default=5, help="per stage; 5 is ResNet-32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--only", nargs="+", default=["eager", "compiled", "early"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    field = [Contestant("dense, compiled", args), Contestant("dense, eager", args)]
    for keep in args.keep:
        names = {"eager": "late, eager", "compiled": "late, compiled", "early": "early, eager"}
        for key in args.only:
            backend = args.backend if key == "compiled" else None
            field.append(Contestant(f"keep {keep:g}, {names[key]}", args, keep, backend))
    early = [one for one in field if one.early]
    times = timing.race(
        [one.step for one in field],
        args.rounds,
        before_each=lambda: [one.draw() for one in early] and None,
    )
    rows = [cells(one, own, times[0], args) for one, own in zip(field, times, strict=True)]
    facts = timing.machine("cpu")
    title = f"ResNet-{6 * args.blocks + 2}, 32-64-128, batch {args.batch}: one weight step"
    headings = ["method", "ms", "speed-up", "MACs on", "MACs run", "draw ms", "structure ms"]
    timing.show(title, timing.where(facts), [*headings, "programs"], [lines(rows)])
    timing.write(args.json, {"machine": facts, "args": vars(args) | {"json": None}, "rows": rows})


if __name__ == "__main__":
    main()
