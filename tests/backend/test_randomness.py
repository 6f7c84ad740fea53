"""Drawn once, in the forward, from torch's generator: gradients belong to what was computed.

Columns of x are constant and the weight is the identity, so y[:, i] = a_i * scale_i where pair i
was drawn, else 0. The derivative then is dL/dx[:, i] = scale_i: what the forward drew can be read
off both, and they differ as soon as anything is drawn again.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsefx as sfx
from sparsefx.passes import drawing

WIDTH, ROWS = 64, 6
ESTIMATORS = ["systematic", "bernoulli", "with_replacement"]
BUDGET = "activation_memory_budget"


class Reads(nn.Module):
    """A product whose operands show what it drew."""

    def __init__(self, kind="linear", inside=False):
        super().__init__()
        self.kind, self.inside = kind, inside
        eye = torch.eye(WIDTH)
        self.weight = nn.Parameter(eye[:, :, None, None].clone() if kind == "conv" else eye)

    def product(self, x):
        x = x.sin().asin()  # something to recompute
        if self.kind == "linear":
            return F.linear(x, self.weight)
        if self.kind == "conv":
            return F.conv2d(x, self.weight)
        return x @ self.weight.expand(len(x), -1, -1)

    def forward(self, x):
        if self.inside:
            return checkpoint(self.product, x, use_reentrant=False)
        return self.product(x)


def levels(kind="linear"):
    """X whose column, or channel, i is constant, and what it is."""
    a = torch.linspace(0.5, 1, WIDTH)
    shapes = {"linear": (ROWS, WIDTH), "bmm": (2, ROWS, WIDTH), "conv": (2, WIDTH, 2, 3)}
    a = a.view(-1, 1, 1) if kind == "conv" else a
    return a.expand(shapes[kind]).clone().requires_grad_(), a


def compiled(model, estimator="bernoulli", codegen="aot_eager", dynamic=None, **more):
    torch._dynamo.reset()
    rule = sfx.Rule("*", forward=sfx.Sampled(0.3, estimator=estimator, **more))
    config = sfx.SparseConfig([rule], keep_output_dense=False, strict=True, codegen=codegen)
    return torch.compile(
        model, backend="sparsefx", options={"config": config}, fullgraph=True, dynamic=dynamic
    )


def agree(run, kind="linear", tolerance=1e-5):
    """Whether gradients are the derivative of what was computed; y as well."""
    x, a = levels(kind)
    y = run(x)
    y.sum().backward()
    assert (y == 0).any(), "nothing was sampled"
    assert (y != 0).any()
    y = y.detach().float()
    return torch.allclose(y, x.grad * a, rtol=tolerance, atol=tolerance), y


@contextlib.contextmanager
def budget(share):
    with torch._functorch.config.patch({BUDGET: share}):
        yield


# --- forward and backward agree


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["linear", "bmm", "conv"])
def test_gradients_are_of_what_was_drawn(kind, estimator):
    run = compiled(Reads(kind), estimator)
    drawn = []
    for _ in range(5):
        same, y = agree(run, kind)
        assert same
        drawn.append(y)
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])  # each call draws anew


@pytest.mark.parametrize(
    ("estimator", "share"),
    [*((estimator, 0.0) for estimator in ESTIMATORS), ("bernoulli", 0.3), ("bernoulli", 0.5),
     ("systematic", 1.0)],
)  # fmt: skip
def test_under_an_activation_memory_budget(estimator, share):
    with budget(share):
        run = compiled(Reads(), estimator)
        assert all(agree(run)[0] for _ in range(4))


def drawn_again(monkeypatch):
    """Take away the mark that keeps a draw from being repeated."""
    monkeypatch.setattr(drawing, "_kept", lambda node: node)


def test_without_the_mark_a_budget_of_nothing_draws_again(monkeypatch):
    drawn_again(monkeypatch)
    with budget(0.0):
        run = compiled(Reads())
        assert not all(agree(run)[0] for _ in range(4))


def test_in_a_checkpointed_region():
    for estimator in ESTIMATORS:
        run = compiled(Reads(inside=True), estimator)
        assert all(agree(run)[0] for _ in range(4))


def test_a_policy_that_saves_everything_at_a_budget_of_nothing():
    """It marks what returns several tensors as well, which no partitioner can save."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def contexts():
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)

    class Saved(Reads):
        def forward(self, x):
            return checkpoint(self.product, x, use_reentrant=False, context_fn=contexts)

    with budget(0.0):
        run = compiled(Saved())
        assert all(agree(run)[0] for _ in range(2))


def test_checkpointed_from_outside():
    run = compiled(Reads())
    assert all(agree(lambda x: checkpoint(run, x, use_reentrant=False))[0] for _ in range(4))


def test_accumulated_gradients_each_have_their_draw():
    run = compiled(Reads())
    (x, a), (z, _) = levels(), levels()
    first, second = run(x), run(z)
    assert not torch.equal(first, second)
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(first.detach(), x.grad * a)
    torch.testing.assert_close(second.detach(), z.grad * a)


