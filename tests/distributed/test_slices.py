"""What is read from a graph: where a weight's gradient is non-zero, and how to find it again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx import compat
from sparsefx.distributed.plan import Plan, Planner, Sliced

HALF = sfx.Sampled(0.5, scores="weight")


def plan_for(
    model: nn.Module, *args: Any, forward: Any = HALF, later: str = "aot_eager", **gradients: Any
) -> tuple[Plan, dict[str, Tensor]]:
    """Compile, run once, plan; gradients by name."""
    rules = [sfx.Rule("*", forward=forward, **gradients)]
    config = sfx.SparseConfig(rules=rules, codegen="aot_eager", keep_output_dense=False)
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    compiled(*args).square().sum().backward()
    for record in getattr(compat.wrapper_of(compiled), "_sparsefx", ()):
        record.config = replace(config, codegen=later)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Planner(compiled).plan(), grads


def used(grad: Tensor, entry: Sliced) -> Tensor:
    """Slices that hold anything, as positions in [groups * depth]."""
    held = torch.unflatten(grad.ne(0), 0, (entry.groups, -1))
    return held.any([d for d in range(1, held.dim()) if d != entry.axis + 1]).flatten().nonzero()


def assert_slices(model: nn.Module, *args: Any, **how: Any) -> Plan:
    """The slices are those that the gradient fills, no more and no less."""
    plan, grads = plan_for(model, *args, **how)
    params = {id(p): name for name, p in model.named_parameters()}
    assert plan.sliced
    for key, entry in plan.sliced.items():
        assert params[key] == entry.name
        found = entry.indices(0)
        assert torch.equal(found, used(grads[entry.name], entry).flatten()), entry.name
    return plan


class Made(nn.Module):
    """A module of a function of its parameters ``w`` and ``b``."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in zip("wvb", shapes, strict=False):
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


ORIENTED = {
    "x @ w": (lambda m, x: x @ m.w, (8, 6), 0),
    "x @ w.T": (lambda m, x: x @ m.w.t(), (6, 8), 1),
    "(w.T @ x.T).T": (lambda m, x: (m.w.t() @ x.t()).t(), (8, 6), 0),
    "(w @ x.T).T": (lambda m, x: (m.w @ x.t()).t(), (6, 8), 1),
    "square": (lambda m, x: x @ m.w, (8, 8), 0),
    "scaled": (lambda m, x: 3 * (x @ (2 * m.w)), (8, 6), 0),
    "cast": (lambda m, x: x.double() @ m.w.double(), (8, 6), 0),
}


@pytest.mark.parametrize("name", ORIENTED)
def test_axis_of_a_product_however_it_is_written(name: str):
    function, shape, axis = ORIENTED[name]
    torch.manual_seed(0)
    plan = assert_slices(Made(function, shape), torch.randn(5, 8))
    (entry,) = plan.sliced.values()
    assert (entry.axis, entry.depth, entry.groups) == (axis, 8, 1)


