"""What sparsefx costs besides the products: compile time, passes, host time, recompiles.

python benchmarks/overhead.py [--parts cold passes host recompiles] [--json PATH]

cold        first forward and backward from an empty cache, each in a process of its own:
            torch.compile with Inductor, and with sparsefx on top; C++ kernels, which are built
            once a machine, are told apart
passes      the pipeline on a GPT-2's joint graph, a second for each 1000 nodes
host        what a sparse op of ours takes on tensors so small that nothing else counts, beside
            the torch operator nearest to it
recompiles  graphs that are compiled while a mask's values and a drawn sample change
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsefx as sfx
from sparsefx import kernels, ops, pipeline, testing
from sparsefx.kernels import _native
from sparsefx.masks import native
from sparsefx.rewriting import copy_graph_module

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from timing import machine, race, show, where, write

CONFIGS = {
    "sampled 0.3": lambda: sfx.Rule("*", forward=sfx.Sampled(0.3)),
    "2:4": lambda: sfx.Rule("*", forward=sfx.NM(2, 4)),
}
Cells = list[list[str]]


# --- cold


def nets() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Models with a compile time worth measuring, and an input of each."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True)
    cnn: list[nn.Module] = []
    for width, out in ((3, 32), (32, 64), (64, 64), (64, 128)):
        cnn += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    wide = [part for _ in range(4) for part in (nn.Linear(512, 512), nn.GELU())]
    return {
        "MLP, 4 x 512": (nn.Sequential(*wide), torch.randn(64, 512)),
        "encoder, 2 x 256": (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            torch.randn(4, 32, 256),
        ),
        "CNN, 4 blocks": (nn.Sequential(*cnn), torch.randn(4, 3, 16, 16)),
    }


def compiled(model: nn.Module, name: str) -> Any:
    if name == "dense":
        return torch.compile(model, backend="inductor")
    config = sfx.SparseConfig(rules=[CONFIGS[name]()], strict=True)
    return torch.compile(model, backend="sparsefx", options={"config": config})


def first_step(net: str, name: str) -> tuple[float, float]:
    """Seconds of the first forward and backward, and of these for C++ kernels.

    A kernel is built once a machine, whatever is compiled afterwards. What a process of its own
    runs.
    """
    built: list[float] = []
    for module in (_native, native):
        module.build_cpp = _timed(module.build_cpp, built)  # type: ignore[attr-defined]
    model, x = nets()[net]
    run, before = compiled(model, name), time.perf_counter()
    run(x).sum().backward()
    return time.perf_counter() - before, sum(built)


def _timed(build: Callable[[str], Any], spent: list[float]) -> Callable[[str], Any]:
    def timed(source: str) -> Any:
        before = time.perf_counter()
        found = build(source)
        spent.append(time.perf_counter() - before)
        return found

    return timed


def cold(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Cells]:
    rows, cells = [], []
    for net in args.nets or nets():
        times: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.rounds):
            for name in ("dense", *CONFIGS):
                print(f"cold, {net}, {name} ...", file=sys.stderr)
                times.setdefault(name, []).append(_elsewhere(net, name))
        least = {name: min(whole - built for whole, built in each) for name, each in times.items()}
        for name, each in times.items():
            whole, built = ([one[place] for one in each] for place in (0, 1))
            row = {"part": "cold", "net": net, "method": name, "seconds": whole, "kernels": built}
            beside = f"{least[name] / least['dense'] - 1:+.0%}"
            if max(built):
                beside += f", and {min(built):.1f} s once for C++ kernels"
            rows.append(row)
            cells.append(["cold", net, name, f"{least[name]:.1f} s", beside])
    return rows, cells


def _elsewhere(net: str, name: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, "-P", __file__, "--one", net, name]
        said = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        whole, built = json.loads(said.stdout.splitlines()[-1])
        return whole, built


# --- passes


def passes(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Cells]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=args.layers, n_embd=64, n_head=4, vocab_size=256, n_positions=32,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model, ids = GPT2LMHeadModel(config), torch.randint(256, (2, 32))
    joint = testing.capture(model, ids)
    count = len(joint.graph.nodes)
    rows, cells = [], []
    for name, rule in CONFIGS.items():
        chosen = sfx.SparseConfig(rules=[rule()], strict=True)
        spent = []
        for _ in range(args.rounds):
            work = copy_graph_module(joint)
            before = time.perf_counter()
            pipeline.run(work, chosen)
            spent.append(time.perf_counter() - before)
        each = 1000 * min(spent) / count
        rows.append({"part": "passes", "method": name, "nodes": count, "seconds": spent})
        what = f"GPT-2, {args.layers} layers, {count} nodes"
        cells.append(["passes", what, name, f"{min(spent):.2f} s", f"{each:.2f} s per 1000"])
    return rows, cells


# --- host


def host(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Cells]:
    kernels.register()
    x, w, picked = torch.randn(4, 8), torch.randn(8, 8), torch.tensor([1, 3])
    values, codes = ops.nm_pack(w, 2, 4)
    pairs = {
        "take_columns": (
            partial(ops.take_columns, x, picked),
            partial(torch.index_select, x, 1, picked),
        ),
        "sum_rows": (partial(ops.sum_rows, x, False), partial(torch.sum, x, 0)),
        "scattered_mm": (
            partial(ops.scattered_mm, x, w[:, :2], picked, 8),
            partial(torch.mm, x, w),
        ),
        "nm_packed_mm": (
            partial(ops.nm_packed_mm, x, values, codes, None, 2, 4),
            partial(nn.functional.linear, x, w),
        ),
    }
    rows, cells = [], []
    for name, (ours, torchs) in pairs.items():
        mine, theirs = (
            1e3 * min(times) / 200
            for times in race([_often(ours), _often(torchs)], max(10, args.rounds))
        )
        rows.append({"part": "host", "op": name, "us": mine, "torch_us": theirs})
        cells.append(["host", name, "", f"{mine:.1f} us", f"torch's own {theirs:.1f} us"])
    return rows, cells


def _often(work: Any) -> Any:
    return lambda: [work() for _ in range(200)]


# --- recompiles


def recompiles(_: argparse.Namespace) -> tuple[list[dict[str, Any]], Cells]:
    rows, cells = [], []
    for name, rule in {
        "2:4, weights change": sfx.Rule("*", forward=sfx.NM(2, 4)),
        "systematic, draws change": sfx.Rule("*", forward=sfx.Sampled(0.5, estimator="systematic")),
    }.items():
        torch.compiler.reset()
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        config = sfx.SparseConfig(rules=[rule], codegen="aot_eager", strict=True)
        run = torch.compile(model, backend="sparsefx", options={"config": config})
        torch._dynamo.utils.counters.clear()
        for _ in range(5):
            run(torch.randn(4, 16)).sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        rows.append({"part": "recompiles", "case": name, "steps": 5, "graphs": graphs})
        cells.append(["recompiles", name, "", f"{graphs} graph", "in 5 steps"])
    return rows, cells


PARTS = {"cold": cold, "passes": passes, "host": host, "recompiles": recompiles}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="what sparsefx costs besides the products")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--nets", nargs="+", choices=nets(), help="default: all")
    parser.add_argument("--layers", type=int, default=12, help="of the GPT-2 that passes see")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions; the least time counts")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(first_step(*args.one)))
        return []
    facts, rows, blocks = machine("cpu"), [], []
    for part in args.parts:
        found, cells = PARTS[part](args)
        rows += found
        blocks.append(cells)
    show("overheads", where(facts), ["part", "of", "method", "least", "beside"], blocks)
    write(args.json, {**facts, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
