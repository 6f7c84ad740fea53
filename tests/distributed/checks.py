"""What four gloo processes check: the hook does what a dense all-reduce of the gradients does.

    python checks.py FOLDER    writes what each rank says of each check

Two pairs of processes share the checks; starting them is what takes long.
"""

import contextlib
import multiprocessing as mp
import pickle
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as DDP

import sparsefx as sfx
from sparsefx.distributed import SampledAllreduceState, sampled_allreduce_hook

WORLD = 4
HALF = sfx.Sampled(0.5, scores="weight")
PAIR: Any = None  # the process group of two that this rank is in


def config(
    pattern: sfx.Sampled = HALF, match: str = "*", ends: bool = True, **gradients: Any
) -> sfx.SparseConfig:
    rules = [sfx.Rule(match, forward=pattern, **gradients)]
    return sfx.SparseConfig(rules=rules, codegen="aot_eager", keep_output_dense=ends)


def compiled(model: Any, asked: sfx.SparseConfig | None = None) -> Any:
    return torch.compile(model, backend="sparsefx", options={"config": asked or config()})


# --- models


class MLP(nn.Sequential):
    """With a forward of its own: Dynamo skips that of a Sequential that it meets first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


class ConvNet(nn.Module):
    """Groups, a stride, and one weight in channels_last: 4 input channels, 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 16, 3).to(memory_format=torch.channels_last)
        self.grouped = nn.Conv2d(16, 16, 3, stride=2, groups=4)
        self.one = nn.Conv1d(16, 12, 2)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x).relu()).relu().flatten(2)
        return self.out(self.one(x).mean(2))


class Blocks(nn.Module):
    """A weight that is used twice, a layer that is never used, blocks that are alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.twice, self.unused, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(self.twice(self.twice(x).tanh()).tanh())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu()).tanh()


def gpt2() -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 32}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **drop, use_cache=False))


def batch(model: nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, ConvNet):
        return torch.randn(2, 4, 8, 8, generator=generator)
    if hasattr(model, "lm_head"):
        return torch.randint(0, 32, (2, 6), generator=generator)
    return torch.randn(4, 16, generator=generator)


# --- training


class Run:
    """A model under DDP in a pair of processes, with the hook or with torch's own all-reduce."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        hooked: bool,
        *,
        outer: bool = False,
        asked: sfx.SparseConfig | None = None,
        group: Any = None,
        wrap: Callable[[Any], Any] = lambda hook: hook,
        compress: torch.dtype | None = None,
        **ddp: Any,
    ) -> None:
        self.model, self.group = build(), group or PAIR
        inside = self.model if outer else compiled(self.model, asked)
        self.ddp = DDP(inside, process_group=self.group, **ddp)
        self.forward = compiled(self.ddp, asked) if outer else self.ddp
        self.state = None
        if hooked:
            self.state = SampledAllreduceState(self.forward, self.group, compress=compress)
            self.ddp.register_comm_hook(self.state, wrap(sampled_allreduce_hook))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.now = 0

    def backward(self, forward: Any = None, penalty: Callable[[], Any] = lambda: 0.0) -> None:
        x = batch(self.model, 100 * self.now + dist.get_rank(self.group))
        out = (forward or self.forward)(x)
        (getattr(out, "logits", out).square().mean() + penalty()).backward()
        self.now += 1

    def step(self, **how: Any) -> None:
        self.optimizer.zero_grad()
        self.backward(**how)
        self.optimizer.step()

    def steps(self, count: int = 3) -> "Run":
        for _ in range(count):
            self.step()
        return self

    def values(self) -> dict[str, Tensor]:
        grads = {f"grad of {n}": p.grad for n, p in self.model.named_parameters()}
        return {**self.model.state_dict(), **{k: g for k, g in grads.items() if g is not None}}


def assert_same(mine: Run, other: Run) -> None:
    a, b = mine.values(), other.values()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), (name, (value - b[name]).abs().max())


def both(build: Callable[[], nn.Module], **how: Any) -> tuple[Run, Run]:
    """A run with the hook and one without, and some steps of both that end in the same bits."""
    plain, hooked = (Run(build, on, **how).steps() for on in (False, True))
    assert_same(hooked, plain)
    assert_ranks_agree(hooked)
    return hooked, plain


def assert_ranks_agree(run: Run) -> None:
    flat = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size(run.group))]
    dist.all_gather(found, flat, group=run.group)
    assert all(torch.equal(flat, other) for other in found)


