"""lower_vendor: 2:4 products of a GPU go to the vendor's library, and what doesn't says why."""

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn

from sparsefx import ConfigError, SparseConfig, compat, cost, ops, passes, pipeline
from sparsefx.config import NM, Dense, Rule
from sparsefx.cost.vendor import published_speedup, vendor_pays
from sparsefx.lowering import kind_of, lowering_of
from sparsefx.passes import lower_vendor, rewrite_nm, share_masks
from sparsefx.plan import Site
from sparsefx.testing import capture, run_pass

PATTERN = NM(2, 4, transposable=True)
PRODUCTS = (ops.masked_mm, ops.nm_mm)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """A library on every GPU; returns how to change it."""

    def is_(name):
        find = lambda device: name if device.type == "cuda" else ""  # noqa: E731
        monkeypatch.setattr(compat, "semi_structured_library", find)

    is_("cusparselt")
    return is_


def on_gpu(gm):
    """Say that a graph's values are on a GPU: they are fake, so none has to be there."""
    for node in gm.graph.nodes:
        old = node.meta.get("val")
        if isinstance(old, torch.Tensor):
            with old.fake_mode:
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cuda")
            node.meta["val"] = new
    return gm


def rules(pattern=PATTERN, lowering="vendor", **gradients):
    return SparseConfig([Rule("*", pattern, lowering=lowering, **gradients)], False)


@pytest.fixture
def rewritten(joint):
    """A joint graph on a GPU, N:M already."""

    def make(model, x, config, dynamic=None):
        half = x.detach().bfloat16().requires_grad_(x.requires_grad)
        found = joint(model.bfloat16(), half, dynamic=dynamic)
        on_gpu(found.gm)
        found.find(config)
        for function in (rewrite_nm, share_masks):
            run_pass(function, found.gm)
        return found

    return make


def counted(found):
    """How many products and packed weights there are, by the part that the partitioner sees."""
    tags = [
        (n.target.name().partition("::")[2], n.meta.get("partitioner_tag") == "is_backward")
        for n in found.gm.graph.nodes
        if n.target in (ops.nm24_mm, ops.nm24_compress)
    ]
    return {tag: tags.count(tag) for tag in tags}


def masked(found):
    """What a graph computes, its masked products by plain operators: no C++ has to be built."""
    twin = found.again()
    for node in twin.gm.graph.nodes:
        node.target = ops.REFERENCES[node.target] if node.target in PRODUCTS else node.target
    return twin.values()


def close(one, other):
    """Sums of bfloat16 products in two orders."""
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_graph_and_values(rewritten):
    x = torch.randn(48, 64, requires_grad=True)
    found = rewritten(nn.Linear(64, 32), x, rules())
    before = masked(found)
    result = found.run(lower_vendor)
    close(found.values(), before)
    assert result.skipped == {}
    assert_text(
        result.text,
        """\
%0 = input(weight) : bfloat16[32, 64]
%1 = input(bias) : bfloat16[32]
%2 = input(l_args_0_) : bfloat16[48, 64]
%3 = input() : bfloat16[48, 32]
%4 = permute(%0, [1, 0]) : bfloat16[64, 32]
%5 = nm_mask(%0, 2, 4, 1, True) : bool[32, 64]
%6 = permute(%5, [1, 0]) : bool[64, 32]
%7 = nm24_compress(%0, %5) : bfloat16[32, 36]
%8 = nm24_mm(%2, %7, %4, %6, %1) : bfloat16[48, 32]
%9 = permute(%4, [1, 0]) : bfloat16[32, 64]
%10 = permute(%5, [1, 0]) : bool[64, 32]
%11 = nm24_compress(%4, %10) : bfloat16[64, 18]
%12 = nm24_mm(%3, %11, %9, %5, None) : bfloat16[48, 64]
%13 = permute(%3, [1, 0]) : bfloat16[32, 48]
%14 = mm(%13, %2) : bfloat16[32, 64]
%15 = permute(%14, [1, 0]) : bfloat16[64, 32]
%16 = sum(%3, [0], True) : bfloat16[1, 32]
%17 = view(%16, [32]) : bfloat16[32]
%18 = permute(%15, [1, 0]) : bfloat16[32, 64]
return [%8, %18, %17, %12]""",
    )


def test_a_forward_saves_no_packed_weight(rewritten):
    found = rewritten(nn.Linear(64, 32), torch.randn(48, 64, requires_grad=True), rules())
    found.run(lower_vendor)
    forward, backward = compat.partition(found.gm, 1)
    for part in (forward, backward):
        made = [node.target for node in part.graph.nodes]
        assert (made.count(ops.nm24_compress), made.count(ops.nm24_mm)) == (1, 1)
    _, *saved = next(node for node in forward.graph.nodes if node.op == "output").args[0]
    assert sorted(str(node.meta["val"].dtype) for node in saved) == [
        "torch.bfloat16", "torch.bfloat16", "torch.bool"
    ]  # fmt: skip


