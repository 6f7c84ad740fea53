"""What a sparse op runs as, and rules that force it."""

import pytest
import torch
from torch import nn

import sparsefx as sfx
from sparsefx import NM, ConfigError, Dense, Rule, Sampled, SparseConfig
from sparsefx.lowering import check_forced, kind_of, lowering_of
from sparsefx.plan import Decision, Plan, Site
from sparsefx.policy import decide


@pytest.mark.parametrize(
    ("op", "device", "said"),
    [
        ("nm_mm", "cpu", "masked dense"),
        ("masked_conv", "cpu", "masked dense"),
        ("sampled_bmm", "cpu", "gathered GEMM"),
        ("sampled_conv_weight", "cpu", "gathered conv"),
    ],
)
def test_lowering(op, device, said):
    assert lowering_of(op, device) == said


def test_lowering_names_the_kernel():
    pytest.importorskip("triton")
    assert lowering_of("nm_mm", "cuda") == "triton nm_mm"
    assert lowering_of("nm_packed_mm", "cuda") == "triton nm_packed_mm"
    assert lowering_of("nm_packed_mm", "cpu") == "C++ nm_packed_mm"


def test_a_packed_product_can_be_forced_to_its_kernel():
    pytest.importorskip("triton")
    check(NM(2, 4), "triton", "nm_packed_mm")
    check(NM(2, 4, True), "triton", "nm_packed_mm")
    with pytest.raises(ConfigError, match=r"nm_packed_mm on cpu, which has .*'cpp'"):
        check(NM(2, 4), "triton", "nm_packed_mm", "cpu")


@pytest.mark.parametrize(
    ("op", "pattern", "said"),
    [
        ("sampled_mm", Sampled(0.5, estimator="systematic"), "triton sampled_mm"),
        ("sampled_mm_grad_input", Sampled(mass=0.5), "triton sampled_mm_grad_input"),
        ("sampled_mm_weight", Sampled(0.5, estimator="topk_mean"), "triton sampled_mm_weight"),
        ("sampled_conv", Sampled(0.5), "triton sampled_conv"),
        ("sampled_conv", Sampled(0.5, estimator="systematic"), "gathered conv"),
        ("sampled_conv_grad_input", Sampled(mass=0.5), "gathered conv"),
        ("sampled_conv_grad_weight", Sampled(0.5, estimator="bernoulli"),
         "triton sampled_conv_grad_weight"),
        ("sampled_conv_grad_weight", Sampled(0.5, estimator="topk_mean"), "gathered conv"),
    ],
)  # fmt: skip
def test_convolutions_leave_scaled_pairs_to_the_reference(op, pattern, said, monkeypatch):
    monkeypatch.setattr("sparsefx.lowering.kernel_for", lambda op, _: f"triton {op}")
    assert lowering_of(op, "cuda", pattern) == said


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton nm_mm", "triton"),
        ("C++ nm_packed_mm", "cpp"),
        ("gathered GEMM", "reference"),
        ("masked dense", "reference"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


# --- what a rule forces


def plan(pattern, lowering, device="cuda"):
    shape = (8, 8, 8)
    site = Site("fc", "forward", "mm", "mm", shape, "float32", device, group=0)
    return Plan(site, Decision(pattern, lowering=lowering))


def check(pattern, lowering, op, device="cuda"):
    check_forced([plan(pattern, lowering, device)], {(0, "forward"): op})


@pytest.fixture
def triton(monkeypatch):
    """A table that has a Triton kernel for every op on cuda."""
    monkeypatch.setattr(
        "sparsefx.lowering.kernel_for", lambda op, on: f"triton {op}" if on == "cuda" else None
    )


@pytest.mark.parametrize("lowering", [None, "triton", "reference"])
def test_what_is_there_can_be_forced(triton, lowering):
    check(NM(2, 4), lowering, "nm_mm")
    check(Sampled(0.5), lowering, "sampled_mm")
    check(NM(2, 4, transposable=True), lowering, "masked_mm")  # its mask is made apart


@pytest.mark.parametrize(
    ("pattern", "lowering", "op", "device", "there"),
    [
        (
            NM(2, 4),
            "cpp",
            "nm_mm",
            "cuda",
            "'reference' (masked dense) and 'triton' (triton nm_mm)",
        ),
        (NM(2, 4), "triton", "nm_mm", "cpu", "'reference' (masked dense)"),
        (NM(2, 4, True), "reference", "nm_mm", "cuda", "'triton' (triton nm_mm)"),
        (Sampled(mass=0.5), "triton", "sampled_conv", "cuda", "'reference' (gathered conv)"),
    ],
)
def test_what_is_not_there_is_an_error(triton, pattern, lowering, op, device, there):
    with pytest.raises(ConfigError) as raised:
        check(pattern, lowering, op, device)
    assert str(raised.value) == (
        f"Rule: lowering='{lowering}': fc forward as {pattern} is {op} on {device}, which has "
        f"{there}; force that, or leave lowering=None"
    )


def test_products_that_stay_dense_are_not_asked(triton):
    check(Dense(), "cpp", "")
    check_forced([Plan(plan(NM(2, 4), None).site)], {})


def explained(lowering, **changes):
    config = SparseConfig([Rule("*", Sampled(0.5), lowering=lowering)], False, **changes)
    return sfx.explain(nn.Linear(8, 4), config=config)(torch.randn(3, 8, requires_grad=True))


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_refused_whose_rule_can_not_be_followed(strict):
    with pytest.raises(ConfigError, match="is sampled_mm on cpu, which has"):
        explained("triton", strict=strict)


def test_so_is_a_compiled_one():
    config = SparseConfig([Rule("*", Sampled(0.5), lowering="cpp")], False, codegen="aot_eager")
    model = torch.compile(nn.Linear(8, 4), backend="sparsefx", options={"config": config})
    with pytest.raises(ConfigError, match="is sampled_mm on cpu, which has 'reference'"):
        model(torch.randn(3, 8, requires_grad=True))


def test_what_is_forced_is_not_weighed():
    small = explained("reference", select="profitable").sites
    assert [row.decided for row in small] == ["sampled 0.5"] * 3
    assert {row.decided for row in explained(None, select="profitable").sites} == {"dense"}


def test_a_forced_reference_is_inlined_where_there_is_a_kernel(monkeypatch):
    monkeypatch.setattr("sparsefx.ops.has_kernel", lambda *_: True)
    kept, inlined = (explained(how).after[0] for how in (None, "reference"))
    assert "sampled_mm(" in kept
    assert "sampled_mm(" not in inlined


def test_stored_masks_are_forced_too():
    rule = Rule("*", lowering="triton")
    site = Site("fc", "forward", "mm", "mm", (8, 8, 8), "float32", "cpu", 0, mask="m")
    decided = decide({"forward": site}, SparseConfig([rule], False))
    assert decided["forward"].lowering == "triton"