def rows(run: Run) -> dict[str, str]:
    report = run.state.report()
    return {**report.sliced, **report.whole}


@contextlib.contextmanager
def small_buckets() -> Iterator[float]:
    """DDP and its graph splitting put few parameters into a bucket: yields MiB."""
    before = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1
    try:
        yield 1 / 1024
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = before


# --- checks in pairs


def check_bytes_and_values_of_an_mlp() -> None:
    hooked, _ = both(mlp)
    slices = 32 * 8 + 32 * 16 + 5 * 32  # the last layer is dense
    header = 2 * (1 + 0) + 64 + 1  # two parameters with one level each, the hash, stale
    sent, whole = 4 * (slices + 69 + header), 4 * (32 * 16 + 32 * 32 + 5 * 32 + 69)
    assert hooked.state.traffic.last_sent == sent
    assert hooked.state.traffic.last_dense == whole
    assert (hooked.state.bytes_sent, hooked.state.bytes_dense) == (3 * sent, 3 * whole)
    assert rows(hooked) == {
        "module.0.weight": "8 of 16 slices along axis 1",
        "module.2.weight": "16 of 32 slices along axis 1",
        "module.4.weight": "in full: its gradient comes from mm, not a sampled product"[9:],
    }
    assert "3 steps, 0 buckets sent again in full" in str(hooked.state.report())


def check_convolutions() -> None:
    hooked, _ = both(ConvNet)
    assert hooked.model.stem.weight.grad.is_contiguous(memory_format=torch.channels_last)
    found = rows(hooked)
    assert found["module.stem.weight"] == "2 of 4 slices along axis 1"
    assert found["module.grouped.weight"] == "2 of 4 slices along axis 1 of each group"
    assert found["module.one.weight"] == "8 of 16 slices along axis 1"
    assert hooked.state.traffic.resent == 0


def check_gpt2_compiled_outside_of_ddp() -> None:
    hooked, _ = both(gpt2, outer=True)
    found = rows(hooked)
    assert found["module.transformer.h.0.attn.c_attn.weight"] == "8 of 16 slices along axis 0"
    assert found["module.transformer.h.0.mlp.c_proj.weight"] == "32 of 64 slices along axis 0"
    assert hooked.state.traffic.resent == 0
    assert hooked.state.bytes_sent < 0.75 * hooked.state.bytes_dense


def check_many_buckets_split_the_graph() -> None:
    other = sfx.Sampled(0.5, min_k=2, scores="weight")  # shares no code with other checks
    for outer in (False, True):
        with small_buckets() as size:
            how = {"outer": outer, "bucket_cap_mb": size}
            hooked, _ = both(mlp, asked=config(other, ends=False), **how)
        assert rows(hooked)["module.4.weight"] == "16 of 32 slices along axis 1", outer
        assert hooked.state.traffic.last_sent < 0.8 * hooked.state.traffic.last_dense


def check_unused_parameters_and_a_weight_used_twice() -> None:
    hooked, _ = both(Blocks, find_unused_parameters=True)
    assert rows(hooked)["module.twice.weight"] == "8 of 16 slices along axis 1"
    assert hooked.model.unused.weight.grad is None
    assert hooked.state.traffic.resent == 0


def check_options_of_ddp() -> None:
    for how in ({"gradient_as_bucket_view": True}, {"static_graph": True}):
        hooked, _ = both(mlp, **how)
        assert hooked.state.traffic.last_sent < 0.7 * hooked.state.traffic.last_dense
    with torch._dynamo.config.patch(optimize_ddp=False):
        both(mlp, outer=True)


def check_gradient_accumulation() -> None:
    for view in (False, True):
        runs = [Run(mlp, on, gradient_as_bucket_view=view) for on in (False, True)]
        for run in runs:
            for _ in range(2):
                run.optimizer.zero_grad()
                with run.ddp.no_sync():
                    run.backward()
                    run.backward()
                run.backward()
                run.backward()  # and once more, without zero_grad
                run.optimizer.step()
        assert_same(*runs)
        assert runs[1].state.traffic.resent == 0
        assert runs[1].state.traffic.steps == 4


