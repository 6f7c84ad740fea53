"""pack_frozen: weights of inference graphs are packed apart from their products."""

import copy
import sys
from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn.utils import prune
from torch.profiler import ProfilerActivity, profile

import sparsefx as sfx
from sparsefx import NM, ConfigError, Rule, SparseConfig, SparsefxWarning, ops
from sparsefx.passes import pack_frozen, rewrite_nm
from sparsefx.rewriting import copy_graph_module, plan_of


@pytest.fixture
def rewritten(joint, every):
    """A graph without a backward, N:M already."""

    def make(model, x, pattern=None):
        with torch.no_grad():
            found = joint(model, x).find(every(pattern or NM(2, 4)))
        found.run(rewrite_nm)
        return found

    return make


def packed_equals_before(found):
    before = found.values()
    result = found.run(pack_frozen)
    torch.testing.assert_close(found.values(), before)
    return result


def test_graph(rewritten):
    found = rewritten(nn.Linear(8, 4), torch.randn(3, 8))
    assert_text(
        packed_equals_before(found).text,
        """\
%0 = input(weight) : float32[4, 8]
%1 = input(bias) : float32[4]
%2 = input(l_args_0_) : float32[3, 8]
%3 = nm_pack(%0, 2, 4) : (float32[4, 4], uint8[4, 1])
%4 = getitem(%3, 0) : float32[4, 4]
%5 = getitem(%3, 1) : uint8[4, 1]
%6 = nm_packed_mm(%2, %4, %5, %1, 2, 4) : float32[3, 4]
return [%6]""",
    )


def test_a_transposable_mask_is_packed_too(rewritten):
    found = rewritten(nn.Linear(8, 4, bias=False), torch.randn(3, 8), NM(2, 4, transposable=True))
    assert_text(
        packed_equals_before(found).text,
        """\
%0 = input(weight) : float32[4, 8]
%1 = input(l_args_0_) : float32[3, 8]
%2 = nm_mask(%0, 2, 4, 1, True) : bool[4, 8]
%3 = full([], 0.0, dtype=float32, device=cpu) : float32[]
%4 = where(%2, %0, %3) : float32[4, 8]
%5 = nm_pack(%4, 2, 4) : (float32[4, 4], uint8[4, 1])
%6 = getitem(%5, 0) : float32[4, 4]
%7 = getitem(%5, 1) : uint8[4, 1]
%8 = nm_packed_mm(%1, %6, %7, None, 2, 4) : float32[3, 4]
return [%8]""",
    )


