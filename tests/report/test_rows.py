"""The rows: what every product of a small model becomes under each preset, and why."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsefx as sfx
from sparsefx import NM, Dense, Rule, Sampled, SparseConfig
from sparsefx.pipeline import Outcome
from sparsefx.report.rows import rows_of
from sparsefx.testing import capture

OUTPUT = "feeds the model's output (keep_output_dense=True)"
STRAIGHT = "straight-through: reaches every weight (weight_grad='dense')"
DERIVED = "the derivative of a dense forward"
TRANSPOSABLE = NM(2, 4, transposable=True)
S = Sampled(0.3)
U = Sampled(0.3, estimator="systematic")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))


def table(report: sfx.report.Report) -> list[tuple]:
    return [(r.layer, r.role, r.decision, r.reason) for r in report.sites]


@pytest.mark.parametrize(
    ("preset", "first", "second"),
    [
        ("2:4", [(NM(2, 4), ""), (None, STRAIGHT)], [(NM(2, 4), "")] * 2 + [(None, STRAIGHT)]),
        (
            "all-three",
            [(TRANSPOSABLE, ""), (U, "")],
            [(TRANSPOSABLE, ""), (TRANSPOSABLE, ""), (U, "")],
        ),
        ("sampled-0.3", [(S, "")] * 2, [(S, "")] * 3),
        (
            "sampled-backward-0.3",
            [(None, "the rule says Dense()"), (U, "")],
            [(None, "the rule says Dense()"), (U, ""), (U, "")],
        ),
        (
            "sampled-memory-0.3",
            [(None, "the rule says Dense()"), (replace(U, scores="input"), "")],
            [
                (None, "the rule says Dense()"),
                (None, "the derivative of a dense forward"),
                (replace(U, scores="input"), ""),
            ],
        ),
        (
            "black-box-0.3",
            [(S, ""), (None, "the rule says Dense()")],
            [(S, ""), (None, "the rule says Dense()"), (None, "the rule says Dense()")],
        ),
    ],
)
def test_rows_by_preset(preset, first, second):
    report = sfx.explain(mlp(), config=preset)(torch.randn(8, 16))
    roles = ("forward", "grad_input", "grad_weight")
    assert table(report) == [
        *(("0", r, *row) for r, row in zip(roles[::2], first, strict=True)),  # x needs no gradient
        *(("2", r, *row) for r, row in zip(roles, second, strict=True)),
        *(("4", role, None, OUTPUT) for role in roles),
    ]


def test_every_field():
    report = sfx.explain(mlp(), config="all-three")(torch.randn(8, 16))
    by_role = {row.role: row for row in report.sites if row.layer == "2"}
    row = by_role["grad_input"]
    assert (row.shape, row.batch, row.dtype, row.device) == ((8, 32, 8), 1, "float32", "cpu")
    assert (row.op, row.sparse_op, row.lowering) == ("mm", "masked_mm", "masked dense")
    assert (row.flops_dense, row.flops_sparse, row.flops_executed) == (4096, 2048, 4096)
    assert (row.derived, row.graph, row.weight) == (True, 0, "2.weight")
    assert by_role["forward"].shape == (8, 8, 32)
    assert by_role["grad_weight"].shape == (32, 8, 8)
    assert by_role["grad_weight"].lowering == "gathered GEMM"
    assert by_role["grad_weight"].flops_sparse == 4096 * 2 // 8  # k = int(0.3 * 8)
    assert not by_role["grad_weight"].derived


def own_line(x, w):
    return F.relu(x @ w) @ w  # the line that the source names


def test_source_names_the_line():
    (row,) = [
        r
        for r in sfx.explain(own_line)(
            torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
        ).sites
        if r.role == "forward" and r.reason == OUTPUT
    ]
    line = own_line.__code__.co_firstlineno + 1
    assert row.source == f"test_rows.py:{line}"


class Awkward(nn.Module):
    """One layer for each reason to stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.odd = nn.Conv2d(8, 6, 1)
        self.plain = nn.Linear(6, 8)
        self.named = nn.Linear(8, 8)
        self.unruled = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.odd(self.up(self.depthwise(x))).mean((2, 3))
        h = self.unruled(self.named(self.plain(h)).relu())
        return self.head((h @ h.t()) @ h)


