"""Interpreted graphs compute what compiled ones do, one layer or all; and no trace is left."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx as sfx
from sparsefx.diagnostics import gradient_error, product_error
from sparsefx.diagnostics.bench import bench
from sparsefx.diagnostics.meter import compare_gradients, interpreted, run_alone
from sparsefx.diagnostics.programs import Observed, Rewritten
from sparsefx.errors import ConfigError, DiagnosticsError, PassError

TOPK, MEAN = sfx.Sampled(0.5), sfx.Sampled(0.4, estimator="topk_mean")
BY_INPUT = sfx.Sampled(0.5, scores="input")
RANDOM = sfx.Sampled(0.5, estimator="bernoulli")


def every(**patterns: Any) -> sfx.SparseConfig:
    return sfx.SparseConfig([sfx.Rule("*", **patterns)], keep_output_dense=False)


def squared(model: Any, batch: Any) -> Tensor:
    return model(batch).square().mean()


class Mixed(nn.Module):
    """Grouped convolution, a layer that is called twice, batched products, a transposed weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, groups=2, stride=2), nn.BatchNorm2d(8)
        self.twice, self.out = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.free = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)  # [batch, 9, 8]
        x = self.twice(self.twice(x).tanh()) @ self.free
        return self.out((x @ x.transpose(1, 2)).tanh() @ x)


@pytest.fixture
def mixed() -> tuple[nn.Module, Tensor]:
    return Mixed(), torch.randn(6, 8, 7, 7)


@pytest.mark.parametrize(
    "patterns",
    [
        {"forward": TOPK},
        {"forward": MEAN},
        {"forward": sfx.NM(1, 4, transposable=True, weight_grad="masked")},
        {"grad_input": MEAN, "grad_weight": BY_INPUT},
    ],
    ids=str,
)
def test_all_layers_replaced_are_the_compiled_model(mixed, patterns: dict[str, Any]):
    """Cuts of every layer, rewritten on their own, against the whole graph's rewriting."""
    config = interpreted(every(**patterns))
    with bench(*mixed, squared, 0) as runs:
        observed = Observed(config)
        exact = runs.run(observed)[1]
        calls = {call: call.decisions for call in observed.calls}
        assert len(calls) == 7
        alone = run_alone(runs, observed, exact, calls, 1).error()
        compiled = runs.run(Rewritten(config))[1]
        whole = compare_gradients(runs, exact, [compiled])
    for name, sums in whole.items():
        assert sums.squared > 1e-6, name
    norm = sum(sums.exact for sums in whole.values()) ** 0.5
    squares = sum(draw.squares for sums in whole.values() for draw in sums.draws)
    assert alone.relative == pytest.approx(squares**0.5 / norm, rel=2e-4)


def test_a_layer_alone_is_a_config_for_this_layer(mixed):
    found = gradient_error(*mixed, every(forward=TOPK), loss=squared, isolated=True)
    assert [row.layer for row in found.isolated][:2] == ["conv", "twice"]
    assert found.loss != found.loss_exact
    for row in found.isolated[1:2]:  # called twice
        one = sfx.SparseConfig([sfx.Rule(row.layer, forward=TOPK)], keep_output_dense=False)
        whole = gradient_error(*mixed, one, loss=squared).total
        assert row.relative == pytest.approx(whole.relative, rel=1e-4)
        assert row.pattern == "sampled 0.5"
    text = str(found)
    assert "all gradients, this layer alone changed" in text
    assert max(map(len, text.splitlines())) <= 120
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_noise_of_a_layer_alone(mixed):
    found = gradient_error(*mixed, every(grad_weight=RANDOM), loss=squared, isolated=True, draws=6)
    assert found.loss == found.loss_exact
    for row in found.isolated:
        assert row.noise > 0
        assert row.bias < 3.5 * row.noise / 6**0.5
    # errors of gradients that don't follow one another add up in squares
    squares = sum(row.relative**2 for row in found.isolated)
    assert found.total.relative**2 == pytest.approx(squares, rel=0.7)


def test_a_layer_that_is_called_twice_has_rows_for_each_call(mixed):
    rows = product_error(*mixed, every(forward=TOPK), loss=squared).rows
    twice = [row for row in rows if row.layer == "twice"]
    assert [row.role for row in twice] == ["forward", "grad_input", "grad_weight"] * 2
    assert twice[0].norm != twice[3].norm


