"""A compiled model that follows a schedule: one graph of Dynamo's, one program for every ratio.

The reference is the same model compiled with that ratio as a number: everything is equal, bit by
bit, since the rewriting and what is drawn are the same.
"""

import contextlib
import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sparsefx as sfx
from sparsefx import ConfigError, RatioSchedule, Rule, Sampled, SparseConfig, SparsefxError
from sparsefx.config import PRESETS
from sparsefx.rewriting import PassResult
from sparsefx.variants import Variants

# Dynamo looks at what comes from before a graph break
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def three(tail: int = 1) -> RatioSchedule:
    """0.6 for two steps, 0.4 for three, then 0.2, or exact."""
    return RatioSchedule(0.6, 0.2, 6, "linear", levels=3, tail=tail)


def sampled(ratio: Any, where: str = "forward grad_weight", **more: Any) -> SparseConfig:
    pattern = Sampled(ratio, **more)
    return SparseConfig(rules=[Rule("*", **dict.fromkeys(where.split(), pattern))], strict=True)


class Two(nn.Module):
    """A layer that is sampled, and one that feeds the output."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Broken(nn.Module):
    """Two graphs with layers, and one without between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        x = x.sin() * 2
        torch._dynamo.graph_break()
        return self.second(x).relu() * 2


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) * 2


