"""A rank that dies, or hangs, is an error within the timeout for the others, not a hang."""

import multiprocessing as mp
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import sparsefx as sfx
from sparsefx.distributed import SampledAllreduceState, sampled_allreduce_hook

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not dist.is_available(), reason="needs gloo"),
]
TIMEOUT = 3


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


def start(folder: str) -> None:
    """Both pairs side by side; imported once, then forked."""
    import torch._functorch.aot_autograd  # noqa: F401

    fork = mp.get_context("fork")
    jobs = [(rank, folder, how) for how in ("dies", "hangs") for rank in range(2)]
    processes = [fork.Process(target=train, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-P", __file__, str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize(
    ("how", "message"), [("dies", "(closed|reset) by peer"), ("hangs", "[Tt]imed out")]
)
def test_the_other_rank_gets_an_error(folder: Path, how: str, message: str):
    seconds, _, said = (folder / f"{how}.said").read_text().partition(" ")
    assert float(seconds) < 2 * TIMEOUT, seconds
    assert re.search(message, said), said


if __name__ == "__main__":  # what all processes run
    start(sys.argv[1])
