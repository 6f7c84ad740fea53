"""product_error by hand; tune_ratio against one ratio for all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsefx as sfx
from sparsefx.diagnostics import gradient_error, product_error, tune_ratio
from sparsefx.errors import ConfigError, DiagnosticsError


def every(**patterns):
    return sfx.SparseConfig([sfx.Rule("*", **patterns)], keep_output_dense=False)


class Shapes(nn.Module):
    """A grouped convolution, two linears and a batched product."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 12, 3, groups=2)
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 16)

    def forward(self, x):
        x = self.conv(x).relu().transpose(1, 2)  # [batch, positions, 12]
        x = self.two(self.one(x).tanh())
        return x @ x.transpose(1, 2)


def squared(model, batch):
    return model(batch).square().mean()


@pytest.fixture(scope="module")
def shapes():
    torch.manual_seed(0)
    return Shapes(), torch.randn(6, 8, 7)


# --- products


@pytest.mark.parametrize("estimator", ["topk_mean", "systematic"])
def test_products_are_what_the_compiled_model_computes(shapes, estimator):
    """One layer sampled at a time: its gradient's error is the product's own."""
    model, x = shapes
    pattern = sfx.Sampled(0.4, estimator=estimator)
    found = product_error(model, x, every(grad_weight=pattern), loss=squared, draws=16)
    rows = {row.layer: row for row in found.rows}
    assert {"conv", "one", "two"} <= set(rows)
    for layer in ("conv", "two"):
        config = sfx.SparseConfig([sfx.Rule(layer, grad_weight=pattern)])
        whole = gradient_error(model, x, config, loss=squared, draws=16)[f"{layer}.weight"]
        exact = 1e-5 if estimator != "systematic" else 0.35  # other draws
        assert rows[layer].relative == pytest.approx(whole.relative, rel=exact)
        assert rows[layer].norm == pytest.approx(whole.norm, rel=1e-5)


@pytest.mark.parametrize("estimator", ["topk", "topk_mean"])
def test_derived_gradients_of_products(estimator):
    torch.manual_seed(1)
    model, x = nn.Linear(12, 9, bias=False).double(), torch.randn(5, 12, dtype=torch.float64)
    pattern = sfx.Sampled(0.5, estimator=estimator)
    x.requires_grad_()
    found = product_error(model, x, every(forward=pattern), loss=squared)
    forward, *_ = found.rows
    grad_weight = next(row for row in found.rows if row.role == "grad_weight")
    w, a = model.weight.detach().t(), x.detach()
    left, right = (a, w) if estimator == "topk" else (a - a.mean(1, True), w - w.mean(0))
    kept = (left.norm(dim=0) * right.norm(dim=1)).topk(6).indices
    other = [i for i in range(12) if i not in kept.tolist()]
    grad = 2 * (a @ w) / (5 * 9)  # exact operands, so the exact dL/dy
    y, gw = a[:, kept] @ w[kept], torch.zeros_like(w)
    gw[kept] = a[:, kept].t() @ grad
    if estimator == "topk_mean":
        y = y + torch.outer(a[:, other].sum(1), w[other].mean(0))
        gw[other] = (a[:, other].t() @ grad).mean(0)
    assert forward.relative == pytest.approx(float((y - a @ w).norm() / (a @ w).norm()))
    exact = a.t() @ grad
    assert grad_weight.relative == pytest.approx(float((gw - exact).norm() / exact.norm()))
    assert grad_weight.derived
    assert "(fwd)" in str(found)
    assert forward.flops_dense == 2 * 5 * 9 * 12


@pytest.mark.parametrize("estimator", ["topk_mean", "bernoulli", "with_replacement"])
def test_every_estimator_runs_on_every_product(shapes, estimator):
    model, x = shapes
    pattern = sfx.Sampled(0.5, estimator=estimator)
    for config in (every(forward=pattern), every(grad_input=pattern, grad_weight=pattern)):
        rows = product_error(model, x, config, loss=squared, draws=2).rows
        assert len(rows) >= 7
        assert all(0 < row.relative < 20 for row in rows)
    full = product_error(model, x, every(forward=sfx.Sampled(mass=0.5)), loss=squared)
    assert full.to_dict()["rows"][0]["pattern"] == "sampled mass 0.5"


