"""Two gloo processes under DDP and FSDP2 train as one process does on the whole batch."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsefx import SparsifierError
from sparsefx.sparsifiers import SRSTE, Cubic, Sparsifier, TransposableNM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or not torch.distributed.is_available(), reason="needs gloo"
    ),
]
WORLD, STEPS, MICRO = 2, 4, 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.Linear(8, 16), nn.GELU(), nn.Unflatten(1, (4, 4))]
    tail = [nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*head, *tail).double()


def build(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Sparsifier:
    if kind == "srste":
        return SRSTE(model, decay=0.05)
    if kind == "decoupled":
        return SRSTE(model, decay=0.05, decoupled=True, optimizer=optimizer)
    if kind == "static":
        return TransposableNM(model, 2, 4, static=True)
    return TransposableNM(model, 1, 4, refresh=2, ramp=Cubic(1, 0, 3), decay=0.05)


def batches(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(8, 8, generator=generator).double() for _ in range(MICRO)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.01)


def loop(
    forward: Callable[[Tensor], Tensor],
    sparsifier: Sparsifier,
    optimizer: torch.optim.Optimizer,
    part: Callable[[Tensor], Tensor],
    between: Callable[[bool], Any] = lambda last: None,
) -> None:
    """Two backwards per step, each on this rank's part of the batch."""
    for step in range(STEPS):
        optimizer.zero_grad()
        for i, x in enumerate(batches(step)):
            between(i == MICRO - 1)
            (forward(part(x)).square().mean() / MICRO).backward()
        nn.utils.clip_grad_norm_(sparsifier.model.parameters(), 0.5)
        optimizer.step()
        sparsifier.step()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def state(model: nn.Module, sparsifier: Sparsifier) -> dict[str, Tensor]:
    found = {key: whole(value).clone() for key, value in model.state_dict().items()}
    for name, count in sparsifier.sad(total=True).items():
        found[f"sad of {name}"] = torch.tensor(count)
    found["retained"] = torch.tensor([row.retained for row in sparsifier.report().rows])
    return found


def single(kind: str) -> dict[str, Tensor]:
    model = net()
    optimizer = adam(model)
    sparsifier = build(kind, model, optimizer)
    loop(model, sparsifier, optimizer, lambda x: x)
    return state(model, sparsifier)


def with_ddp(kind: str, rank: int, bucket_view: bool) -> dict[str, Tensor]:
    model = net()
    optimizer = adam(model)
    sparsifier = build(kind, model, optimizer)
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    loop(ddp, sparsifier, optimizer, lambda x: x.chunk(WORLD)[rank])
    return state(model, sparsifier)


def with_fsdp(kind: str, rank: int, sync_once: bool) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = net()
    sparsifier = build(kind, model, adam(model))
    fully_shard(model[0])  # the parametrized layer itself, and the rest as one
    fully_shard(model)
    if kind == "srste":
        with pytest.raises(SparsifierError, match=r"call attach\(\) after fully_shard"):
            sparsifier.step()
    optimizer = adam(model)
    if kind == "decoupled":
        with pytest.raises(SparsifierError, match=r"attach\(optimizer=...\)"):
            sparsifier.step()
        sparsifier.attach(optimizer)
    else:
        sparsifier.attach()
    part = lambda x: x.chunk(WORLD)[rank]  # noqa: E731
    sync = model.set_requires_gradient_sync if sync_once else lambda last: None
    loop(model, sparsifier, optimizer, part, sync)
    found = state(model, sparsifier)
    check_squash(model, sparsifier, optimizer, part(batches(9)[0]))
    return found


def check_squash(
    model: nn.Module, sparsifier: Sparsifier, optimizer: torch.optim.Optimizer, x: Tensor
) -> None:
    """The sharded model gives the same bits, saves as a plain one, and trains on."""
    with torch.no_grad():
        expected = model(x)  # leaves the root's parameters whole
    sparsifier.squash()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    model.reshard()
    assert list(model.state_dict()) == list(net().state_dict())
    assert "Parametrized" not in str(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held
    before = [whole(p.detach()).clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(whole(p.detach()), old)


def check_mixed_precision(rank: int) -> None:
    """Weights are multiplied in bfloat16; the decay is added in float32 all the same."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    grads = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for decay in (0.0, 0.05):
        model = net().float()
        sparsifier = SRSTE(model, decay=decay)
        fully_shard(model, mp_policy=policy)
        sparsifier.attach()
        model(batches(0)[0].float().chunk(WORLD)[rank]).square().mean().backward()
        grads.append([whole(layer.weight.grad) for layer in sparsifier.layers.values()])
    for plain, decayed, layer in zip(*grads, sparsifier.layers.values(), strict=True):
        w = whole(layer.weight.detach())
        assert plain.dtype == w.dtype == torch.float32
        assert torch.equal(decayed, plain + 0.05 * (~layer.mask.mask * w))


def check_order() -> None:
    """A model that is sharded already is refused, and stays as it is."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net())
    with pytest.raises(SparsifierError, match=r"layer '0' is sharded already: construct the"):
        SRSTE(model)
    assert list(model.state_dict()) == list(net().state_dict())


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    run = {"ddp": with_ddp, "fsdp": with_fsdp}
    results = [run[how](kind, rank, flag) for how, kind, flag in JOBS]
    check_mixed_precision(rank)
    check_order()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


JOBS = [
    (how, kind, flag)
    for how in ("ddp", "fsdp")
    for kind in ("srste", "dynamic", "decoupled", "static")
    for flag in ((False, True) if kind in ("srste", "dynamic") else (False,))
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    """What each rank found, for all jobs: starting processes is what takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-P", "-W", "error", __file__, str(folder)]
    started = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("job", range(len(JOBS)), ids=["-".join(map(str, job)) for job in JOBS])
def test_two_processes_agree_with_one(results: list[list[dict[str, Tensor]]], job: int):
    mine, other = (found[job] for found in results)
    expected = single(JOBS[job][1])
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(mine[key], other[key]), key
        if value.is_floating_point():
            torch.testing.assert_close(mine[key], value, rtol=1e-8, atol=1e-10)
        else:
            assert torch.equal(mine[key], value), key


if __name__ == "__main__":  # what each process runs
    worker(int(sys.argv[2]), sys.argv[1])