def check_autocast_scores_the_cast_weight() -> None:
    other = sfx.Sampled(0.5, min_k=3, scores="weight")  # shares no code with other checks
    with torch.autocast("cpu", torch.bfloat16):
        hooked, _ = both(mlp, asked=config(other))
    assert rows(hooked)["module.2.weight"] == "16 of 32 slices along axis 1"
    assert hooked.state.traffic.resent == 0
    weight = hooked.model[2].weight  # a tie in bfloat16 that is none in float32
    scores = [weight.detach().to(d).float().square().sum(0) for d in (torch.bfloat16, None)]
    assert not torch.equal(*scores)


def check_half_precision_wrappers() -> None:
    wrapped = Run(mlp, True, wrap=default_hooks.fp16_compress_wrapper).steps()
    plain = Run(mlp, False)
    plain.ddp.register_comm_hook(PAIR, default_hooks.fp16_compress_hook)
    assert_same(wrapped, plain.steps())
    assert wrapped.state.traffic.last_dense == 2 * (32 * 16 + 32 * 32 + 5 * 32 + 69)
    assert wrapped.state.traffic.last_sent < 0.7 * wrapped.state.traffic.last_dense


def check_compress() -> None:
    hooked, plain = (Run(mlp, on, compress=torch.bfloat16) for on in (True, False))
    # torch refuses its own bf16 hook by name on a build without NCCL
    plain.ddp.register_comm_hook(PAIR, lambda state, bucket: bf16_hook(state, bucket))
    assert_same(hooked.steps(), plain.steps())
    assert hooked.state.traffic.last_sent < 0.35 * hooked.state.traffic.last_dense


def bf16_hook(state: Any, bucket: Any) -> Any:
    return default_hooks.bf16_compress_hook(state, bucket)