# --- a whole model


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    return model, (torch.randn(96, 16) + 0.5, torch.randint(0, 10, (96,)))


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_the_budget_is_met_and_errors_are_smaller_than_of_one_ratio(mlp):
    model, batch = mlp
    tuned = tune_ratio(model, batch, flops=0.5, loss=entropy)
    assert tuned.flops <= 0.5 * tuned.flops_dense
    report = sfx.explain(model, config=tuned.config)(batch[0])
    rows = {(s.layer, s.role): s for s in report.sites if s.role != "forward"}
    for row in tuned.rows:
        site = rows[row.layer, row.role]
        assert site.flops_sparse == row.flops
        assert site.flops_dense == row.flops_dense
    one = sfx.Sampled(0.5, estimator="systematic")
    uniform = sfx.SparseConfig([sfx.Rule("*", grad_input=one, grad_weight=one)])
    errors = [
        gradient_error(model, batch, config, loss=entropy, draws=12).total.relative
        for config in (tuned.config, uniform)
    ]
    assert errors[0] < 0.9 * errors[1]
    assert "ratios under a budget of FLOPs" in str(tuned)
    assert sfx.SparseConfig.from_dict(tuned.to_dict()["config"]) == tuned.config


def test_a_tuned_forward_takes_its_gradients_along(mlp):
    model, batch = mlp
    tuned = tune_ratio(
        model, batch, flops=0.6, roles=["forward"], estimator="topk_mean", loss=entropy
    )
    assert {row.role for row in tuned.rows} == {"forward"}
    report = sfx.explain(model, config=tuned.config)(batch[0])
    for row in tuned.rows:
        sites = [s for s in report.sites if s.layer == row.layer]
        assert sum(s.flops_dense for s in sites) == row.flops_dense
        assert sum(s.flops_sparse for s in sites) == row.flops


def test_names_are_matched_exactly_and_own_rules_stay(mlp):
    _, batch = mlp
    model = nn.ModuleDict({"a[0]": nn.Linear(16, 32), "a0": nn.Linear(32, 10)})

    def loss(run, batch):
        return F.cross_entropy(model["a0"](model["a[0]"](batch[0]).relu()), batch[1])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["a0"](self.parts["a[0]"](x).relu())

    net = Net()
    base = sfx.SparseConfig([sfx.Rule("*", forward=sfx.NM(2, 4))], keep_output_dense=False)
    tuned = tune_ratio(net, batch, base, loss=entropy, flops=0.7)
    assert tuned.config.rules[-1] == base.rules[0]
    matches = [rule.match for rule in tuned.config.rules[:-1]]
    assert any("[[]0" in match for match in matches)


def test_an_impossible_budget_says_what_is_possible(mlp):
    model, batch = mlp
    with pytest.raises(
        DiagnosticsError, match=r"flops=0.01 is below (0\.\d+), what the smallest"
    ) as e:
        tune_ratio(model, batch, flops=0.01, loss=entropy)
    least = float(str(e.value).split("below ")[1].split(",")[0])
    assert tune_ratio(model, batch, flops=least + 1e-3, loss=entropy).flops > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"flops": 0}, DiagnosticsError, r"flops=0 must be a share in \(0, 1\]"),
        ({"flops": "half"}, DiagnosticsError, r"flops='half' must be a share"),
        ({"roles": ["grad"]}, DiagnosticsError, "roles: 'grad' is not one of forward, grad_input"),
        ({"roles": []}, DiagnosticsError, "give at least one of each"),
        ({"ratios": []}, DiagnosticsError, "give at least one of each"),
        ({"ratios": [1.5]}, ConfigError, r"ratio=1.5 must be in \(0, 1\]"),
        ({"estimator": "best"}, ConfigError, "estimator='best' is not one of"),
        ({"min_k": 4096}, DiagnosticsError, "no grad_input or grad_weight of Sequential can be"),
    ],
)
def test_what_it_refuses(mlp, arguments, error, message):
    model, batch = mlp
    with pytest.raises(error, match=message):
        tune_ratio(model, batch, loss=entropy, **arguments)


def test_draws_of_products_are_counted(shapes):
    with pytest.raises(DiagnosticsError, match="draws=0 must be an int"):
        product_error(*shapes, every(), draws=0)


