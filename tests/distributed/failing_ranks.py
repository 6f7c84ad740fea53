"""Pairs of gloo processes of which one dies, or hangs; the other writes what it sees."""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import sparsefx as sfx
from sparsefx.distributed import SampledAllreduceState, sampled_allreduce_hook

HOW = ("dies", "hangs")
TIMEOUT = 2


class Net(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def train(rank: int, folder: str, how: str) -> None:
    """Two steps together; then rank 1 fails in the third, and rank 0 writes what it sees."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{how}", rank=rank, world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    model = Net(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    rules = [sfx.Rule("*", forward=sfx.Sampled(0.5, scores="weight"))]
    config = sfx.SparseConfig(rules=rules, codegen="aot_eager")
    ddp = DDP(torch.compile(model, backend="sparsefx", options={"config": config}))
    state = SampledAllreduceState(ddp)
    ddp.register_comm_hook(state, sampled_allreduce_hook)
    ddp(torch.randn(4, 8)).sum().backward()
    ddp(torch.randn(4, 8)).sum().backward()
    assert state.report().sliced
    loss = ddp(torch.randn(4, 8)).sum()
    if rank == 1:
        if how == "dies":
            os._exit(1)
        for _ in range(10 * 3 * TIMEOUT):  # until the other has given up
            time.sleep(0 if Path(f"{folder}/{how}.said").exists() else 0.1)
        os._exit(0)
    started = time.monotonic()
    try:
        loss.backward()
    except RuntimeError as error:
        Path(f"{folder}/{how}.said").write_text(f"{time.monotonic() - started:.1f} {error}")
    os._exit(0)  # the process group can't be taken down in order