@pytest.fixture
def compiled_ratios(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """The ratios of every program that is compiled."""
    found: list[tuple[float, ...]] = []
    real = Variants._compile

    def counting(self: Variants, key: Any, inputs: Any) -> Any:
        found.append(key)
        return real(self, key, inputs)

    monkeypatch.setattr(Variants, "_compile", counting)
    return found


@pytest.fixture
def graphs() -> Callable[[], int]:
    """How many graphs Dynamo has made since the test began."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def step_of(compiled: Any, model: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
    """Output and gradients of one training step, with the seed set."""
    torch.manual_seed(seed)
    model.zero_grad()
    y = compiled(x)
    if y.requires_grad:
        y.float().pow(2).mean().backward()
    return [y.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


CASES = {
    "dynamic": ("Two", {"dynamic": True}, {}),
    "sizes that change": ("Two", {}, {"sizes": (5, 5, 6, 7, 5, 5)}),
    "rows by the input": (
        "Two",
        {},
        {"where": "grad_weight", "more": {"estimator": "bernoulli", "scores": "input"}},
    ),
    "graph breaks": ("Broken", {}, {}),
    "checkpointed": ("Checkpointed", {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_equals_the_ratio_as_a_number(kit, compiled_ratios, graphs, case):
    kind, kwargs, how = CASES[case]
    make = {"Broken": Broken, "Checkpointed": lambda: Checkpointed(Two()), "Two": Two}
    model = make.get(kind, kit.CNN)()
    where, more = how.get("where", "forward grad_weight"), how.get("more", {})
    mode = how.get("mode", contextlib.nullcontext)
    kwargs = {"dynamic": None if "sizes" in how else False, **kwargs}
    shape = (4, 6, 6) if kind == "CNN" else (16,)
    inputs = [torch.randn(size, *shape) for size in how.get("sizes", (6,) * 6)]
    schedule, got = three(), []
    compiled = kit.compile(model, sampled(schedule, where, **more), **kwargs)
    for x in inputs:
        with mode():
            got.append((schedule.ratio, x, step_of(compiled, model, x)))
        schedule.step()
    assert [ratio for ratio, _, _ in got] == [0.6, 0.6, 0.4, 0.4, 0.4, 1.0]
    made, programs = graphs(), len(compiled_ratios)
    assert made == (3 if kind == "Broken" else 2 if "sizes" in how else 1)
    # of Broken's three graphs one has no layer, and is compiled once
    assert programs <= (7 if kind == "Broken" else made * len(schedule.values))
    torch._dynamo.reset()
    number = kit.compile(model, sampled(0.4, where, **more), **kwargs)
    for ratio, x, found in got:
        with mode():
            assert equal(found, step_of(number, model, x)) == (ratio == 0.4)
    torch._dynamo.reset()


def test_the_tail_is_dense_bit_by_bit(kit):
    """At ratio 1 nothing is left of sampling, whatever draws; without a tail the twin differs."""
    model, schedule = Two(), three()
    config = sampled(schedule, "forward grad_input grad_weight", estimator="systematic")
    x = torch.randn(5, 16)
    dense = step_of(kit.compile(model, SparseConfig(rules=[]), dynamic=False), model, x)
    for dynamic in (False, True):
        schedule.load_state_dict({"step": 0})
        compiled = kit.compile(model, config, dynamic=dynamic)
        assert not equal(step_of(compiled, model, x), dense)
        schedule.load_state_dict({"step": 5})
        assert equal(step_of(compiled, model, x), dense)
        assert kit.sparse(compiled) == set()


def test_inference_stays_exact_and_is_compiled_once(kit, compiled_ratios):
    model, schedule = Two().eval(), three(tail=0)
    compiled = kit.compile(model, sampled(schedule))
    x = torch.randn(5, 16)
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(3):
            with mode():
                torch.testing.assert_close(compiled(x), model(x))
            schedule.step()
    assert len(compiled_ratios) == 2  # one for each mode
    assert all(key == () for key in compiled_ratios)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_that_is_sampled_follows(kit, mode):
    model, schedule = Two().eval(), three(tail=0)
    compiled = kit.compile(model, sampled(schedule, "forward", inference=True))
    x = torch.randn(5, 16)
    number = kit.compile(model, sampled(0.4, "forward", inference=True))
    with mode():
        for step in (1, 2, 4, 6):
            schedule.load_state_dict({"step": step})
            assert torch.equal(compiled(x), number(x)) == (schedule.ratio == 0.4)


def test_a_backward_belongs_to_its_forward(kit):
    """A step between the two, or between accumulated batches, changes no gradient of before."""
    model, schedule = Two(), three(tail=0)
    compiled = kit.compile(model, sampled(schedule), dynamic=False)
    x = torch.randn(6, 16)
    schedule.load_state_dict({"step": 1})
    model.zero_grad()
    first = compiled(x)
    schedule.step()
    second = compiled(x)
    schedule.load_state_dict({"step": 6})
    compiled(x)
    (first.pow(2).mean() + second.pow(2).mean()).backward()
    got = [p.grad.clone() for p in model.parameters()]
    parts = [
        step_of(kit.compile(model, sampled(ratio), dynamic=False), model, x)[1:]
        for ratio in (0.6, 0.4)
    ]
    for found, a, b in zip(got, *parts, strict=True):
        torch.testing.assert_close(found, a + b)
        assert not torch.allclose(found, 2 * a)


def test_compiling_later_touches_no_seed(kit):
    model, schedule = Two(), three(tail=0)
    compiled = kit.compile(model, sampled(schedule), dynamic=False)
    x = torch.randn(6, 16)
    compiled(x)
    schedule.load_state_dict({"step": 3})
    before = torch.get_rng_state()
    compiled(x)
    assert torch.equal(torch.get_rng_state(), before)


# --- whose schedule


def test_two_schedules_make_a_program_for_every_pair_that_occurs(kit, compiled_ratios):
    a, b = three(tail=0), RatioSchedule(0.5, 0.25, 2, "step", levels=2)
    rules = [Rule("first", forward=Sampled(a)), Rule("second", forward=Sampled(b))]
    compiled = kit.compile(kit.MLP(), SparseConfig(rules=rules), dynamic=False)
    x = torch.randn(5, 16)
    for _ in range(7):
        compiled(x).sum().backward()
        a.step()
        b.step()
    assert compiled_ratios == [(0.6, 0.5), (0.6, 0.25), (0.4, 0.25), (0.2, 0.25)]
    shown = {row.layer: row.decided for row in sfx.explain(compiled).sites if row.role == "forward"}
    assert shown == {"first": "sampled 0.2", "second": "sampled 0.25", "last": "dense"}


def test_a_schedule_of_a_rule_that_matches_nothing_compiles_nothing(kit, compiled_ratios):
    used, idle = three(), three()
    rules = [Rule("first", forward=Sampled(used)), Rule("decoder*", forward=Sampled(idle))]
    compiled = kit.compile(Two(), SparseConfig(rules=rules), dynamic=False)
    for _ in range(7):
        compiled(torch.randn(5, 16)).sum().backward()
        idle.step()
    assert len(compiled_ratios) == 1


def test_models_compiled_alike_follow_each_its_own(kit):
    """Dynamo would run the first model's code for the second, whose options are equal by value."""
    schedules = [three(tail=0), three(tail=0)]
    models = [Two(), Two()]
    compiled = [
        kit.compile(m, sampled(s), dynamic=False) for m, s in zip(models, schedules, strict=True)
    ]
    x = torch.randn(6, 16)
    step_of(compiled[0], models[0], x)
    schedules[0].load_state_dict({"step": 6})
    step_of(compiled[0], models[0], x)
    for ratio in (0.6, 0.2):
        schedules[1].load_state_dict({"step": 0 if ratio == 0.6 else 6})
        got = step_of(compiled[1], models[1], x)
        number = kit.compile(models[1], sampled(ratio), dynamic=False)
        assert equal(got, step_of(number, models[1], x)), ratio
    assert [sfx.ratio_schedules(c)[0] is s for c, s in zip(compiled, schedules, strict=True)] == [
        True,
        True,
    ]


def test_a_dict_makes_one_schedule_for_all_graphs(kit, compiled_ratios):
    data = {**sampled(three(tail=0)).to_dict(), "codegen": "aot_eager"}
    compiled = torch.compile(Broken(), backend="sparsefx", options={"config": data}, dynamic=False)
    (schedule,) = sfx.ratio_schedules(compiled)  # before anything was compiled
    x = torch.randn(5, 16)
    for _ in range(7):
        compiled(x).sum().backward()
        schedule.step()
    assert sfx.ratio_schedules(compiled) == (schedule,)
    assert sfx.ratio_schedules(compiled)[0] is schedule
    assert compiled_ratios.count((0.2,)) == 2
    assert {row.decided for row in sfx.explain(compiled).sites if row.layer == "first"} == {
        "sampled 0.2"
    }


def test_a_preset_by_name_has_schedules_of_its_own(monkeypatch):
    shared = SparseConfig(rules=sampled(three()).rules, codegen="aot_eager")
    monkeypatch.setitem(PRESETS, "annealed", shared)
    a, b = (
        torch.compile(Broken(), backend="sparsefx", options={"config": "annealed"})
        for _ in range(2)
    )
    (mine,), (other,) = sfx.ratio_schedules(a), sfx.ratio_schedules(b)
    assert mine == other
    assert mine is not other
    assert mine is not shared.schedules[0]


def test_a_backend_of_the_users_around_ours(kit):
    from sparsefx.backend import sparsefx

    schedule = three(tail=0)
    config = SparseConfig(rules=sampled(schedule, "forward").rules, codegen="aot_eager")

    def mine(gm, inputs):
        return sparsefx(gm, inputs, options={"config": config})

    model = Broken()
    compiled = torch.compile(model, backend=mine, dynamic=False)
    x = torch.randn(5, 16)
    first = compiled(x)
    assert sfx.ratio_schedules(compiled)[0] is schedule
    schedule.load_state_dict({"step": 6})
    assert not torch.equal(first, compiled(x))


def test_ratio_schedules_of_a_config_and_of_what_has_none(kit):
    s = three()
    assert sfx.ratio_schedules(sampled(s))[0] is s
    assert sfx.ratio_schedules(kit.compile(Two())) == ()
    with pytest.raises(
        ConfigError, match=r"dict is neither a SparseConfig nor compiled; .*from_di"
    ):
        sfx.ratio_schedules(sampled(s).to_dict())
    with pytest.raises(ConfigError, match="Two is neither a SparseConfig nor compiled"):
        sfx.ratio_schedules(Two())
    with pytest.raises(SparsefxError, match="OptimizedModule was not compiled by sparsefx"):
        sfx.ratio_schedules(torch.compile(Two(), backend="eager"))


def test_a_dict_whose_schedule_nobody_can_step_is_refused():
    from sparsefx.variants import config_of

    with pytest.raises(ConfigError, match="nobody could step"):
        config_of(None, sampled(three()).to_dict())


def test_too_many_programs_at_once_are_refused(kit):
    many = [RatioSchedule(0.9, 0.1, 99, levels=9) for _ in range(2)]
    rules = [Rule(n, forward=Sampled(s)) for n, s in zip(("first", "second"), many, strict=True)]
    compiled = kit.compile(kit.MLP(), SparseConfig(rules=rules), dynamic=True)
    with pytest.raises(ConfigError, match=r"2 schedules have 81 combinations .*at most 64.*share"):
        compiled(torch.randn(5, 16))


def test_a_failing_pass_is_told_at_the_switch(kit):
    """Strict errors of a later variant come up in the call that needs it, and again in the next."""

    def refuses(gm):
        if any("sampled" in str(node.target) for node in gm.graph.nodes):
            raise ValueError("no sampling here")
        return PassResult(gm)

    schedule = RatioSchedule(1.0, 0.5, 2, "step", levels=2)
    config = SparseConfig(
        rules=[Rule("*", forward=Sampled(schedule))], passes=[refuses], strict=True
    )
    model = Two()
    compiled, x = kit.compile(model, config, dynamic=False), torch.randn(5, 16)
    exact = compiled(x)
    schedule.step()
    for _ in range(2):
        with pytest.raises(sfx.PassError, match="no sampling here"):
            compiled(x)
    schedule.load_state_dict({"step": 0})
    assert torch.equal(compiled(x), exact)


# --- reports


def test_explain_shows_the_ratio_that_ran_last_once(kit):
    model, schedule = Two(), three()
    compiled = kit.compile(model, sampled(schedule), dynamic=False)
    x, seen = torch.randn(5, 16), []
    for _ in range(6):
        compiled(x).sum().backward()
        report = sfx.explain(compiled)
        seen.append({r.decided for r in report.sites if (r.layer, r.role) == ("first", "forward")})
        assert len(report.sites) == 5
        schedule.step()
    half, less = {"sampled 0.6"}, {"sampled 0.4"}
    assert seen == [half, half, less, less, less, {"dense"}]
    earlier = sfx.explain(compiled)
    schedule.load_state_dict({"step": 0})
    compiled(x)
    assert "sampled 0.6" in str(sfx.explain(compiled))
    assert "sampled" not in str(earlier)  # a report stays what it was
    assert "sampled_mm" not in str(earlier.forward[0].graph)


def test_explain_of_a_model_as_it_is_takes_the_ratio_of_now(kit):
    schedule = three()
    explained = sfx.explain(Two(), config=sampled(schedule))
    x = torch.randn(5, 16)
    assert explained(x).sites[0].decided == "sampled 0.6"
    schedule.load_state_dict({"step": 3})
    assert explained(x).sites[0].decided == "sampled 0.4"


# --- a training


def test_a_resumed_training_goes_on_bit_by_bit(kit):
    x = torch.randn(6, 16)

    def setup(model):
        schedule = three()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, schedule, optimizer, kit.compile(model, sampled(schedule), dynamic=False)

    def train(model, schedule, optimizer, compiled, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            compiled(x).pow(2).mean().backward()
            optimizer.step()
            schedule.step()

    whole = setup(Two())
    start = copy.deepcopy(whole[0])
    train(*whole, 7)
    half = setup(start)
    train(*half, 3)
    saved = copy.deepcopy([part.state_dict() for part in half[:3]])
    resumed = setup(Two())
    for part, state in zip(resumed[:3], saved, strict=True):
        part.load_state_dict(state)
    train(*resumed, 4)
    for got, wanted in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo by a file")
def test_ddp_around_and_inside(kit, compiled_ratios, tmp_path):
    """DDP around a compiled model, and compiled itself, which splits the graph at its buckets."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, x = kit.MLP(512), torch.randn(6, 512)  # two buckets of 1 MiB
        for around in (True, False):
            schedule = three()

            def wrapped(ratio, around=around):
                if around:
                    compiled = kit.compile(model, sampled(ratio), dynamic=False)
                    return DistributedDataParallel(compiled, bucket_cap_mb=1)
                ddp = DistributedDataParallel(model, bucket_cap_mb=1)
                return kit.compile(ddp, sampled(ratio), dynamic=False)

            torch._dynamo.reset()
            compiled_ratios.clear()
            compiled, got = wrapped(schedule), []
            for step in (1, 2, 4):
                schedule.load_state_dict({"step": step})
                got.append(step_of(compiled, model, x))
            assert 2 <= len(compiled_ratios) <= 6
            torch._dynamo.reset()
            number = step_of(wrapped(0.4), model, x)
            assert [equal(found, number) for found in got] == [False, True, True]
    finally:
        torch.distributed.destroy_process_group()


def test_with_inductor(graphs, kit):
    """The second program is compiled in the call, long after Dynamo has gone."""
    model, schedule = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), RatioSchedule(1, 0.5, 1)
    x, options = torch.randn(8, 8), {"config": sampled(schedule, "grad_weight")}
    compiled = torch.compile(model, backend="sparsefx", options=options, dynamic=False)
    made = 1
    for ratio in (1.0, 0.5):
        got = step_of(compiled, model, x)
        assert graphs() == made
        number = kit.compile(model, sampled(ratio, "grad_weight"), dynamic=False)
        for found, wanted in zip(got, step_of(number, model, x), strict=True):
            torch.testing.assert_close(found, wanted)
        made = graphs()
        schedule.step()
    assert {r.decided for r in sfx.explain(compiled).sites} == {"dense", "sampled 0.5"}
