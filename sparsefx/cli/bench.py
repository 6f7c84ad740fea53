"""``sparsefx bench``: a model dense and sparse, both compiled, in turns in one process.

In turns, so that what disturbs a round disturbs both; a speed-up is the median over the rounds of
the dense time / the sparse time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx import compat
from sparsefx.cli.explain import Subject, subject_of
from sparsefx.cli.models import load_device
from sparsefx.cli.results import Result, UsageError
from sparsefx.errors import SparsefxError
from sparsefx.report import Report, explain

_Call = Callable[[], object]


def run(options: argparse.Namespace) -> Result:
    """Time a training step, or a forward under ``--inference``."""
    for key, least in (("rounds", 2), ("warmup", 1)):
        if getattr(options, key) < least:
            given = getattr(options, key)
            raise UsageError(f"--{key} {given} must be at least {least}")
    device = load_device(options.device)
    subject = subject_of(options, device)
    if not options.inference:
        loss_of(subject.model(*subject.args, **subject.kwargs))  # refuses before it compiles
    eager = subject.config.codegen == "aot_eager"
    dense = torch.compile(subject.model, backend="aot_eager" if eager else "inductor")
    config: dict[str, Any] = {"config": subject.config}
    sparse = torch.compile(subject.model, backend="sparsefx", options=config)
    field = [_step(compiled, subject, options.inference) for compiled in (dense, sparse)]
    times = race(field, options.rounds, options.warmup, device)
    return _result(options, device, times, explain(sparse))


# --- what is timed


def _step(compiled: Callable[..., Any], subject: Subject, inference: bool) -> _Call:
    def forward() -> object:
        with torch.inference_mode():
            return compiled(*subject.args, **subject.kwargs)

    def step() -> object:
        for parameter in subject.model.parameters():
            parameter.grad = None
        loss = loss_of(compiled(*subject.args, **subject.kwargs))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return forward if inference else step


def loss_of(outputs: object) -> Tensor:
    """Return the sum of every output that has a gradient, as float32.

    Raises:
        SparsefxError: there is none.
    """
    leaves = [t for t in compat.leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    if not leaves:
        raise SparsefxError(
            "no output of the model has a gradient, so there is no backward to time: use "
            "--inference, or let the model return a tensor that depends on its parameters"
        )
    return torch.stack([leaf.float().sum() for leaf in leaves]).sum()


def _timed(step: _Call, device: torch.device) -> float:
    """Milliseconds of one call."""
    _wait(device)
    before = time.perf_counter()
    step()
    _wait(device)
    return (time.perf_counter() - before) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(
    field: Sequence[_Call], rounds: int, warmup: int, device: torch.device
) -> list[list[float]]:
    """Return milliseconds of each contestant's rounds; who runs first changes with the round."""
    times: list[list[float]] = [[] for _ in field]
    for turn in range(warmup + rounds):
        for i in range(len(field)):
            at = (turn + i) % len(field)
            spent = _timed(field[at], device)
            if turn >= warmup:
                times[at].append(spent)
    return times


# --- what is said


def _result(
    options: argparse.Namespace,
    device: torch.device,
    times: Sequence[Sequence[float]],
    report: Report,
) -> Result:
    rows = {name: _spread(own) for name, own in zip(("dense", "sparse"), times, strict=True)}
    ratio = statistics.median(d / s for d, s in zip(*times, strict=True))
    flops = report.totals.flops["all"]
    data = {
        "command": "bench",
        "model": options.model,
        "what": "inference" if options.inference else "forward and backward",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "codegen": report.config.codegen,
        "rounds": options.rounds,
        **rows,
        "dense_over_sparse": ratio,
        "products": {"all": len(report.sites), "sparse": _sparse(report)},
        "flops": {"dense": flops.dense, "sparse": flops.sparse, "executed": flops.executed},
        "failures": list(report.failures),
    }
    return Result(_text(data), data)


def _spread(own: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(own, n=5, method="inclusive")
    return {"median_ms": statistics.median(own), "p20_ms": cuts[0], "p80_ms": cuts[-1]}


def _sparse(report: Report) -> int:
    return sum(row.decision is not None for row in report.sites)


def _text(data: dict[str, Any]) -> str:
    products, flops, ratio = data["products"], data["flops"], data["dense_over_sparse"]
    lines = [
        f"{data['model']}, {data['what']}, on {data['device']} ({data['threads']} threads, torch "
        f"{data['torch']}, {data['codegen']}), {data['rounds']} rounds in turns",
        f"{'':<8}{'median ms':>12}{'p20':>10}{'p80':>10}",
    ]
    for name in ("dense", "sparse"):
        row = [data[name][key] for key in ("median_ms", "p20_ms", "p80_ms")]
        lines.append(f"{name:<8}{row[0]:>12.3f}{row[1]:>10.3f}{row[2]:>10.3f}")
    lines.append(f"dense / sparse: {ratio:.2f}" + (", sparse is slower" if ratio < 0.995 else ""))
    lines.append(
        f"{products['sparse']} of {products['all']} products are sparse; operations: "
        f"{flops['dense']:,} dense, {flops['sparse']:,} that the patterns leave, "
        f"{flops['executed']:,} executed"
    )
    if not products["sparse"]:
        lines.append("nothing became sparse: sparsefx explain says why")
    elif flops["executed"] >= flops["dense"]:
        lines.append("no operation is saved: masked operands are multiplied in full")
    return "\n".join(lines + [f"failure: {text}" for text in data["failures"]])