class Broken(Mixed):
    """A graph break amid the forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        torch._dynamo.graph_break()
        return self.out(F.dropout(self.twice(x), 0.2))


# torch itself looks at the .grad of what one graph hands to the next
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graph_breaks_and_other_generators():
    torch.manual_seed(3)
    model, x = Broken(), torch.randn(6, 8, 7, 7)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

    def loss(model: Any, x: Tensor) -> Tensor:
        scale = random.random() + np.random.rand() + torch.rand(()).item()
        return model(x).square().mean() * scale

    found = gradient_error(model, x, every(grad_weight=RANDOM), loss=loss, draws=2)
    assert found["twice.bias"].relative < 1e-5
    assert found["conv.weight"].relative > 0
    rows = product_error(model, x, every(forward=TOPK), loss=loss).rows
    assert {row.layer for row in rows} == {"conv", "twice", "out"}
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_user_s_own_compilations_stay_within_their_limit():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    config = sfx.SparseConfig([sfx.Rule("*", forward=TOPK)], codegen="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for _ in range(2):
            assert gradient_error(model, x, config, loss=squared).total.relative > 0
        compiled = torch.compile(model, backend="sparsefx", options={"config": config})
        compiled(x).sum().backward()
    assert "2 of 5 products sparse" in repr(sfx.explain(compiled))


def test_autocast_and_a_compiled_model():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(16, 32)
    compiled = torch.compile(model, backend="eager")
    rows = {}
    for name, on in (("float32", False), ("bfloat16", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            rows[name] = gradient_error(compiled, x, every(forward=TOPK), loss=squared).total
            exact = gradient_error(compiled, x, every(forward=sfx.Sampled(1.0)), loss=squared).total
            assert (exact.relative, exact.cosine) == (0, 1)
    assert rows["bfloat16"].relative != rows["float32"].relative
    assert rows["bfloat16"].relative == pytest.approx(rows["float32"].relative, rel=0.05)


class Returning(nn.Module):
    def __init__(self, form: str):
        super().__init__()
        self.one, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor, y: Tensor) -> Any:
        loss = (self.one(x) - y).square().mean()
        forms = {"scalar": loss, "dict": {"loss": loss}, "one entry": loss.reshape(1)}
        return forms[self.form]


@pytest.mark.parametrize("form", ["scalar", "dict", "one entry"])
def test_forms_of_batches_and_losses(form: str):
    x, y, model = torch.randn(6, 4), torch.randn(6, 4), Returning(form)
    config = every(grad_weight=TOPK)
    by_place, by_name = (gradient_error(model, b, config) for b in ([x, y], {"y": y, "x": x}))
    assert by_place == by_name
    assert by_place["one.weight"].relative > 0


def test_what_it_refuses():
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    with pytest.raises(DiagnosticsError, match="the loss never ran the model that it was given"):
        gradient_error(model, x, every(forward=TOPK), loss=lambda _, b: model(b).sum())
    for call in (gradient_error, product_error):
        with pytest.raises(DiagnosticsError, match=r"seed=-1 must be an int, at least 0"):
            call(model, x, every(forward=TOPK), loss=squared, seed=-1)
    with pytest.raises(ConfigError, match="'nonsense' is not a preset"):
        gradient_error(model, x, "nonsense", loss=squared)

    def fails(site: Any) -> bool:
        raise ZeroDivisionError("no")

    rules = [sfx.Rule(fails, forward=TOPK)]
    strict = sfx.SparseConfig(rules, keep_output_dense=False, strict=True)
    with pytest.raises(PassError, match="ZeroDivisionError"):
        gradient_error(model, x, strict, loss=squared)
    loose = sfx.SparseConfig(rules, keep_output_dense=False)
    with pytest.warns(sfx.SparsefxWarning, match="left products dense"):
        assert gradient_error(model, x, loose, loss=squared, isolated=True).isolated == ()


def test_a_user_s_pass_is_measured():
    def halve(gm: Any) -> Any:
        from sparsefx.rewriting import PassResult, finish, plan_of, wrap

        result = PassResult(gm)
        for node in list(gm.graph.nodes):
            plan = plan_of(node)
            if plan is not None and plan.site.role == "grad_weight":
                wrap(node, lambda add, n=node: add(torch.ops.aten.mul.Tensor, n, 0.5))
                result.modified = True
        finish(gm)
        return result

    config = sfx.SparseConfig([], passes=[halve])
    found = gradient_error(nn.Linear(4, 4), torch.randn(3, 4), config, loss=squared, draws=2)
    assert found["weight"].relative == pytest.approx(0.5)
    assert found["weight"].noise == pytest.approx(0, abs=1e-12)
    assert found["bias"].relative == 0
