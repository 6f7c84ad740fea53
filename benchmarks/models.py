"""Whole training steps: forward, loss, backward and SGD, dense against sampled.

    python benchmarks/models.py [--models gpt resnet] [--ratios .3 .5] [--rounds 7] [--json PATH]

"gpt" is a Hugging Face GPT-2 of 4 layers, width 512, on 8 x 256 tokens of a vocabulary of 8192;
"resnet" a ResNet-18 for 32 x 32 images, batch 32. The model's output, and layers of fewer than 32
pairs, stay dense. The contestants of a model run in turns in one process, each on its own copy.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx as sfx

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from conv import ChannelSampled
from linear import ColumnRowLinear
from timing import factor, machine, race, show, spread_of, where, write

MIN_K = 32


@dataclass(frozen=True)
class Row:
    """One contestant; times in milliseconds."""

    model: str
    method: str
    executed: float | None  # share of the dense products' FLOPs that ran
    median: float
    p20: float
    p80: float
    speedup: float


@dataclass(frozen=True)
class Problem:
    """A model and a batch; ``loss`` takes the model's callable."""

    model: nn.Module
    loss: Callable[[Callable[..., Any]], Tensor]


# --- models


def gpt(small: bool) -> Problem:
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, tokens, batch, words = (1, 64, 8, 2, 64) if small else (4, 512, 256, 8, 8192)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, n_positions=tokens, vocab_size=words,
        bos_token_id=0, eos_token_id=0, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    ids = torch.randint(words, (batch, tokens))
    return Problem(GPT2LMHeadModel(config), lambda run: run(input_ids=ids, labels=ids).loss)


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = nn.Sequential()
        if (stride, width) != (1, out):
            self.short = nn.Sequential(
                nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.short(x)).relu()


def resnet(small: bool) -> Problem:
    """ResNet-18 in its CIFAR form: a 3 x 3 stem without pooling."""
    widths, each, batch, image = ([64], 1, 2, 4) if small else ([64, 128, 256, 512], 2, 32, 32)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
    before = widths[0]
    for stage, width in enumerate(widths):
        for i in range(each):
            layers.append(Block(before, width, 2 if stage and not i else 1))
            before = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
    x, y = torch.randn(batch, 3, image, image), torch.randint(10, (batch,))
    return Problem(nn.Sequential(*layers), lambda run: nn.functional.cross_entropy(run(x), y))


PROBLEMS = {"gpt": gpt, "resnet": resnet}

# --- the peer: sampling as one writes it by hand, in eager mode


@contextmanager
def sampled_by_hand(model: nn.Module, ratio: float) -> Iterator[None]:
    """Let every layer that the rules below sample run its form by hand."""
    changed = []
    for module in model.modules():
        run = _by_hand(module, ratio)
        if run is not None:
            module.forward = run  # type: ignore[method-assign]
            changed.append(module)
    yield
    for module in changed:
        del module.forward


def _by_hand(module: nn.Module, ratio: float) -> Callable[[Tensor], Tensor] | None:
    if isinstance(module, nn.Conv2d) and module.in_channels > MIN_K:
        k = max(MIN_K, int(ratio * module.in_channels))
        bias = module.weight.new_zeros(module.out_channels)
        return lambda x: ChannelSampled.apply(x, module.weight, bias, k, module)
    if type(module).__name__ == "Conv1D":  # Hugging Face's linear layer, weight [in, out]
        weight, bias = module.weight, module.bias
        k = max(MIN_K, int(ratio * weight.shape[0]))
        flat = partial(_linear, w=weight, b=bias, k=k)
        return lambda x: flat(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
    return None


def _linear(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    return ColumnRowLinear.apply(x, w.t(), b, k)


# --- contestants


def rules(ratios: Sequence[float]) -> dict[str, tuple[sfx.Rule, str]]:
    """Rule and selection of each method that is compiled by sparsefx."""
    found = {}
    for ratio in ratios:
        drawn = sfx.Sampled(ratio, min_k=MIN_K)
        found[f"sparsefx, forward {ratio:g}"] = (sfx.Rule("*", forward=drawn), "all")
        found[f"sparsefx, forward {ratio:g}, profitable"] = (
            sfx.Rule("*", forward=drawn),
            "profitable",
        )
        drawn = sfx.Sampled(ratio, estimator="systematic")  # unbiased: what gradients need
        rows = sfx.Rule("*", grad_weight=drawn)
        found[f"sparsefx, grad_weight {ratio:g}"] = (rows, "all")
    return found


def contestant(problem: Problem, codegen: str, rule: sfx.Rule | None, select: str) -> Any:
    """Compile a copy of the model: (its training step, share of FLOPs that it executes)."""
    model = copy.deepcopy(problem.model)
    if rule is None:
        run = torch.compile(model, backend=codegen, dynamic=False)
        return partial(step, run, model, problem, optimizer_of(model)), None
    config = sfx.SparseConfig([rule], strict=True, codegen=codegen, select=select)
    options = {"config": config}
    run = torch.compile(model, backend="sparsefx", options=options, dynamic=False)
    work = partial(step, run, model, problem, optimizer_of(model))
    work()
    flops = sfx.explain(run).totals.flops["all"]
    return work, flops.executed / flops.dense


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def step(
    run: Callable[..., Any], model: nn.Module, problem: Problem, optimizer: torch.optim.Optimizer
) -> float:
    """One whole training step."""
    loss = problem.loss(run)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def eager(problem: Problem, ratio: float) -> Callable[[], object]:
    model = copy.deepcopy(problem.model)
    optimizer = optimizer_of(model)

    def work() -> None:
        with sampled_by_hand(model, ratio):
            step(model, model, problem, optimizer)

    return work


def measure(name: str, args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    torch.compiler.reset()
    problem = PROBLEMS[name](args.small)
    field = {"dense, torch.compile": contestant(problem, args.codegen, None, "all")}
    for method, (rule, select) in rules(args.ratios).items():
        print(f"{name}, {method} ...", file=sys.stderr)
        field[method] = contestant(problem, args.codegen, rule, select)
    for ratio in args.ratios:
        field[f"by hand, eager, forward {ratio:g}"] = (eager(problem, ratio), None)
    times = race([work for work, _ in field.values()], args.rounds)
    return [
        Row(name, method, executed, **spread_of(own, times[0]))
        for (method, (_, executed)), own in zip(field.items(), times, strict=True)
    ]


# --- what comes out


def cells(row: Row) -> list[str]:
    return [
        row.model,
        row.method,
        "" if row.executed is None else f"{row.executed:.0%}",
        f"{row.median:.0f}",
        f"{row.p20:.0f}-{row.p80:.0f}",
        factor(row.speedup),
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time whole training steps, dense and sampled")
    parser.add_argument("--models", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, and write what was asked for."""
    args = arguments(argv)
    facts = {**machine("cpu"), "codegen": args.codegen, "rounds": args.rounds}
    blocks = [measure(name, args) for name in args.models]
    rows = [row for block in blocks for row in block]
    headings = ["model", "method", "executed", "ms", "p20-p80", "x dense"]
    caption = f"{where(facts)}, median of {args.rounds}; <: slower than dense"
    lines = [[cells(row) for row in block] for block in blocks]
    show("training steps: forward, loss, backward, SGD; float32", caption, headings, lines)
    write(args.json, {**facts, "rows": [asdict(row) for row in rows]})
    return rows


if __name__ == "__main__":
    main()