def test_why_a_layer_is_dense():
    rules = [
        Rule("named", forward=Dense(), grad_weight=Sampled(0.5)),
        Rule("unruled*", forward=Sampled(1.0)),
        *(Rule(n, forward=NM(2, 4)) for n in ("plain", "odd", "depthwise", "up", "head", "mm")),
    ]
    report = sfx.explain(Awkward(), config=SparseConfig(rules=rules))(torch.randn(2, 8, 5, 5))
    assert all(bool(r.reason) == (r.decision is None) for r in report.sites)
    assert all((r.lowering == "dense") == (r.decision is None) for r in report.sites)
    forwards = {r.layer: r.reason for r in report.sites if r.role == "forward"}
    assert forwards == {
        "depthwise": "depthwise convolution: one input channel per group",
        "up": "transposed convolution",
        "odd": "",
        "plain": "K=6 is not a multiple of m=4",
        "named": "the rule says Dense()",
        "unruled": "k = K = 8: exact",
        "head": OUTPUT,
        "mm": "both operands are activations: N:M needs a weight",
        "mm_1": "no rule matches",
    }
    assert report.why("named") == [
        "named forward: dense: the rule says Dense()",
        f"named grad_input: dense: {DERIVED}",
        "named grad_weight: sampled 0.5",
    ]


def test_conv_rows():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    cfg = SparseConfig(rules=[Rule("0", forward=Sampled(0.5)), Rule("2", forward=NM(2, 4))],
                       keep_output_dense=False)  # fmt: skip
    sites = sfx.explain(model, config=cfg)(torch.randn(2, 8, 6, 6, requires_grad=True)).sites
    assert [(r.layer, r.role, r.shape, r.lowering) for r in sites] == [
        ("0", "forward", (72, 8, 72), "gathered conv"),
        ("0", "grad_input", (72, 72, 8), "gathered conv"),
        ("0", "grad_weight", (72, 8, 72), "gathered conv"),
        ("2", "forward", (32, 4, 72), "masked dense"),
        ("2", "grad_input", (32, 72, 4), "masked dense"),
        ("2", "grad_weight", (72, 4, 32), "dense"),
    ]
    assert sites[0].flops_sparse * 2 == sites[0].flops_dense == 2 * 72 * 8 * 72


def test_a_layer_that_is_called_twice_has_its_rows_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.fc(x).relu()).relu()

    sites = sfx.explain(Twice(), config="2:4")(torch.randn(4, 8)).sites
    assert [(r.layer, r.role) for r in sites] == [
        ("fc", "forward"), ("fc", "grad_weight"),
        ("fc", "forward"), ("fc", "grad_input"), ("fc", "grad_weight"),
    ]  # fmt: skip


def drop_sparse_products(gm):
    """A user's pass that undoes every masked product."""
    from sparsefx import ops
    from sparsefx.rewriting import PassResult, emit

    for node in list(gm.graph.nodes):
        if node.target is ops.nm_mm:
            x, w, bias, *_ = node.args
            node.replace_all_uses_with(emit(node, torch.ops.aten.addmm.default, bias, x, w))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return PassResult(gm, True)


def test_a_product_that_a_later_pass_took_out_says_so():
    cfg = SparseConfig(rules=[Rule("*", forward=NM(2, 4))], passes=[drop_sparse_products])
    with torch.no_grad():
        report = sfx.explain(mlp(), config=cfg)(torch.randn(8, 16))
    assert [(r.decision, r.lowering, r.flops_sparse) for r in report.sites[:1]] == [
        (None, "dense", 2 * 8 * 16 * 32)
    ]
    assert report.sites[0].reason == (
        "planned as 2:4, but a later pass took the sparse product out"
    )


def test_a_product_that_was_never_decided_on_says_so():
    joint = capture(mlp(), torch.randn(8, 16))
    sfx.passes.canonicalize(joint)
    sfx.passes.find_sites(joint)
    (plan, *_) = sfx.testing.plans(joint)
    plan = replace(plan, site=replace(plan.site, role="other", group=-1))
    (row,) = rows_of(Outcome(plans=[plan]), 0)
    assert (row.decision, row.role) == (None, "other")
    assert row.reason == "its layer was not decided on: the forward product is not in this graph"


def test_json():
    report = sfx.explain(mlp(), config="all-three")(torch.randn(8, 16))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["versions"] == {"sparsefx": sfx.__version__, "torch": torch.__version__}
    assert SparseConfig.from_dict(data["config"]) == sfx.preset("all-three")
    assert (data["graphs"], data["failures"]) == (1, [])
    assert [s["layer"] for s in data["sites"]] == [r.layer for r in report.sites]
    row = data["sites"][2]
    assert row["decision"] == {
        "kind": "NM", "text": "2:4 transposable", "n": 2, "m": 4, "transposable": True,
        "weight_grad": "dense", "decay": 0.0,
    }  # fmt: skip
    assert (row["shape"], row["batch"], row["symbols"]) == ([8, 8, 32], 1, {})
    assert data["totals"]["flops"]["all"]["dense"] == sum(r.flops_dense for r in report.sites)


def test_json_of_a_config_that_is_no_plain_data():
    cfg = SparseConfig(rules=[Rule(lambda site: True, forward=NM(2, 4))])
    data = sfx.explain(mlp(), config=cfg)(torch.randn(8, 16)).to_dict()
    assert data["config"] == repr(cfg)
    json.dumps(data)
