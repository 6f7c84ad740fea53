"""explain: what it takes, what it leaves as it was, compiled models, and its errors."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsefx as sfx
from sparsefx import NM, Rule, Sampled, SparseConfig
from sparsefx.compat import wrapper_of

CFG = SparseConfig(rules=[Rule("*", forward=NM(2, 4), grad_weight=Sampled(0.5))],
                   keep_output_dense=False, codegen="aot_eager")  # fmt: skip


def compile_with(model, cfg=CFG, **options):
    return torch.compile(model, backend="sparsefx", options={"config": cfg}, **options)


class Net(nn.Module):
    """Buffers and randomness, a function's product, a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x, *, scale=1.0):
        h = F.dropout(self.norm(self.fc1(x)).relu(), 0.5, self.training)
        return self.fc2(h) * scale


def decisions(report):
    return [(r.layer, r.role, str(r.decision)) for r in report.sites]


def test_buffers_seeds_and_gradients_stay_as_they_were():
    model, x = Net(), torch.randn(6, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seed = torch.get_rng_state()
    report = sfx.explain(model, config=CFG)(x, scale=2.0)
    assert len(report.sites) == 5
    assert torch.equal(seed, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "config", [CFG, None, "2:4-transposable", {"codegen": "aot_eager"}], ids=str
)
def test_config_as_for_the_backend(config):
    report = sfx.explain(Net(), config=config)(torch.randn(4, 8))
    assert report.config == sfx.config.as_config(config)
    assert report.sites[0].decision == (NM(2, 4, transposable=config is not CFG))


def test_bad_config_is_refused_before_the_model_runs():
    with pytest.raises(sfx.ConfigError, match="'2:5' is not a preset"):
        sfx.explain(Net(), config="2:5")


def product(x, w):
    return (x @ w).relu() @ w


def test_a_function():
    x, w = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)
    cfg = SparseConfig(rules=[Rule("*", forward=Sampled(0.5))], keep_output_dense=False)
    report = sfx.explain(product, config=cfg)(x, w)
    assert {str(r.decision) for r in report.sites} == {"sampled 0.5"}
    assert [r.role for r in report.sites].count("forward") == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    cfg = SparseConfig(rules=[Rule("fc1", forward=NM(2, 4)), Rule("fc2", forward=Sampled(0.5))],
                       keep_output_dense=False)  # fmt: skip
    model, x = Net().eval(), torch.randn(4, 8)
    with mode():
        report = sfx.explain(model, config=cfg)(x)
        text = str(report)
    assert [(r.layer, r.role, r.reason) for r in report.sites] == [
        ("fc1", "forward", ""),
        ("fc2", "forward", "inference graph: exact unless Sampled(inference=True)"),
    ]
    assert str(report) == text  # graphs can be traced again outside the mode


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = sfx.explain(Net(), config=CFG)(torch.randn(4, 8))
    assert {r.dtype for r in report.sites} == {"bfloat16"}
    assert report.totals.weight_bytes == 2 * 8 * 16 * 2
    assert report.sites[0].decision == NM(2, 4)


def broken(x, w):
    h = (x @ w).relu()
    torch._dynamo.graph_break()
    return (h @ w).relu()


# torch asks a value between two graphs for its .grad
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graph_breaks_make_several_graphs_in_one_report():
    x, w = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)
    report = sfx.explain(broken, config=CFG)(x, w)
    assert {r.graph for r in report.sites} == {0, 1}
    assert len(report.forward) == len(report.backward) == len(report.stages) == 2
    assert report.to_dict()["graphs"] == 2
    one = 2 * 4 * 8 * 8
    assert report.totals.flops["forward"].dense == 2 * one
    assert "2 graphs" in repr(report)


def chosen_rows(x, w):
    return (x[x[:, 0] > 0] @ w).relu()  # how many rows there are depends on data


