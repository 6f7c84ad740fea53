"""Data-parallel training that sends only the slices of gradients which sampled products fill.

    torchrun --nproc_per_node 2 examples/ddp_sampled.py

An MLP learns handwritten digits (scikit-learn's load_digits) under DistributedDataParallel, dense
with torch's own all-reduce, then sampled with ``sampled_allreduce_hook``. The weights' norms choose
what is sampled, so all processes choose alike, and nobody sends indices.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsefx as sfx

BATCH = 64  # of all processes together
HOW_TO_RUN = "run it with torchrun: torchrun --nproc_per_node 2 examples/ddp_sampled.py"


class MLP(nn.Module):
    """64 pixels, two hidden layers, 10 digits."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc2(self.fc1(x).relu()).relu())


@dataclass
class Result:
    """What one training came to."""

    loss: float
    accuracy: float
    seconds: float
    sent: int
    alike: bool


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y) to train with, and (x, y) to test with: every fifth image."""
    x, y = (torch.tensor(found) for found in load_digits(return_X_y=True))
    x, test = x.float() / 16, torch.arange(len(x)) % 5 == 0
    return x[~test], y[~test], x[test], y[test]


def batches(x: Tensor, y: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every batch."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
    for batch in order.split(BATCH)[:-1]:
        mine = batch[dist.get_rank() :: dist.get_world_size()]
        yield x[mine], y[mine]


def train(config: sfx.SparseConfig | None, args: argparse.Namespace) -> Result:
    """Train one model; a config asks for sampled products and the hook."""
    torch.manual_seed(0)
    model = MLP(args.width)
    x, y, test_x, test_y = digits()
    layers = model
    if config is not None:
        layers = torch.compile(model, backend="sparsefx", options={"config": config})
    ddp = DistributedDataParallel(layers)
    state = sfx.distributed.SampledAllreduceState(ddp)
    if config is not None:
        ddp.register_comm_hook(state, sfx.distributed.sampled_allreduce_hook)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    started, steps, loss = time.perf_counter(), 0, torch.zeros(())
    for epoch in range(args.epochs):
        for images, labels in batches(x, y, epoch):
            loss = nn.functional.cross_entropy(ddp(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
    seconds = time.perf_counter() - started
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
    dense = steps * sum(p.nbytes for p in model.parameters())
    if config is not None and dist.get_rank() == 0:
        print(f"what the hook sent:\n{state.report()}\n")
    sent = dense if config is None else state.bytes_sent
    return Result(mean(loss.detach()), accuracy, seconds, sent, alike(model))


def mean(value: Tensor) -> float:
    """Average over all processes."""
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def alike(model: nn.Module) -> bool:
    """Whether all processes hold the same weights, to the last bit."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return all(torch.equal(flat, other) for other in found)


def main() -> None:
    """Train dense and sampled; print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit(HOW_TO_RUN)
    dist.init_process_group("gloo")
    sampled = sfx.Sampled(args.ratio, scores="weight")
    rules = [
        sfx.Rule("fc1", forward=sfx.Dense()),
        sfx.Rule("*", forward=sampled),
    ]  # fc1 sees pixels
    config = sfx.SparseConfig(rules=rules, codegen=args.codegen)
    rows = {"dense": train(None, args), f"sampled {args.ratio:g}": train(config, args)}
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {args.epochs} epochs of digits")
        for name, row in rows.items():
            same = "the same" if row.alike else "DIFFERENT"
            print(
                f"  {name:<12} loss {row.loss:.4f}  accuracy {row.accuracy:.1%}  "
                f"sent {row.sent / 1e6:.1f} MB  {row.seconds:.1f} s  weights {same} on all ranks"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