@pytest.mark.parametrize(("rank", "groups"), [(1, 1), (2, 1), (2, 4), (3, 2)])
def test_convolutions(rank: int, groups: int):
    torch.manual_seed(0)
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank](16, 8, 2, groups=groups, stride=2)
    plan = assert_slices(layer, torch.randn(2, 16, *[5] * rank))
    (entry,) = plan.sliced.values()
    assert (entry.axis, entry.depth, entry.groups) == (1, 16 // groups, groups)


def test_a_weight_that_is_used_twice_and_a_tied_one():
    torch.manual_seed(0)
    twice = Made(lambda m, x: torch.tanh(x @ m.w) @ m.w, (8, 8))
    (entry,) = assert_slices(twice, torch.randn(5, 8)).sliced.values()
    assert [len(level) for level in entry.levels] == [1]
    tied = Made(lambda m, x: torch.tanh(x @ m.w) @ m.w.t(), (8, 8))
    plan, _ = plan_for(tied, torch.randn(5, 8))
    assert plan.whole["w"] == "it is sampled along two axes"


def test_autocast_scores_the_cast_weight():
    torch.manual_seed(0)
    w = torch.ones(8, 4) + torch.linspace(0, 1e-3, 8).unsqueeze(1)  # all 1 in bfloat16
    model = Made(lambda m, x: x @ m.w, (8, 4))
    with torch.no_grad():
        model.w.copy_(w)
    with torch.autocast("cpu", torch.bfloat16):
        plan = assert_slices(model, torch.randn(5, 8))
    (entry,) = plan.sliced.values()
    assert entry.indices(0).tolist() == [0, 1, 2, 3]  # of equals the earlier


def test_ties_and_zero_weights():
    model = Made(lambda m, x: x @ m.w, (8, 6))
    with torch.no_grad():
        model.w.zero_()[5] = 1.0
    plan, grads = plan_for(model, torch.ones(5, 8))
    (entry,) = plan.sliced.values()
    assert entry.indices(0).tolist() == [0, 1, 2, 5]
    assert set(used(grads["w"], entry).flatten().tolist()) <= {0, 1, 2, 5}


def test_a_share_of_the_scores_is_found_again():
    torch.manual_seed(0)
    pattern = sfx.Sampled(mass=0.5, scores="weight")
    model = Made(lambda m, x: x @ m.w, (8, 6))
    plan, grads = plan_for(model, torch.randn(5, 8), forward=pattern)
    (entry,) = plan.sliced.values()
    assert set(used(grads["w"], entry).flatten().tolist()) <= set(entry.indices(0).tolist())


def test_inductor_gets_one_slice_to_spare():
    """It adds up in another order: told by the record, without waiting for it to compile."""
    torch.manual_seed(0)
    plan, grads = plan_for(
        Made(lambda m, x: x @ m.w, (32, 6)), torch.randn(5, 32), later="inductor"
    )
    (entry,) = plan.sliced.values()
    found = set(entry.indices(0).tolist())
    assert len(found) == 17
    assert set(used(grads["w"], entry).flatten().tolist()) < found
    plan, _ = plan_for(Made(lambda m, x: x @ m.w, (2, 6)), torch.randn(6, 2), later="inductor")
    assert plan.whole == {"w": "2 of 2 slices are all of it"}


REASONS = {
    "its indices depend on activations: use scores='weight'": {"forward": sfx.Sampled(0.5)},
    "its indices are drawn at random (rand): use estimator='topk'": {
        "forward": sfx.Sampled(0.5, estimator="systematic", scores="weight")
    },
    "the mean of the other pairs reaches all of it (estimator='topk_mean')": {
        "forward": sfx.Sampled(0.5, estimator="topk_mean", scores="weight")
    },
    "its gradient follows no sampled forward": {"grad_weight": sfx.Dense()},
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason: str):
    model = Made(lambda m, x: x @ m.w, (8, 6))
    plan, _ = plan_for(model, torch.randn(6, 8), **REASONS[reason])
    assert plan.sliced == {}
    assert plan.whole == {"w": reason}


@pytest.mark.parametrize("own", [sfx.Dense(), sfx.Sampled(0.5)], ids=str)
def test_a_dense_or_row_sampled_gradient_beside_a_sampled_one(own: Any):
    torch.manual_seed(0)
    model = Made(lambda m, x: torch.tanh(x @ m.w) @ m.v, (8, 6), (6, 4))
    rules = [sfx.Rule(lambda site: site.shape[2] == 8, forward=HALF)]
    rules += [sfx.Rule("*", forward=HALF, grad_weight=own)]
    config = sfx.SparseConfig(rules=rules, codegen="aot_eager", keep_output_dense=False)
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    compiled(torch.randn(6, 8)).sum().backward()
    plan = Planner(compiled).plan()
    op = "mm" if own == sfx.Dense() else "sampled_mm"
    assert plan.whole == {"v": f"its gradient comes from {op}, not a sampled product"}
    assert [entry.name for entry in plan.sliced.values()] == ["w"]


def test_a_stored_mask_is_part_of_the_scores():
    torch.manual_seed(0)
    model = Made(lambda m, x: x @ torch.where(m.mask, m.w, 0.0), (8, 6))
    model.register_buffer("mask", torch.rand(8, 6) > 0.5)
    (entry,) = assert_slices(model, torch.randn(5, 8)).sliced.values()
    assert set(entry.levels[0][0].cut.names) == {"w", "mask"}


def test_reshaped_and_shared_with_arithmetic():
    model = Made(lambda m, x: x @ m.w.view(8, 6) + (m.w * 0.1).sum(), (6, 8))
    plan, _ = plan_for(model, torch.randn(6, 8))
    assert "its gradient" in plan.whole["w"]
    assert plan.sliced == {}


def test_a_compiled_model_shares_the_code_of_another():
    torch.manual_seed(0)
    first, second = (nn.Sequential(Made(lambda m, x: x @ m.w, (8, 6))) for _ in range(2))
    for model in (first, second):
        plan, _ = plan_for(model[0], torch.randn(5, 8))
        assert list(plan.sliced) == [id(model[0].w)]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at an activation's
def test_graph_breaks_name_inner_modules():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Made(broken, (8, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.parts[0](x).tanh())

    def broken(m: Made, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return (x @ m.w).tanh()

    torch.manual_seed(0)
    plan = assert_slices(Outer(), torch.randn(5, 8))
    assert sorted(entry.name for entry in plan.sliced.values()) == ["parts.0.w", "parts.1.w"]