def test_a_size_that_depends_on_data_is_not_counted():
    x, w = torch.randn(16, 8), torch.randn(8, 4)
    half = Sampled(0.5, inference=True)
    cfg = SparseConfig(rules=[Rule("*", forward=half)])
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = sfx.explain(chosen_rows, config=cfg)(x, w)
    (row,) = report.sites
    assert (row.shape, row.flops_dense, row.decision) == ((None, 4, 8), None, half)
    assert report.totals.unknown == 1
    assert "~?×4×8" in str(report)  # noqa: RUF001
    assert "not counted: 1 product whose sizes depend on data" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["sites"][0]["shape"] == [row.symbols["M"], 4, 8]
    asked = SparseConfig(rules=cfg.rules, select="profitable")
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (row,) = sfx.explain(chosen_rows, config=asked)(x, w).sites
    assert row.reason == "not profitable: its sizes depend on data"


def test_dynamic_shapes():
    model, x = Net(), torch.randn(6, 8)
    torch._dynamo.mark_dynamic(x, 0)
    report = sfx.explain(model, config=CFG)(x)
    row = report.sites[0]
    assert (row.shape, row.flops_dense) == ((6, 16, 8), 2 * 6 * 16 * 8)
    symbol = row.symbols["M"]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["sites"][0]["shape"] == [symbol, 16, 8]
    assert data["sites"][0]["flops_dense_expression"] == f"2*1*{symbol}*16*8"
    assert data["sites"][0]["flops_dense"] == 2 * 6 * 16 * 8
    assert "~6×16×8" in str(report)  # noqa: RUF001
    assert report.totals.saved_bytes > 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_tells_what_explain_tells(dynamic):
    model, x = Net(), torch.randn(6, 8)
    compiled = compile_with(model, dynamic=dynamic)
    compiled(x, scale=2.0).sum().backward()
    ran = sfx.explain(compiled)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    told = sfx.explain(model, config=CFG)(x, scale=2.0)
    if not dynamic:
        assert (ran.sites, ran.totals, str(ran)) == (told.sites, told.totals, str(told))
        assert ran.stages == told.stages
    assert decisions(ran) == decisions(told)
    assert len(ran.stages) == 1  # what Dynamo began and gave up (a float as an input) is not told
    assert ran.config is CFG


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_mode_around_a_report_does_not_change_it(mode):
    compiled = compile_with(Net())
    compiled(torch.randn(4, 8))
    outside = sfx.explain(compiled)
    with mode():
        inside = sfx.explain(compiled)
        text, stages = str(inside), inside.stages
    assert (text, stages) == (str(outside), outside.stages)


def test_compiled_twice_for_two_shapes_and_modes_tells_each_graph():
    compiled = compile_with(Net().eval(), dynamic=False)
    compiled(torch.randn(4, 8))
    with torch.no_grad():
        compiled(torch.randn(5, 8))
    report = sfx.explain(compiled)
    shapes = [
        (r.graph, r.shape[0]) for r in report.sites if r.layer == "fc1" and r.role == "forward"
    ]
    assert shapes == [(0, 4), (1, 5)]
    assert report.backward[0] is not None
    assert report.backward[1] is None


def test_a_compiled_function_and_a_module_compiled_in_place():
    function = compile_with(product)
    function(torch.randn(4, 8), torch.randn(8, 8, requires_grad=True))
    assert len(sfx.explain(function).sites) == 5
    model = Net()
    model.compile(backend="sparsefx", options={"config": CFG})
    model(torch.randn(4, 8))
    assert len(sfx.explain(model).sites) == 5


def test_a_compiled_model_is_captured_anew_under_another_config():
    model = Net()
    compiled = compile_with(model)
    compiled(torch.randn(4, 8))
    report = sfx.explain(compiled, config="sampled-0.3")(torch.randn(4, 8))
    assert report.sites[0].decision == Sampled(0.3)
    assert len(sfx.explain(compiled).sites) == 5  # what ran is as it was
    model.compile(backend="sparsefx", options={"config": CFG})
    report = sfx.explain(model, config="sampled-0.3")(torch.randn(4, 8))
    assert report.sites[0].decision == Sampled(0.3)
    assert model._compiled_call_impl is not None


def test_what_a_compile_cache_answered_is_derived_again():
    """With a cache hit the backend is called, but not the pipeline: no outcome is on record."""
    compiled = compile_with(Net())
    compiled(torch.randn(4, 8))
    ran = sfx.explain(compiled)
    for record in wrapper_of(compiled)._sparsefx:
        record.outcome = None
    derived = sfx.explain(compiled)
    assert (derived.sites, derived.totals) == (ran.sites, ran.totals)