class Stored(nn.Module):
    """x @ w, its weight stored [in, out]."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 32))

    def forward(self, x):
        return x @ self.w


class Twice(nn.Module):
    """One weight, used twice."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.fc(self.fc(x).tanh())


def test_each_form_is_packed_once_where_it_is_used(rewritten):
    found = rewritten(Twice(), torch.randn(16, 32, requires_grad=True), rules())
    before = masked(found)
    found.run(lower_vendor)
    close(found.values(), before)
    assert counted(found) == {
        ("nm24_mm", False): 2,
        ("nm24_mm", True): 2,
        ("nm24_compress", False): 1,
        ("nm24_compress", True): 1,  # of the same mask, turned
    }


@pytest.mark.parametrize("transposable", [True, False])
def test_a_weight_that_is_stored_the_other_way_without_a_backward(rewritten, transposable):
    with torch.no_grad():
        found = rewritten(Stored(), torch.randn(16, 64), rules(NM(2, 4, transposable)))
    before = masked(found)
    found.run(lower_vendor)
    close(found.values(), before)
    assert counted(found) == {("nm24_compress", False): 1, ("nm24_mm", False): 1}


def test_row_wise_products_only_where_forced_and_only_forwards(rewritten):
    x = torch.randn(16, 64)
    for config, taken in ((rules(NM(2, 4), None), False), (rules(NM(2, 4)), True)):
        with torch.no_grad():
            found = rewritten(nn.Linear(64, 32), x, config)
        before = masked(found)
        assert found.run(lower_vendor).modified == taken
        close(found.values(), before)
    found = rewritten(nn.Linear(64, 32), x.requires_grad_(), rules(NM(2, 4)))
    found.run(lower_vendor)
    assert counted(found) == {("nm24_compress", False): 1, ("nm24_mm", False): 1}
    assert "nm_mm(" in found.run(lower_vendor).text


@pytest.mark.parametrize(
    "config",
    [rules(NM(1, 4, transposable=True)), rules(lowering="reference"), rules(lowering="triton"),
     rules(NM(1, 4), grad_input=Dense())],
)  # fmt: skip
def test_other_patterns_and_other_lowerings_stay(rewritten, config):
    found = rewritten(nn.Linear(64, 32), torch.randn(16, 64), config)
    result = found.run(lower_vendor)
    assert (result.modified, result.skipped) == (False, {})


def test_a_cpu_graph_stays(joint):
    found = joint(nn.Linear(64, 32).bfloat16(), torch.randn(16, 64).bfloat16()).find(rules())
    found.run(rewrite_nm)
    result = found.run(lower_vendor)
    assert (result.modified, result.skipped) == (False, {})


@pytest.mark.parametrize(
    ("model", "depth", "name", "reason"),
    [
        (nn.Linear(64, 32), 64, "", "neither cuSPARSELt nor CUTLASS serves 2:4 products here"),
        (nn.Linear(64, 32), 64, "cutlass", "cutlass takes 2:4 weights of multiples of 64, not "
         "[32, 64]"),
        (nn.Linear(48, 32), 48, "cusparselt", "cusparselt takes 2:4 weights of multiples of 32, "
         "not [32, 48]"),
    ],
)  # fmt: skip
def test_reasons(rewritten, library, model, depth, name, reason):
    library(name)
    found = rewritten(model, torch.randn(16, depth), rules())
    result = found.run(lower_vendor)
    assert set(result.skipped.values()) == {f"2:4 by the vendor's library: {reason}"}
    assert not result.modified


def test_float32_is_a_reason(joint):
    found = joint(nn.Linear(64, 32), torch.randn(16, 64))
    on_gpu(found.gm)
    found.find(rules())
    run_pass(rewrite_nm, found.gm)
    (reason,) = found.run(lower_vendor).skipped.values()
    assert reason.endswith("weights in float16 and bfloat16 here, not in torch.float32")


def test_sizes_that_are_not_known_are_reasons(rewritten, monkeypatch):
    found = rewritten(nn.Linear(64, 32), torch.randn(16, 64), rules(lowering=None))
    with monkeypatch.context() as patch:
        patch.setattr(compat, "has_size", lambda size: False)
        (reason,) = run_pass(lower_vendor, found.gm).skipped.values()
    assert reason.endswith("how many rows it multiplies depends on data")
    monkeypatch.setattr(compat, "settled", lambda size: None)
    (reason,) = run_pass(lower_vendor, found.gm).skipped.values()
    assert reason.endswith("the weight's sizes are not known when compiling")