def test_what_is_foretold_is_what_a_layer_alone_does(mlp):
    model, batch = mlp
    config = every(grad_weight=sfx.Sampled(0.5))
    errors = gradient_error(model, batch, config, loss=entropy, isolated=True)
    alone = {row.layer: row for row in errors.isolated}
    products = {r.layer: r for r in product_error(model, batch, config, loss=entropy).rows}
    for objective in ("gradients", "scaled", "products"):
        tuned = tune_ratio(
            model, batch, flops=0.5, estimator="topk", roles=["grad_weight"],
            ratios=[0.25, 0.5, 1], loss=entropy, objective=objective,
        )  # fmt: skip
        assert [row.layer for row in tuned.rows] == ["0", "2", "4"]
        for row in tuned.rows:
            _, flops, error = row.curve[1]
            assert flops == row.flops_dense // 2
            expected = products[row.layer] if objective == "products" else alone[row.layer]
            assert error == pytest.approx(expected.relative, rel=1e-4)
            assert row.curve[0][2] > error
            assert row.curve[2] == (1.0, row.flops_dense, 0.0)
    whole = gradient_error(model, batch, tuned.config, loss=entropy).total
    assert tuned.error == pytest.approx(whole.relative, rel=1e-4)
    uniform = sfx.SparseConfig([sfx.Rule("*", grad_weight=sfx.Sampled(tuned.uniform_ratio))])
    whole = gradient_error(model, batch, uniform, loss=entropy).total
    assert tuned.uniform_error == pytest.approx(whole.relative, rel=1e-4)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.out(self.two(self.one(self.one(x).tanh())).tanh())


def test_a_template_keeps_all_but_its_ratios():
    model, x = Twice(), torch.randn(40, 12)
    schedule = sfx.RatioSchedule(0.2, 0.8, steps=10)
    base = sfx.SparseConfig(
        [
            sfx.Rule("one", forward=sfx.Sampled(0.9, 3), grad_input=sfx.Dense()),
            sfx.Rule("t*", forward=sfx.NM(2, 4), grad_weight=sfx.Sampled(schedule, scores="input")),
            sfx.Rule("out", forward=sfx.Sampled(0.1)),
        ],
        verify=True,
    )
    tuned = tune_ratio(model, x, base, flops=0.6, loss=squared)
    assert [(row.layer, row.role) for row in tuned.rows] == [
        ("one", "forward"), ("two", "grad_weight"),
    ]  # fmt: skip
    one, two = tuned.rows
    assert one.flops_dense == 2 * 2 * 2 * 40 * 12 * 12  # two calls; grad_input is not tuned
    rules = tuned.config.rules
    assert rules[0] == sfx.Rule("one", forward=sfx.Sampled(one.ratio, 3), grad_input=sfx.Dense())
    pattern = sfx.Sampled(two.ratio, scores="input")
    assert rules[1] == sfx.Rule("two", forward=sfx.NM(2, 4), grad_weight=pattern)
    assert rules[2] == sfx.Rule("out", forward=sfx.Sampled(1.0))  # stays dense as the output
    assert rules[3:] == base.rules
    assert tuned.config.verify
    report = sfx.explain(model, config=tuned.config)(x)
    found = [
        s
        for s in report.sites
        if (s.layer, s.role) in {("one", "forward"), ("one", "grad_weight"), ("two", "grad_weight")}
    ]
    assert sum(site.flops_sparse for site in found) == tuned.flops <= 0.6 * tuned.flops_dense
    assert sum(site.flops_dense for site in found) == tuned.flops_dense


def test_what_a_template_may_not_hold():
    model, x = Twice(), torch.randn(8, 12)
    mass = sfx.SparseConfig([sfx.Rule("*", forward=sfx.Sampled(mass=0.5))])
    with pytest.raises(DiagnosticsError, match="takes as many pairs as hold a mass: give a ratio"):
        tune_ratio(model, x, mass, loss=squared)
    seen = []

    def first(site):
        seen.append(site.group)
        return site.group == 0

    rules = [sfx.Rule(first, forward=sfx.Sampled(0.5)), sfx.Rule("*", forward=sfx.Sampled(0.4))]
    with pytest.raises(DiagnosticsError, match="calls of layer 'one' match different rules"):
        tune_ratio(model, x, sfx.SparseConfig(rules), loss=squared)
    dense = sfx.SparseConfig([sfx.Rule("out", forward=sfx.Sampled(0.5))])
    with pytest.raises(
        DiagnosticsError, match="can be sampled: out forward: feeds the model's out"
    ):
        tune_ratio(model, x, dense, loss=squared)
    with pytest.raises(DiagnosticsError, match="objective='best' is not one of gradients, scaled"):
        tune_ratio(model, x, loss=squared, objective="best")