def test_what_ran_is_told_even_if_it_would_not_come_out_so_again(recwarn):
    """Rows of a compiled model come from its own run; asking for graphs warns no second time."""
    calls = []

    def fails_once(gm):
        calls.append(gm)
        raise KeyError("a pass of mine")

    cfg = SparseConfig(rules=CFG.rules, passes=[fails_once], codegen="aot_eager")
    compiled = compile_with(Net(), cfg)
    with pytest.warns(sfx.SparsefxWarning, match="a pass of mine"):
        compiled(torch.randn(4, 8))
    assert len(calls) == 1
    report = sfx.explain(compiled)
    (failure,) = report.failures
    assert failure.startswith("fails_once failed: KeyError: 'a pass of mine'")
    assert len(calls) == 1  # not traced
    assert "fails_once failed" in str(report)
    assert len(calls) == 2  # traced, silently, for the saved bytes
    assert not recwarn.list


def test_strict_raises():
    def breaks(gm):
        raise KeyError("a pass of mine")

    cfg = SparseConfig(rules=CFG.rules, passes=[breaks], strict=True)
    with pytest.raises(sfx.PassError, match=r"breaks failed.*a pass of mine"):
        sfx.explain(Net(), config=cfg)(torch.randn(4, 8))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_another_backends_model_is_refused(backend):
    compiled = torch.compile(Net(), backend=backend)
    with pytest.raises(sfx.SparsefxError, match="OptimizedModule was not compiled by sparsefx"):
        sfx.explain(compiled)
    assert len(sfx.explain(compiled, config="2:4")(torch.randn(4, 8)).sites) == 5


def test_a_compiled_model_that_has_not_run_is_refused():
    with pytest.raises(sfx.SparsefxError, match=r"OptimizedModule was compiled yet: call it once"):
        sfx.explain(compile_with(Net()))


def test_gpt2_as_it_comes():
    transformers = pytest.importorskip("transformers")
    size = transformers.GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=32,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(size).train()
    ids = torch.randint(0, 32, (2, 8))
    report = sfx.explain(model, config="all-three")(ids)
    by_layer: dict[str, list] = {}
    for row in report.sites:
        assert bool(row.reason) == (row.decision is None)
        by_layer.setdefault(row.layer, []).append((row.role, str(row.decision)))
    linear = [("forward", "2:4 transposable"), ("grad_input", "2:4 transposable"),
              ("grad_weight", "sampled 0.3 systematic")]  # fmt: skip
    attention = ["c_attn", "c_proj"]
    names = [f"transformer.h.{i}.{part}" for i in range(2)
             for part in (*(f"attn.{a}" for a in attention), "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    assert {name: by_layer[name] for name in names} == dict.fromkeys(names, linear)
    assert by_layer["lm_head"] == [(role, "None") for role, _ in linear]
    fused = "part of scaled_dot_product_attention, which other devices fuse"
    assert {r.reason for r in report.sites if r.layer.endswith(".attn")} == {fused}
    assert max(map(len, str(report).splitlines())) <= 120
    # tokens x (3 + 1 + 4 + 4) x 16 x 16 for each block, and the head
    weights = [r for r in report.sites if r.role == "forward" and r.batch == 1]
    assert sum(r.flops_dense for r in weights) == 2 * 16 * (2 * 12 * 16 * 16 + 16 * 32)
    json.dumps(report.to_dict())


def test_a_model_on_the_meta_device_is_explained():
    """Shapes are all that a plan needs: a model too large for this machine can be looked at."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).to("meta")
    x = torch.empty(4, 8, device="meta")
    report = sfx.explain(model, config="all-three")(x)
    assert [row.role for row in report.sites if row.decision] == ["forward", "grad_weight"]


def test_a_model_can_be_explained_often_and_compiled_then():
    """A capture doesn't count towards Dynamo's limit, behind which a model runs in eager mode."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(4, 8)
    config = sfx.SparseConfig(codegen="aot_eager")
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert sfx.explain(model, config=config)(x).sites
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    compiled(x)
    assert sfx.explain(compiled).sites