def test_two_backwards_of_one_forward_agree():
    for pattern in ({}, {"scores": "estimated"}):
        run = compiled(Reads(), **pattern)
        x, _ = levels()
        y = run(x).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_beside_dropout():
    class Dropped(Reads):
        def forward(self, x):
            return F.dropout(self.product(x), 0.5)

    run = compiled(Dropped())
    for _ in range(4):
        x, a = levels()
        y = run(x)
        gx = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(y.detach(), gx * a)


def test_autocast():
    run = compiled(Reads(), "systematic")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(4):
            assert agree(run, tolerance=2e-2)[0]


def test_sizes_that_change():
    run = compiled(Reads(), dynamic=True)
    for rows in (3, 5, 8):
        a = torch.linspace(0.5, 1, WIDTH)
        x = a.expand(rows, WIDTH).clone().requires_grad_()
        y = run(x)
        torch.testing.assert_close(y.detach(), torch.autograd.grad(y.sum(), x)[0] * a)


def test_inductor_draws_once_as_well():
    with budget(0.0):
        run = compiled(Reads(), codegen="inductor")
        assert all(agree(run)[0] for _ in range(4))
    torch.manual_seed(3)
    first = agree(run)[1]
    torch.manual_seed(3)
    assert torch.equal(first, agree(run)[1])


# --- gradients that are sampled on their own


def layer(rule, kind="linear", codegen="aot_eager"):
    torch._dynamo.reset()
    model = {"linear": lambda: nn.Linear(16, 24), "conv": lambda: nn.Conv1d(6, 24, 3)}[kind]()
    config = sfx.SparseConfig([rule], keep_output_dense=False, strict=True, codegen=codegen)
    run = torch.compile(model, backend="sparsefx", options={"config": config}, fullgraph=True)
    shape = (40, 16) if kind == "linear" else (40, 6, 5)
    return model, run, torch.randn(shape, requires_grad=True)


def gradients(model, y, x, **more):
    return torch.autograd.grad(y.square().sum(), (x, model.weight), **more)


OWN = [
    pytest.param({role: sfx.Sampled(0.3, estimator=estimator, scores=scores)},
                 id=f"{role} {estimator} {scores}")
    for role, estimator, scores in (
        ("grad_input", "systematic", "product"), ("grad_input", "bernoulli", "input"),
        ("grad_weight", "with_replacement", "product"), ("grad_weight", "systematic", "input"),
        ("grad_weight", "bernoulli", "input"),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rule"),
    [*(pytest.param("linear", *p.values, id=f"linear {p.id}") for p in OWN),
     *(pytest.param("conv", *p.values, id=f"conv {p.id}") for p in OWN[2:4])],
)  # fmt: skip
def test_own_gradients_are_drawn_in_the_forward(kind, rule):
    """Nothing in the backward reads the generator: it may be anywhere by then."""
    torch.manual_seed(0)
    model, run, x = layer(sfx.Rule("*", **rule), kind)
    y = run(x)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = gradients(model, y, x, retain_graph=True)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    for one, other in zip(first, gradients(model, y, x), strict=True):
        assert torch.equal(one, other)
    assert differs(first, [gradients(model, run(x), x) for _ in range(4)])


def differs(first, others):
    """Whether some of the others are not the same: two draws may be, by chance."""
    return any(
        not torch.equal(one, other)
        for again in others
        for one, other in zip(first, again, strict=True)
    )


@pytest.mark.parametrize("rule", OWN[1:4])
def test_a_seed_gives_the_same_draws(rule):
    model, run, x = layer(sfx.Rule("*", **rule))

    def one(seed):
        torch.manual_seed(seed)
        return gradients(model, run(x), x)

    first = one(1)
    assert not differs(first, [one(1)])
    assert differs(first, [one(seed) for seed in (2, 3, 4, 5)])


# --- static shapes, no recompiles, exact evaluation


KINDS = [("topk", "estimated"), ("topk_mean", "product"), ("systematic", "input"),
         ("bernoulli", "uniform"), ("with_replacement", "weight")]  # fmt: skip


@pytest.mark.parametrize(("estimator", "scores"), KINDS)
def test_one_compilation_whatever_is_drawn(estimator, scores):
    pattern = sfx.Sampled(0.3, estimator=estimator, scores=scores)
    model, run, x = layer(sfx.Rule("*", forward=pattern, grad_input=pattern, grad_weight=pattern))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            x = torch.randn(x.shape, requires_grad=True)
            gradients(model, run(x), x)
    [report] = [sfx.explain(run)]
    for gm in (*report.forward, *report.backward):
        code = gm.code
        assert "nonzero" not in code
        assert "_local_scalar_dense" not in code
        values = [node.meta.get("val") for node in gm.graph.nodes]
        sizes = [s for v in values if isinstance(v, torch.Tensor) for s in v.shape]
        assert not any(isinstance(s, torch.SymInt) for s in sizes)


def test_evaluation_is_exact_unless_asked():
    x, _ = levels()
    with torch.no_grad():
        assert torch.equal(compiled(Reads())(x), Reads()(x))
        run = compiled(Reads(), inference=True)
        first, second = run(x), run(x)
    assert (first == 0).any()
    assert not torch.equal(first, second)
