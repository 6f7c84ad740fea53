"""Train a small GPT on the Python standard library's own source text, dense and sparse.

    python examples/train_gpt_on_stdlib.py [--steps N] [--runs NAME ...] [--out FOLDER]

The model is Hugging Face's GPT-2, randomly initialised, about 3 million parameters, reading bytes.
Four runs see the same batches: dense, 2:4 (SR-STE), 4:8 transposable, and 2:4 with a sampled
grad_weight. Every run is resumable: stop it at any time and start it again with the same --out,
with more --steps if you like.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import sparsefx as sfx

matplotlib.use("Agg")  # a picture in a file, no window
import matplotlib.pyplot as plt

RATE, WEIGHT_DECAY, BETAS, CLIP = 1.5e-3, 0.1, (0.9, 0.95), 1.0
WARM_UP, DECLINE = 20, 100  # the rate rises, stays, then falls with 1/sqrt(step): no end is needed
REFRESH = 30  # steps between two transposable masks
RAMP = 200  # steps over which these go from dense to 4:8
MARGIN = 0.02  # of dense's validation loss, for 4:8 transposable
JUDGED = 300  # a run of fewer steps shows that it works, not how well
LAYERS = "transformer.h.*"  # attention and MLP projections; embedding and head (tied) stay dense


@dataclass(frozen=True)
class Text:
    """Bytes as uint8, of files for training and of other files for validation."""

    train: Tensor
    valid: Tensor


@dataclass
class Run:
    """One way of training, and what came of it."""

    name: str
    sparsify: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None
    config: sfx.SparseConfig | None = None  # None: torch.compile with plain Inductor
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)
    seconds: list[float] = field(default_factory=list)
    report: str = ""


def runs() -> list[Run]:
    """What is compared. A sparsifier owns the masks, the compiler finds them in the graph."""
    every = [sfx.Rule(LAYERS, forward=sfx.NM(2, 4))]
    unbiased = sfx.Sampled(0.5, estimator="systematic")
    sampled = [sfx.Rule(LAYERS, grad_weight=unbiased)]

    def srste(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        # decoupled: under Adam the published form would be rescaled with the gradient
        return sfx.sparsifiers.SRSTE(
            model, rules=every, decay=2e-4, decoupled=True, optimizer=optimizer
        )

    def transposable(model: nn.Module, _: torch.optim.Optimizer) -> Any:
        # masked gradients: what a ramp from dense has pruned need not come back
        return sfx.sparsifiers.TransposableNM(
            model, 4, 8, rules=[LAYERS], refresh=REFRESH, ramp=RAMP, weight_grad="masked"
        )

    return [
        Run("dense"),
        Run("2:4", srste, sfx.SparseConfig(rules=[])),
        Run("4:8-transposable", transposable, sfx.SparseConfig(rules=[])),
        Run("2:4-sampled", srste, sfx.SparseConfig(rules=sampled)),
    ]


def standard_library() -> Text:
    """Read this Python's own library; a tenth of the files, by their names, is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(name.parts):
            continue
        kept_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 26
        parts[kept_out].append(file.read_bytes())
    train, valid = (
        torch.frombuffer(bytearray(b"\n".join(parts[kept_out])), dtype=torch.uint8)
        for kept_out in (False, True)
    )
    return Text(train, valid)


