"""Forward and backward of a convolution: dense, channel-sampled by sparsefx, and by hand.

    python benchmarks/conv.py [--ratios .5 .3] [--layouts contiguous channels_last] [--json PATH]

The contestants of a layer, layout and ratio run in turns in one process, see timing.py; values are
checked against the layer by hand before timing. All three products are computed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx as sfx

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from timing import factor, machine, race, show, spread_of, where, write

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Shape:
    """A convolution of a square image with padding that keeps its size (at stride 1)."""

    batch: int
    channels: int
    out: int
    image: int
    taps: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        text = f"{self.taps}x{self.taps} {self.channels}-{self.out}, {self.image}x{self.image}"
        text += f", stride {self.stride}" if self.stride > 1 else ""
        text += f", {self.groups} groups" if self.groups > 1 else ""
        return f"{text}, batch {self.batch}"

    def layer(self) -> nn.Conv2d:
        padding = self.taps // 2
        where = (self.stride, padding, 1, self.groups)
        return nn.Conv2d(self.channels, self.out, self.taps, *where)


SHAPES = (
    Shape(8, 256, 256, 28),
    Shape(8, 256, 256, 28, stride=2),
    Shape(8, 256, 256, 28, groups=4),
    Shape(8, 512, 512, 14),
    Shape(8, 1024, 256, 28, taps=1),
    Shape(8, 64, 64, 56),
)


@dataclass(frozen=True)
class Row:
    """One contestant; times in milliseconds."""

    layer: str
    layout: str
    ratio: float
    method: str
    ideal: float
    median: float
    p20: float
    p80: float
    speedup: float


# --- the peer: channels sampled as one writes it by hand (Adelman et al., 2021)


def _norms(x: Tensor) -> Tensor:
    """Of every channel, axis 1."""
    return torch.linalg.vector_norm(x, dim=(0, 2, 3))


class ChannelSampled(torch.autograd.Function):
    """conv(x, w) over the k strongest input channels; gradients through these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, k: int, conv: nn.Conv2d) -> Tensor:
        scores = _norms(x) * _norms(w)
        ctx.conv, ctx.shape = conv, x.shape
        picked = scores.topk(k).indices
        xs, ws = x.index_select(1, picked), w.index_select(1, picked)
        ctx.save_for_backward(picked, xs, ws)
        return nn.functional.conv2d(xs, ws, b, conv.stride, conv.padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        picked, xs, ws = ctx.saved_tensors
        conv = ctx.conv
        where = (conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, [True] * 3)
        gx, gw, gb = torch.ops.aten.convolution_backward(grad, xs, ws, [ws.shape[0]], *where)
        full_x = grad.new_zeros(ctx.shape).index_copy_(1, picked, gx)
        full_w = torch.zeros_like(conv.weight).index_copy_(1, picked, gw)
        return full_x, full_w, gb, None, None


def by_hand(conv: nn.Conv2d, k: int) -> Callable[[Tensor], Tensor]:
    return lambda x: ChannelSampled.apply(x, conv.weight, conv.bias, k, conv)


# --- contestants


def compiled(
    conv: nn.Conv2d, codegen: str, rule: sfx.Rule | None = None
) -> Callable[[Tensor], Tensor]:
    if rule is None:
        return torch.compile(conv, backend=codegen, dynamic=False)
    config = sfx.SparseConfig([rule], keep_output_dense=False, strict=True, codegen=codegen)
    return torch.compile(conv, backend="sparsefx", options={"config": config}, dynamic=False)


def contestants(
    conv: nn.Conv2d, ratio: float, codegen: str
) -> dict[str, tuple[Callable[[Tensor], Tensor], float]]:
    """Each with its ideal speed-up."""
    drawn = sfx.Sampled(ratio)
    forward = sfx.Rule("*", forward=drawn)
    backward = sfx.Rule("*", grad_input=drawn, grad_weight=drawn)
    found = {
        "dense, torch.compile": (compiled(conv, codegen), 1.0),
        "sparsefx, forward sampled": (compiled(conv, codegen, forward), 1 / ratio),
        "sparsefx, backward sampled": (compiled(conv, codegen, backward), 3 / (1 + 2 * ratio)),
    }
    if conv.groups == 1:  # by hand nobody writes the grouped one
        k = max(1, int(ratio * conv.in_channels))
        found["by hand, eager, forward sampled"] = (by_hand(conv, k), 1 / ratio)
    return found


def step(conv: nn.Conv2d, run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """One forward and backward: the output, and gradients of input, weight and bias."""
    y = run(x)
    return [y, *torch.autograd.grad(y, (x, conv.weight, conv.bias), grad)]


def check(found: list[list[Tensor]], name: str) -> None:
    """Compare the sampled layer with the one by hand.

    Raises:
        SystemExit: they differ beyond rounding; nothing is timed then.
    """
    for own, expected in zip(*found, strict=True):
        own, expected = own.detach(), expected.detach()
        off = float((own - expected).norm() / expected.norm())
        if not off <= 1e-4:
            raise SystemExit(f"{name}: {tuple(own.shape)} is off by {off:.2e} from the one by hand")


def measure(shape: Shape, layout: str, ratio: float, args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    torch.compiler.reset()
    conv = shape.layer().to(memory_format=LAYOUTS[layout])
    image = torch.randn(shape.batch, shape.channels, shape.image, shape.image)
    x = image.to(memory_format=LAYOUTS[layout]).requires_grad_()
    grad = torch.randn_like(conv(x).detach())
    field = contestants(conv, ratio, args.codegen)
    works = {name: partial(step, conv, run, x, grad) for name, (run, _) in field.items()}
    if shape.groups == 1:
        pair = ["sparsefx, forward sampled", "by hand, eager, forward sampled"]
        check([works[name]() for name in pair], f"{shape}, {layout}, ratio={ratio}")
    times = race(list(works.values()), args.rounds)
    return [
        Row(str(shape), layout, ratio, name, ideal, **spread_of(own, times[0]))
        for (name, (_, ideal)), own in zip(field.items(), times, strict=True)
    ]


# --- what comes out


def cells(row: Row) -> list[str]:
    return [
        f"{row.ratio:g}",
        row.method,
        f"{row.median:.2f}",
        f"{row.p20:.2f}-{row.p80:.2f}",
        factor(row.speedup),
        f"{row.ideal:.2f}",
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time convolutions, dense and sampled")
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))),
                        help="; ".join(f"{i}: {s}" for i, s in enumerate(SHAPES)))  # fmt: skip
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5])
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, shapes: Sequence[Shape] = SHAPES) -> list[Row]:
    """Measure, print, and write what was asked for."""
    args = arguments(argv)
    facts = {**machine("cpu"), "codegen": args.codegen, "rounds": args.rounds}
    blocks = []
    for shape in (shapes[i] for i in args.shapes if i < len(shapes)):
        for layout in args.layouts:
            for ratio in args.ratios:
                print(f"{shape}, {layout}, {ratio:g} ...", file=sys.stderr)
                blocks.append(measure(shape, layout, ratio, args))
    rows = [row for block in blocks for row in block]
    headings = ["layer", "ratio", "method", "ms", "p20-p80", "x dense", "ideal"]
    caption = f"{where(facts)}, median of {args.rounds}; <: slower than dense"
    lines = []
    for block in blocks:
        names = [block[0].layer, block[0].layout, *[""] * len(block)]
        lines.append([[name, *cells(row)] for name, row in zip(names, block, strict=False)])
    show("convolution, float32, forward + backward", caption, headings, lines)
    write(args.json, {**facts, "rows": [asdict(row) for row in rows]})
    return rows


if __name__ == "__main__":
    main()
