"""Memory of a training step of a GPT-2 stack: dense against sampled weight gradients.

    python benchmarks/memory.py [--ratios .3 .1] [--budget 1.0] [--device cpu|cuda] [--json PATH]

Every point runs in a process of its own. "saved" is what autograd is handed to keep for the
backward, parameters and inputs apart. "peak" is the most memory that a step took beyond what the
model held at rest: on a CPU resident memory (the kernel's high-water mark, reset after warm-up,
with an allocator that gives back what is freed), on a GPU what torch's allocator counted. The
largest batch that fits a budget is foretold from two peaks by a straight line, and then run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
DENSE = 1.0


@dataclass(frozen=True)
class Point:
    """One process: a method at one batch; bytes, and milliseconds of a step."""

    method: str
    ratio: float
    batch: int
    saved: int
    peak: int
    step: float


# --- the process that measures


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"memory.py: no {field} in /proc/self/status: run it on Linux or with cuda")


def measure(args: argparse.Namespace) -> Point:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import sparsefx as sfx

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=args.layers, n_embd=args.width, n_head=args.width // 64, use_cache=False,
            n_positions=args.tokens, vocab_size=1024, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).to(args.device)  # fmt: skip
    ids = torch.randint(0, 1024, (args.batch, args.tokens), device=args.device)
    if args.ratio == DENSE:
        run = torch.compile(model, backend=args.codegen, dynamic=False)
    else:
        rows = sfx.Sampled(args.ratio, estimator="systematic", scores="input")
        rules = [sfx.Rule("transformer.h.*", grad_weight=rows)]
        config = sfx.SparseConfig(rules, codegen=args.codegen, strict=True)
        options = {"config": config}
        run = torch.compile(model, backend="sparsefx", options=options, dynamic=False)

    def step() -> None:
        run(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    kept: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (ids, *model.parameters())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    step()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    times, peaks = [], []
    for _ in range(args.rounds):
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            rest = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", "utf-8")
            rest = resident("VmRSS")
        start = time.perf_counter()
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        on_gpu = args.device == "cuda"
        peaks.append((torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - rest)
    saved, peak = sum(kept.values()), round(statistics.median(peaks))
    return Point(name(args.ratio), args.ratio, args.batch, saved, peak, statistics.median(times))


def name(ratio: float) -> str:
    return "dense, torch.compile" if ratio == DENSE else f"sparsefx, grad_weight {ratio:g}"


# --- the process that asks


def run_point(args: argparse.Namespace, ratio: float, batch: int) -> Point:
    own = ["--point", "--ratio", str(ratio), "--batch", str(batch)]
    for key in ("device", "codegen", "layers", "width", "tokens", "rounds"):
        own += [f"--{key}", str(getattr(args, key))]
    # what is freed goes back at once: the mark shows tensors, not the allocator's habits
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-P", __file__, *own]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"memory.py: {' '.join(own)} failed:\n{done.stderr[-2000:]}")
    return Point(**json.loads(done.stdout.splitlines()[-1]))


def largest_batch(args: argparse.Namespace, points: list[Point]) -> Point:
    """The largest batch whose peak fits the budget: foretold by a line, then run."""
    small, large = points
    slope = (large.peak - small.peak) / (large.batch - small.batch)
    batch = max(1, int(small.batch + (args.budget * GIB - small.peak) / slope))
    found = run_point(args, small.ratio, batch)
    while found.peak > args.budget * GIB and batch > 1:
        batch = max(1, int(batch * 0.97))
        found = run_point(args, small.ratio, batch)
    return found


def show(results: list[tuple[Point, Point | None]], args: argparse.Namespace) -> None:
    print(
        f"GPT-2 of {args.layers} layers, width {args.width}, {args.tokens} tokens, float32, "
        f"{args.device}; a training step, batch {args.batches[-1]}"
    )
    head = f"{'method':28}{'saved':>12}{'':>7}{'peak':>12}{'':>7}{'step':>11}"
    print(head + (f"   batch in {args.budget:g} GiB" if args.budget else ""))
    base = results[0]
    for point, fits in results:
        line = f"{point.method:28}"
        for own, dense in ((point.saved, base[0].saved), (point.peak, base[0].peak)):
            line += f"{own / 2**20:8.1f} MiB{dense / own:6.2f}x"
        line += f"{point.step:8.0f} ms"
        if fits is not None and base[1] is not None:
            line += f"{fits.batch:9d}{fits.batch / base[1].batch:6.2f}x"
        print(line)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="memory of training steps, dense and sampled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs=2, default=[4, 8])
    parser.add_argument("--budget", type=float, default=1.0, help="GiB; 0: no search")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--point", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ratio", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Point]:
    """Measure, print, and write what was asked for."""
    args = arguments(argv)
    if args.point:
        print(json.dumps(asdict(measure(args))))
        return []
    results: list[tuple[Point, Point | None]] = []
    for ratio in (DENSE, *args.ratios):
        print(f"{name(ratio)} ...", file=sys.stderr)
        points = [run_point(args, ratio, batch) for batch in args.batches]
        fits = largest_batch(args, points) if args.budget else None
        results.append((points[-1], fits))
    show(results, args)
    every = [point for pair in results for point in pair if point is not None]
    if args.json is not None:
        write(args, every)
    return every


def write(args: argparse.Namespace, points: list[Point]) -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
    import timing

    keys = ("codegen", "layers", "width", "tokens", "budget")
    facts: dict[str, Any] = {key: getattr(args, key) for key in keys}
    rows = [asdict(point) for point in points]
    timing.write(args.json, {**timing.machine(args.device), **facts, "rows": rows})


if __name__ == "__main__":
    main()