def windows(text: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Draw [count, length] int64 bytes; the seed alone decides where, so a resumed run goes on."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()]).long()


def new_model(options: argparse.Namespace) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=options.context,
            n_embd=options.width,
            n_layer=options.depth,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.loss_type = "ForCausalLM"  # else transformers says at every start that it assumes so
    return model


def compile_for(run: Run, model: nn.Module, codegen: str) -> Callable[..., Any]:
    if run.config is None:
        return torch.compile(model, backend=codegen, dynamic=False)
    config = dataclasses.replace(run.config, codegen=codegen)
    return torch.compile(model, backend="sparsefx", dynamic=False, options={"config": config})


@torch.no_grad()
def validate(model: nn.Module, data: Tensor) -> float:
    """Return the mean loss in nats a byte; exact, whatever is sampled in training."""
    model.eval()
    losses = [model(input_ids=part, labels=part).loss for part in data.split(8)]
    model.train()
    return torch.stack(losses).mean().item()


def save(path: Path, content: dict[str, Any]) -> None:
    """Write beside, then rename: a run that is killed leaves the last checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def settings(options: argparse.Namespace) -> dict[str, int]:
    """What a checkpoint depends on; more steps may follow at any time."""
    keys = ("batch", "context", "width", "depth", "every")
    return {key: getattr(options, key) for key in keys}


def restore(path: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = torch.load(path, weights_only=True)
    if found["settings"] != settings(options):
        raise SystemExit(
            f"{path} was made with {found['settings']}, not {settings(options)}; "
            "give the same options, or another --out"
        )
    if options.steps not in [step for step, _ in found["curve"]] and found["step"] > options.steps:
        raise SystemExit(
            f"{path} is at step {found['step']} already, without a value at step {options.steps}; "
            "give more --steps, or another --out"
        )
    return found


def train(
    run: Run, text: Text, options: argparse.Namespace, tick: Callable[[int, str], None]
) -> None:
    """Train to options.steps, from the checkpoint if there is one."""
    model = new_model(options)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY, betas=BETAS
    )
    sparsifier = run.sparsify(model, optimizer) if run.sparsify else None
    path, step = Path(options.out) / f"{run.name.replace(':', '-')}.pt", 0
    if (found := restore(path, options)) is not None:
        model.load_state_dict(found["model"])  # the masks are buffers among the rest
        optimizer.load_state_dict(found["optimizer"])
        torch.set_rng_state(found["random"])  # sampled products draw from it
        step, run.curve = found["step"], [tuple(point) for point in found["curve"]]
    held_out = windows(text.valid, 64, options.context, seed=0)
    compiled = compile_for(run, model, options.codegen)
    if not run.curve:
        run.curve.append((0, validate(model, held_out)))
    tick(step, f"loss {run.curve[-1][1]:.3f}")
    while step < options.steps:
        batch = windows(text.train, options.batch, options.context, seed=1 + step)
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP, (DECLINE / (step + 1)) ** 0.5)
        optimizer.zero_grad()
        compiled(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
        run.seconds.append(time.perf_counter() - started)
        step += 1
        if step % options.every == 0 or step == options.steps:
            run.curve.append((step, validate(model, held_out)))
            save(
                path,
                {
                    "settings": settings(options),
                    "step": step,
                    "curve": run.curve,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random": torch.get_rng_state(),
                },
            )
        tick(step, f"loss {run.curve[-1][1]:.3f}")
    if sparsifier is not None:
        run.report = str(sparsifier.report())


def losses_at(chosen: list[Run], steps: int) -> dict[str, float]:
    """Return the loss of every run at the same step."""
    return {run.name: dict(run.curve)[steps] for run in chosen if steps in dict(run.curve)}


def plot(chosen: list[Run], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in chosen:
        points = run.curve[1:] or run.curve  # at step 0 all know nothing, and would set the scale
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=run.name, marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats per byte")
    axes.set_title("GPT-2 of 3 M parameters on the Python standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(chosen: list[Run], steps: int) -> Table:
    reached = losses_at(chosen, steps)
    dense = reached.get("dense")
    out = Table(title=f"validation loss after {steps} steps")
    for name in ("run", "loss", "vs dense", "step"):
        out.add_column(name, justify="left" if name == "run" else "right")
    for run in chosen:
        lost = f"{100 * (reached[run.name] / dense - 1):+.1f}%" if dense else ""
        usual = sorted(run.seconds)[len(run.seconds) // 2] if run.seconds else None
        took = f"{1e3 * usual:.0f} ms" if usual is not None else "(from a checkpoint)"
        out.add_row(run.name, f"{reached[run.name]:.4f}", lost, took)
    return out


def verdict(chosen: list[Run], steps: int) -> tuple[int, str]:
    """Judge 4:8 transposable against dense: (exit status, what to say)."""
    reached = losses_at(chosen, steps)
    if not {"dense", "4:8-transposable"} <= reached.keys():
        return 0, "Not judged: that takes the runs dense and 4:8-transposable."
    lost = reached["4:8-transposable"] / reached["dense"] - 1
    said = f"4:8-transposable is {100 * lost:+.2f}% off dense (allowed: {100 * MARGIN:.0f}%)"
    if steps < JUDGED:
        return 0, f"{said}; a run of {steps} steps is not judged."
    return int(lost > MARGIN), f"{'FAILED: ' if lost > MARGIN else ''}{said}."


def arguments() -> argparse.Namespace:
    names = [run.name for run in runs()]
    parser = argparse.ArgumentParser(description="Train a small GPT, dense and sparse.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--every", type=int, default=50, help="steps between two validations")
    parser.add_argument("--runs", nargs="+", choices=names, default=names)
    parser.add_argument("--out", default=".out/gpt", help="checkpoints, curves.json, curves.png")
    parser.add_argument("--codegen", default="inductor", choices=("inductor", "aot_eager"))
    options = parser.parse_args()
    for key in ("steps", "batch", "context", "width", "depth", "every"):
        if getattr(options, key) < 1:
            parser.error(f"--{key} {getattr(options, key)}: must be at least 1")
    if options.width % 32:
        parser.error(f"--width {options.width}: must be a multiple of 32 (4 heads, tiles of 8)")
    return options


def main() -> int:
    options = arguments()
    # Inductor's own import of torch.utils.mkldnn declares ScriptModules.
    warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated", DeprecationWarning)
    console = Console(width=100)
    text = standard_library()
    chosen = [run for run in runs() if run.name in options.runs]
    size = sum(p.numel() for p in new_model(options).parameters())
    console.print(
        f"{len(text.train) / 1e6:.1f} MB of source text to train on, {len(text.valid) / 1e6:.1f} "
        f"MB to validate on; {size / 1e6:.2f} M parameters",
        highlight=False,
    )
    bars = Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, {task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with bars:
        for run in chosen:
            bar = bars.add_task(run.name, total=options.steps, note="compiling")
            train(
                run,
                text,
                options,
                lambda step, note, bar=bar: bars.update(bar, completed=step, note=note),
            )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    curves = {run.name: run.curve for run in chosen}
    (out / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    plot(chosen, out / "curves.png")
    for run in chosen:
        if run.report:
            console.print(f"\n{run.name}:\n{run.report}", highlight=False, markup=False)
    console.print(table(chosen, options.steps))
    status, said = verdict(chosen, options.steps)
    console.print(f"{said} Curves: {out / 'curves.png'}", highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