class Stored(nn.Module):
    """x @ w, its weight stored [in, out]."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize("transposable", [False, True])
def test_a_weight_that_is_stored_the_other_way(rewritten, transposable):
    found = rewritten(Stored(), torch.randn(3, 8), NM(1, 4, transposable))
    assert "nm_packed_mm(" in packed_equals_before(found).text


def test_what_is_not_packed_says_why(joint, every, rewritten):
    x = torch.randn(3, 8)
    training = joint(nn.Linear(8, 4), x).find(every(NM(2, 4)))
    training.run(rewrite_nm)
    conv = rewritten(nn.Conv1d(8, 4, 1), torch.randn(2, 8, 3))
    for found, reason in (
        (training, "freeze=True packs no weight of a training graph: call it under no_grad()"),
        (conv, "freeze=True packs linear layers only; sparsefx.pack also packs convolutions"),
    ):
        result = found.run(pack_frozen)
        assert not result.modified
        assert list(result.skipped.values()) == [reason]


def test_nothing_is_packed_where_weights_are_not_frozen(rewritten):
    found = rewritten(nn.Linear(8, 4), torch.randn(3, 8))
    result = found.run(partial(pack_frozen, freeze=False))
    assert (result.modified, result.skipped) == (False, {})


# --- as part of the pipeline


def model():
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


RULES = [Rule("0", NM(2, 4)), Rule("2", NM(2, 4)), Rule("4", NM(1, 2, transposable=True))]
CONFIG = SparseConfig(RULES, keep_output_dense=False, codegen="aot_eager", freeze=True)


def by_hand(net):
    """The model with masked weights."""
    net = copy.deepcopy(net)
    sfx.pack(net, CONFIG)
    return sfx.unpack(net)


def test_compiled_and_the_report():
    net, x = model(), torch.randn(3, 16)
    with torch.no_grad():
        compiled = torch.compile(net, backend="sparsefx", options={"config": CONFIG})
        y = compiled(x)
        report = sfx.explain(compiled)
        assert {row.sparse_op for row in report.sites} == {"nm_packed_mm"}
        assert all(
            "once, if torch._inductor.config.freezing is on" in row.note for row in report.sites
        )
        net[0].weight.mul_(-2)  # without Inductor's freezing, values may change
        again = compiled(x)
        torch.testing.assert_close(again, by_hand(net)(x))
        assert not torch.equal(again, y)


def test_a_training_graph_says_why_nothing_is_packed():
    net, x = model(), torch.randn(3, 16)
    report = sfx.explain(net, config=CONFIG)(x)
    notes = {(row.layer, row.role): row.note for row in report.sites}
    assert "freeze=True packs no weight of a training graph" in notes["0", "forward"]
    assert {row.sparse_op for row in report.sites} <= {"nm_mm", "masked_mm", ""}
    plain = torch.compile(
        net, backend="sparsefx", options={"config": {**CONFIG.to_dict(), "freeze": False}}
    )
    frozen = torch.compile(net, backend="sparsefx", options={"config": CONFIG})
    assert torch.equal(plain(x), frozen(x))


def test_a_stored_mask_is_left_to_pack():
    net = nn.Linear(16, 8)
    prune.random_unstructured(net, "weight", 0.5)
    with torch.no_grad():
        report = sfx.explain(net, config=CONFIG)(torch.randn(3, 16))
    assert report.sites[0].note == (
        "freeze=True packs no stored mask, whose pattern may change: use sparsefx.pack"
    )


def test_a_rule_that_forces_another_lowering_goes_first():
    rules = [Rule("*", NM(2, 4), lowering="reference")]
    config = SparseConfig(rules, keep_output_dense=False, codegen="aot_eager", freeze=True)
    with torch.no_grad():
        report = sfx.explain(model(), config=config)(torch.randn(3, 16))
    assert {row.sparse_op for row in report.sites} == {"nm_mm"}
    assert "packs nothing where a rule says lowering='reference'" in report.sites[0].note


def test_a_rule_that_forces_a_kernel_is_about_the_packed_product():
    rules = [Rule("*", NM(2, 4), lowering="triton")]
    config = SparseConfig(rules, keep_output_dense=False, codegen="aot_eager", freeze=True)
    with torch.no_grad(), pytest.raises(ConfigError, match="as 2:4 is nm_packed_mm on cpu"):
        sfx.explain(model(), config=config)(torch.randn(3, 16))


def test_a_layer_that_fails_half_way_is_dense_and_the_rest_packed(monkeypatch):
    module = sys.modules["sparsefx.passes.pack_frozen"]
    emit = module.emit

    def fails(node, target, *args, **kwargs):
        if target is ops.nm_packed_mm and plan_of(node).site.layer == "2":
            raise ZeroDivisionError("injected")
        return emit(node, target, *args, **kwargs)

    monkeypatch.setattr(module, "emit", fails)
    net, x = model(), torch.randn(3, 16)
    with torch.no_grad():
        gm = sfx.testing.capture(net, x)
        with pytest.warns(SparsefxWarning, match="pack_frozen failed at node .* of layer '2'"):
            outcome = sfx.pipeline.run(copy_graph_module(gm), CONFIG)
    assert sorted(outcome.ops.values()) == ["nm_packed_mm"] * 2


def test_freeze_is_part_of_the_cache_key():
    from sparsefx.backend import _plain

    assert _plain(CONFIG) != _plain(
        SparseConfig(RULES, keep_output_dense=False, codegen="aot_eager")
    )


def test_inductor_folds_the_packing_into_a_constant():
    net, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(3, 16)
    config = SparseConfig(RULES[:2], keep_output_dense=False, freeze=True)
    options = {"config": config}
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(net, backend="sparsefx", options=options)
        compiled(x)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            y = compiled(x)
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["sparsefx::nm_packed_mm"] == 2
    assert "sparsefx::nm_pack" not in counts
    torch.testing.assert_close(y, by_hand(net)(x))