def check_a_penalty_is_not_lost() -> None:
    def penalty(run: Run) -> Any:
        return 0.01 * run.model[2].weight.square().sum()

    runs = [Run(mlp, on) for on in (False, True)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for run in runs:
            run.step()
            for _ in range(3):
                run.step(penalty=lambda run=run: penalty(run))
            run.steps(3)
    assert_same(*runs)
    (message,) = {str(w.message) for w in said if issubclass(w.category, sfx.SparsefxWarning)}
    assert len([w for w in said if issubclass(w.category, sfx.SparsefxWarning)]) == 1
    assert "the gradient of module.2.weight is not zero outside the slices" in message
    state = runs[1].state
    assert state.traffic.resent == 1  # after that it was sent in full, and now it isn't
    assert state.traffic.last_sent < 0.7 * state.traffic.last_dense


def check_one_rank_alone_has_more() -> None:
    def penalty(run: Run) -> Any:
        return run.model[0].weight.sum() if dist.get_rank(PAIR) == 1 else 0.0

    runs = [Run(mlp, on) for on in (False, True)]
    for _ in range(3):
        runs[0].step(penalty=lambda: penalty(runs[0]))
    with pytest.warns(sfx.SparsefxWarning, match="the gradient of module.0.weight"):
        runs[1].step(penalty=lambda: penalty(runs[1]))
    for _ in range(2):
        runs[1].step(penalty=lambda: penalty(runs[1]))
    assert_same(*runs)
    assert runs[1].state.traffic.resent == 1


def check_ranks_that_choose_differently() -> None:
    runs = [Run(mlp, on) for on in (False, True)]
    if dist.get_rank(PAIR) == 1:
        for run in runs:
            with torch.no_grad():
                run.model[2].weight.copy_(run.model[2].weight.flip(1))
    runs[0].steps()
    with pytest.warns(sfx.SparsefxWarning, match="the ranks chose different slices of module.0"):
        runs[1].step()
    runs[1].steps(2)
    assert_same(*runs)
    assert runs[1].state.traffic.resent == 1


def check_more_is_compiled_later() -> None:
    """Other ratios, dense: the slices follow without a warning, and no gradient is lost."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", sfx.SparsefxWarning)
        compile_more()


def compile_more() -> None:
    runs = [Run(mlp, on) for on in (False, True)]
    patterns = [HALF, sfx.Sampled(0.25, scores="weight"), HALF, sfx.Sampled(1.0, scores="weight")]
    sent = []
    for pattern in patterns:
        for run in runs:
            layers = run.ddp.module._orig_mod
            other = compiled(layers, config(pattern))
            run.ddp.module = other
            for _ in range(4):
                run.step()
        assert_same(*runs)
        traffic = runs[1].state.traffic
        sent.append(traffic.last_sent / traffic.last_dense)
    half, quarter, again, dense = sent
    assert quarter < half == again < 0.7 < 1 < dense
    assert runs[1].state.traffic.resent == 2  # each time that there was more than before


def check_parts_that_are_compiled() -> None:
    """Blocks by their own compile(), one code for all; a compiled step around an eager model."""
    runs = [DDP(Blocks(), process_group=PAIR, find_unused_parameters=True) for _ in range(2)]
    asked = config(sfx.Sampled(0.5, min_k=2, scores="weight"))  # shares no code with other checks
    for ddp in runs:
        for block in ddp.module.blocks:
            block.compile(backend="sparsefx", options={"config": asked})
    state = SampledAllreduceState(runs[1], PAIR)
    runs[1].register_comm_hook(state, sampled_allreduce_hook)
    for ddp in runs:
        ddp(batch(ddp.module, dist.get_rank(PAIR))).square().mean().backward()
    found = [[p.grad for p in ddp.parameters() if p.grad is not None] for ddp in runs]
    assert all(map(torch.equal, *found))
    sliced = state.report().sliced
    assert [f"module.blocks.{i}.up.weight" in sliced for i in range(3)] == [True] * 3
    assert state.traffic.resent == 0

    ddp = DDP(mlp(), process_group=PAIR)
    function = compiled(lambda x: ddp(x).square().mean())
    state = SampledAllreduceState(ddp, PAIR, compiled=[function])
    ddp.register_comm_hook(state, sampled_allreduce_hook)
    function(batch(ddp.module, 0)).backward()
    assert list(state.report().sliced) == ["module.0.weight", "module.2.weight"]


def check_what_is_sent_in_full() -> None:
    hooked, _ = both(mlp, asked=config(HALF, grad_weight=sfx.Dense()))
    reason = "its gradient comes from mm, not a sampled product"
    assert rows(hooked)["module.2.weight"] == reason
    traffic = hooked.state.traffic
    assert (traffic.last_sent, traffic.resent) == (traffic.last_dense + 4, 0)


def check_a_schedule_of_ratios() -> None:
    """Each ratio is compiled when it is met; without a warning the slices follow."""
    runs, schedules, sent = [], [], []
    for on in (False, True):
        schedule = sfx.RatioSchedule(0.25, 0.75, steps=4, shape="step", levels=2)
        pattern = sfx.Sampled(schedule, scores="weight")
        runs.append(Run(mlp, on, asked=config(pattern)))
        schedules.append(schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sfx.SparsefxWarning)
        for _ in range(7):
            for run, schedule in zip(runs, schedules, strict=True):
                run.step()
                schedule.step()
            sent.append(runs[1].state.traffic.last_sent)
    assert_same(*runs)
    assert sent[1] < sent[-1] < runs[1].state.traffic.last_dense
    assert runs[1].state.traffic.resent == 1  # at the jump upwards


def check_seeds_alike_and_apart() -> None:
    """Random draws follow each rank's seed; they travel whole, and none is lost."""
    pattern = sfx.Sampled(0.5, estimator="systematic", scores="weight")
    runs = [Run(mlp, on, asked=config(pattern)) for on in (False, True)]
    for seeds_differ in (False, True):
        for run in runs:
            torch.manual_seed(dist.get_rank() if seeds_differ else 7)
            run.optimizer.zero_grad()
            with run.ddp.no_sync():
                run.backward()
            used = run.model[0].weight.grad.ne(0).any(0)
            found = [torch.empty_like(used) for _ in range(2)]
            dist.all_gather(found, used, group=PAIR)
            assert torch.equal(*found) is not seeds_differ
            run.step()
        assert_same(*runs)
    assert "drawn at random" in rows(runs[1])["module.2.weight"]


def check_a_model_that_is_not_compiled() -> None:
    ddp = DDP(mlp(), process_group=PAIR)
    state = SampledAllreduceState(ddp, PAIR)
    ddp.register_comm_hook(state, sampled_allreduce_hook)
    with pytest.warns(sfx.SparsefxWarning, match="nothing in this model was compiled by sparsefx"):
        ddp(batch(ddp.module, 0)).sum().backward()
    assert state.bytes_sent == state.bytes_dense + 4
    assert set(state.report().whole.values()) == {"no compiled graph computes its gradient"}


def check_pickling() -> None:
    run = Run(mlp, True, compress=torch.float16).steps()
    loaded = pickle.loads(pickle.dumps(run.state))
    assert loaded.report().traffic == run.state.traffic
    assert loaded.compress == torch.float16
    other = Run(mlp, False)
    loaded.process_group = PAIR
    other.ddp.register_comm_hook(loaded, sampled_allreduce_hook)
    with pytest.raises(sfx.SparsefxError, match=r"call state.attach\(model\) on every rank"):
        other.step()
    other = Run(mlp, False)
    loaded.attach(other.ddp)
    other.ddp.register_comm_hook(loaded, sampled_allreduce_hook)
    other.step()
    assert loaded.traffic.steps == 5  # the one that failed had begun
    assert loaded.traffic.last_sent == run.state.traffic.last_sent


def check_a_state_of_another_model() -> None:
    run = Run(mlp, False)
    other = Run(mlp, False)
    run.ddp.register_comm_hook(SampledAllreduceState(other.ddp, PAIR), sampled_allreduce_hook)
    with pytest.raises(sfx.SparsefxError, match="made for another DistributedDataParallel"):
        run.step()


def check_one_hook_for_each_model() -> None:
    run = Run(mlp, True)
    with pytest.raises(RuntimeError, match="can only be called once"):
        run.ddp.register_comm_hook(run.state, sampled_allreduce_hook)


def check_uneven_inputs() -> None:
    """A rank that has joined sends zeros, and its stale weights choose no slice for the others."""
    runs = [Run(mlp, on) for on in (False, True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sfx.SparsefxWarning)
        for run in runs:
            with run.ddp.join():
                run.steps(3 - dist.get_rank(PAIR))
    assert_same(*runs)


def check_fsdp_trains_as_one_process() -> None:
    """fully_shard has no such hook: whole gradients travel, the products are the same."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    def train(model: nn.Module, sampled: bool = True, part: Any = lambda x: x) -> list[Tensor]:
        for block in model.blocks if sampled else ():
            # by themselves: Dynamo leaves the loop around sharded blocks to Python
            block.compile(backend="sparsefx", options={"config": config()})
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(part(batch(model, step).double())).square().mean().backward()
            optimizer.step()
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
        return [value.detach() for value in whole]

    expected = train(Blocks().double())
    model, mesh = Blocks().double(), DeviceMesh.from_group(PAIR, "cpu")
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    found = train(model, part=lambda x: x.chunk(2)[dist.get_rank(PAIR)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found[0], train(Blocks().double(), sampled=False)[0])


# --- checks of all four


def check_all_four_ranks() -> None:
    """A sum of four has another order than the dense one's, whose elements lie elsewhere."""
    world = dist.group.WORLD
    hooked, plain = (Run(mlp, on, group=world) for on in (True, False))
    hooked.backward()
    plain.backward()
    for name, value in hooked.values().items():
        # three additions, each rounded by half a unit of at most the sum of magnitudes
        torch.testing.assert_close(value, plain.values()[name], rtol=2e-6, atol=1e-8)
    hooked.optimizer.step()
    hooked.steps(50)
    assert_ranks_agree(hooked)
    assert hooked.state.traffic.resent == 0
    assert hooked.state.bytes_sent < 0.7 * hooked.state.bytes_dense


TOGETHER = [check_all_four_ranks]
CHECKS = {
    name: check
    for name, check in list(globals().items())
    if name.startswith("check_") and check not in TOGETHER
}


# --- processes


def worker(rank: int, folder: str) -> None:
    global PAIR
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    PAIR = pairs[rank // 2]
    said = {check.__name__: run(check) for check in TOGETHER}
    for name in list(CHECKS)[rank // 2 :: 2]:  # two pairs share the work
        said[name] = run(CHECKS[name])
        if said[name]:
            break  # the other rank of the pair may wait in another call
    torch.save(said, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(check: Callable[[], None]) -> str:
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            check()
    except Exception:
        return traceback.format_exc()
    return ""


def start(folder: str) -> int:
    """Import once what takes seconds, then fork: no backward has started a thread yet."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    with torch.no_grad():
        compiled(mlp())(torch.ones(1, 16))
    failing = runpy.run_path(str(Path(__file__).with_name("failing_ranks.py")))
    jobs = [(worker, (rank, folder)) for rank in range(WORLD)]
    jobs += [(failing["train"], (rank, folder, how)) for how in failing["HOW"] for rank in (0, 1)]
    processes = [mp.get_context("fork").Process(target=task, args=args) for task, args in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(process.exitcode != 0 for process in processes[:WORLD])


if __name__ == "__main__":
    sys.exit(start(sys.argv[1]))