def test_a_mask_that_is_stored_the_other_way_is_a_reason(rewritten):
    found = rewritten(nn.Linear(32, 32), torch.randn(16, 32), rules())
    (node,) = [n for n in found.gm.graph.nodes if n.target is ops.masked_mm]
    x, w, mask, bias = node.args
    node.args = x, w, mask.args[0], bias
    (reason,) = run_pass(lower_vendor, found.gm).skipped.values()
    assert reason.endswith("weight and mask are not stored alike")


def test_few_rows_stay_unless_forced(rewritten):
    found = rewritten(nn.Linear(64, 32), torch.randn(16, 64), rules(lowering=None))
    (reason,) = found.run(lower_vendor).skipped.values()
    assert reason == (
        "2:4 by the vendor's library: 16 rows are too few to pay by others' measurements; "
        'lowering="vendor" in the rule forces it'
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_many_rows_are_taken(rewritten, dynamic):
    found = rewritten(nn.Linear(64, 32), torch.randn(2048, 64), rules(lowering=None), dynamic)
    assert found.run(lower_vendor).modified


# --- in the pipeline


def outcome_of(model, x, config):
    return pipeline.run(on_gpu(capture(model.bfloat16(), x.bfloat16())), config)


def test_what_the_report_is_told():
    x = torch.randn(16, 64)
    outcome = outcome_of(nn.Linear(64, 32), x, rules())
    assert outcome.ops[0, "forward"] == "nm24_mm"
    outcome = outcome_of(nn.Linear(64, 32), x, rules(lowering=None))
    (note,) = [p.decision.note for p in outcome.plans if p.site.role == "forward"]
    assert note.startswith("2:4 by the vendor's library: 16 rows are too few")
    assert outcome.ops[0, "forward"] == "masked_mm"


def test_what_can_not_be_forced_says_why(library):
    library("")
    with pytest.raises(
        ConfigError, match=r"lowering='vendor': .* is masked_mm on cuda, which has "
    ):
        outcome_of(nn.Linear(64, 32), torch.randn(16, 64), rules())
    with pytest.raises(ConfigError, match="lowering=None; 2:4 by the vendor's library: neither"):
        outcome_of(nn.Linear(64, 32), torch.randn(16, 64), rules())


def test_what_it_is_called():
    assert kind_of(lowering_of("nm24_mm", "cuda", PATTERN)) == "vendor"
    assert lowering_of("nm24_mm", "cpu", PATTERN) == "masked dense"
    assert not cost.executes_dense("nm24_mm")


def test_the_pass_runs_behind_share_masks():
    names = [name for name, _ in pipeline.build(SparseConfig())]
    assert names.index("lower_vendor") == names.index("share_masks") + 1
    assert passes.lower_vendor is lower_vendor


# --- select="profitable"


def test_the_prior_is_what_was_published():
    assert [published_speedup(rows) for rows in (1, 64, 1024, 10**6)] == [0.85, 0.85, 1.39, 1.57]
    assert 1.39 < published_speedup(1500) < 1.46
    pays = [rows for rows in (0, 1, 64, 256, 512, 1024, 4096, 16384) if vendor_pays(rows)]
    assert pays == [1024, 4096, 16384]


def site(rows=4096, sides=(64, 128), **changes):
    known = {"layer": "fc", "role": "forward", "kind": "mm", "op": "mm", "shape": (rows, *sides)}
    return Site(**{**known, "dtype": "bfloat16", "device": "cuda", "group": 0, **changes})


def test_profitable(library, monkeypatch):
    monkeypatch.setattr(compat, "semi_structured_step", lambda: 32)
    assert cost.unprofitable([site()], PATTERN) == ""
    for other, pattern in [
        (site(512), PATTERN),
        (site(sides=(64, 48)), PATTERN),
        (site(sides=(64, 0)), PATTERN),
        (site(dtype="float32"), PATTERN),
        (site(device="cpu"), PATTERN),
        (site(kind="bmm"), PATTERN),
        (site(), NM(2, 4)),
        (site(), NM(4, 8, transposable=True)),
    ]:
        assert cost.unprofitable([other], pattern).startswith("not profitable: N:M runs as a")
    monkeypatch.setattr(compat, "semi_structured_step", lambda: 0)
    assert cost.unprofitable([site()], PATTERN).startswith("not profitable: N:M runs as a")


def test_step(library):
    assert compat.semi_structured_step() == 32
    library("cutlass")
    assert compat.semi_structured_step() == 64
    library("")
    assert compat.semi_structured_step() == 0
