"""rewrite_masked: the graph it makes, the values it keeps, what it says no to."""

from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from sparsefx import ops
from sparsefx.config import Dense, Masked, Rule, Sampled, SparseConfig
from sparsefx.passes import (
    canonicalize,
    cleanup,
    find_sites,
    inline_references,
    recognize_masks,
    rewrite_masked,
    rewrite_sampled,
    select_sites,
    share_masks,
)
from sparsefx.rewriting import PLAN, peel, plan_of
from sparsefx.testing import plans, run_pass

CONFIG = SparseConfig(rules=[])


class Layer(nn.Module):
    """A layer whose weight goes through a function of (weight, bool buffer)."""

    def __init__(self, masked, shape=(4, 8), product=F.linear):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.register_buffer("mask", torch.rand(shape) > 0.5)
        self.masked, self.product = masked, product

    def forward(self, x):
        return self.product(x, self.masked(self.weight, self.mask))


def selected(w, m):
    return torch.where(m, w, 0)


def found(joint, model, *args, config=CONFIG, **kwargs):
    """Capture a model and run what comes before the rewrite."""
    got = joint(model, *args, **kwargs)
    for function in (canonicalize, find_sites, recognize_masks):
        run_pass(function, got.gm)
    run_pass(lambda gm: select_sites(gm, config=config), got.gm)
    return got


# --- what it writes


def test_graph_of_a_selected_weight(joint):
    got = found(joint, Layer(selected), torch.randn(3, 8, requires_grad=True))
    assert_text(
        got.run(rewrite_masked).text,
        """\
%0 = input(weight) : float32[4, 8]
%1 = input(mask) : bool[4, 8]
%2 = input(l_x_) : float32[3, 8]
%3 = input() : float32[3, 4]
%4 = permute(%0, [1, 0]) : float32[8, 4]
%5 = permute(%1, [1, 0]) : bool[8, 4]
%6 = masked_mm(%2, %4, %5, None) : float32[3, 4]
%7 = permute(%3, [1, 0]) : float32[4, 3]
%8 = mm(%7, %2) : float32[4, 8]
%9 = permute(%8, [1, 0]) : float32[8, 4]
%10 = masked_mm(%3, %0, %1, None) : float32[3, 8]
%11 = permute(%9, [1, 0]) : float32[4, 8]
%12 = scalar_tensor(0, dtype=float32, layout=torch.strided, device=cpu) : float32[]
%13 = where(%1, %11, %12) : float32[4, 8]
return [%6, %13, None, %10]""",
    )
    assert_text(
        got.run(inline_references).text,
        """\
%0 = input(weight) : float32[4, 8]
%1 = input(mask) : bool[4, 8]
%2 = input(l_x_) : float32[3, 8]
%3 = input() : float32[3, 4]
%4 = full([], 0.0, dtype=float32, device=cpu) : float32[]
%5 = where(%1, %0, %4) : float32[4, 8]
%6 = permute(%5, [1, 0]) : float32[8, 4]
%7 = mm(%2, %6) : float32[3, 4]
%8 = permute(%3, [1, 0]) : float32[4, 3]
%9 = mm(%8, %2) : float32[4, 8]
%10 = permute(%9, [1, 0]) : float32[8, 4]
%11 = mm(%3, %5) : float32[3, 8]
%12 = permute(%10, [1, 0]) : float32[4, 8]
%13 = scalar_tensor(0, dtype=float32, layout=torch.strided, device=cpu) : float32[]
%14 = where(%1, %12, %13) : float32[4, 8]
return [%7, %14, None, %11]""",
    )


def test_graph_of_a_multiplied_weight(joint):
    model = nn.Sequential(nn.Linear(8, 4))
    prune.identity(model[0], "weight")
    model[0].weight_mask[:, 0] = 0
    got = found(joint, model, torch.randn(3, 8, requires_grad=True))
    assert_text(
        got.run(rewrite_masked).text,
        """\
%0 = input(l_args_0_) : float32[3, 8]
%1 = input(0.weight_mask) : float32[4, 8]
%2 = input(0.weight_orig) : float32[4, 8]
%3 = input(0.bias) : float32[4]
%4 = input() : float32[3, 4]
%5 = input() : float32[4, 8]
%6 = mul(%1, %2) : float32[4, 8]
%7 = ne(%6, 0) : bool[4, 8]
%8 = permute(%6, [1, 0]) : float32[8, 4]
%9 = permute(%7, [1, 0]) : bool[8, 4]
%10 = masked_mm(%0, %8, %9, %3) : float32[3, 4]
%11 = masked_mm(%4, %6, %7, None) : float32[3, 8]
%12 = permute(%4, [1, 0]) : float32[4, 3]
%13 = mm(%12, %0) : float32[4, 8]
%14 = permute(%13, [1, 0]) : float32[8, 4]
%15 = sum(%4, [0], True) : float32[1, 4]
%16 = view(%15, [4]) : float32[4]
%17 = permute(%14, [1, 0]) : float32[4, 8]
%18 = add(%5, %17) : float32[4, 8]
%19 = mul(%18, %1) : float32[4, 8]
return [%10, %6, %11, None, %19, %16]""",
    )
    assert_text(
        got.run(inline_references).text,
        """\
%0 = input(l_args_0_) : float32[3, 8]
%1 = input(0.weight_mask) : float32[4, 8]
%2 = input(0.weight_orig) : float32[4, 8]
%3 = input(0.bias) : float32[4]
%4 = input() : float32[3, 4]
%5 = input() : float32[4, 8]
%6 = mul(%1, %2) : float32[4, 8]
%7 = permute(%6, [1, 0]) : float32[8, 4]
%8 = addmm(%3, %0, %7) : float32[3, 4]
%9 = mm(%4, %6) : float32[3, 8]
%10 = permute(%4, [1, 0]) : float32[4, 3]
%11 = mm(%10, %0) : float32[4, 8]
%12 = permute(%11, [1, 0]) : float32[8, 4]
%13 = sum(%4, [0], True) : float32[1, 4]
%14 = view(%13, [4]) : float32[4]
%15 = permute(%12, [1, 0]) : float32[4, 8]
%16 = add(%5, %15) : float32[4, 8]
%17 = mul(%16, %1) : float32[4, 8]
return [%8, %6, %9, None, %17, %14]""",
    )


def test_graph_under_autocast_and_through_views(joint):
    class Cast(Layer):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return F.linear(x, self.masked(self.weight, self.mask).chunk(2)[1])

    with torch.no_grad():
        got = found(joint, Cast(lambda w, m: w.masked_fill(m, 0.0)), torch.randn(3, 8))
    assert_text(
        got.run(rewrite_masked).text,
        """\
%0 = input(weight) : float32[4, 8]
%1 = input(mask) : bool[4, 8]
%2 = input(l_x_) : float32[3, 8]
%3 = logical_not(%1) : bool[4, 8]
%4 = split(%3, 2) : (bool[2, 8], bool[2, 8])
%5 = split(%0, 2) : (float32[2, 8], float32[2, 8])
%6 = getitem(%4, 1) : bool[2, 8]
%7 = getitem(%5, 1) : float32[2, 8]
%8 = convert_element_type(%7, bfloat16) : bfloat16[2, 8]
%9 = convert_element_type(%2, bfloat16) : bfloat16[3, 8]
%10 = permute(%8, [1, 0]) : bfloat16[8, 2]
%11 = permute(%6, [1, 0]) : bool[8, 2]
%12 = masked_mm(%9, %10, %11, None) : bfloat16[3, 2]
return [%12]""",
    )


def test_graph_of_a_convolution(joint):
    model = Layer(selected, (4, 2, 3), lambda x, w: F.conv1d(x, w, groups=2)).requires_grad_(False)
    got = found(joint, model, torch.randn(1, 4, 6, requires_grad=True))
    assert_text(
        got.run(rewrite_masked).text,
        """\
%0 = input(weight) : float32[4, 2, 3]
%1 = input(mask) : bool[4, 2, 3]
%2 = input(l_x_) : float32[1, 4, 6]
%3 = input() : float32[1, 4, 4]
%4 = masked_conv(%2, %0, %1, None, [1], [0], [1], 2) : float32[1, 4, 4]
%5 = masked_conv_grad_input(%3, %0, %1, [1, 4, 6], [1], [0], [1], 2) : float32[1, 4, 6]
return [%4, None, None, %5]""",
    )
    assert_text(
        got.run(inline_references).text,
        """\
%0 = input(weight) : float32[4, 2, 3]
%1 = input(mask) : bool[4, 2, 3]
%2 = input(l_x_) : float32[1, 4, 6]
%3 = input() : float32[1, 4, 4]
%4 = full([], 0.0, dtype=float32, device=cpu) : float32[]
%5 = where(%1, %0, %4) : float32[4, 2, 3]
%6 = convolution(%2, %5, None, [1], [0], [1], False, [0], 2) : float32[1, 4, 4]
%7 = convolution(%3, %5, None, [1], [0], [1], True, [0], 2) : float32[1, 4, 6]
return [%6, None, None, %7]""",
    )


def test_graph_of_what_is_dropped(joint):
    with torch.no_grad():
        got = found(joint, Layer(lambda w, m: w.masked_fill(m, 0)), torch.randn(3, 8))
    assert_text(
        got.run(rewrite_masked).text,
        """\
%0 = input(weight) : float32[4, 8]
%1 = input(mask) : bool[4, 8]
%2 = input(l_x_) : float32[3, 8]
%3 = logical_not(%1) : bool[4, 8]
%4 = permute(%0, [1, 0]) : float32[8, 4]
%5 = permute(%3, [1, 0]) : bool[8, 4]
%6 = masked_mm(%2, %4, %5, None) : float32[3, 4]
return [%6]""",
    )
    assert_text(
        got.run(inline_references).text,
        """\
%0 = input(weight) : float32[4, 8]
%1 = input(mask) : bool[4, 8]
%2 = input(l_x_) : float32[3, 8]
%3 = full([], 0.0, dtype=float32, device=cpu) : float32[]
%4 = where(%1, %3, %0) : float32[4, 8]
%5 = permute(%4, [1, 0]) : float32[8, 4]
%6 = mm(%2, %5) : float32[3, 4]
return [%6]""",
    )


# --- what it computes

MASKED = {
    "where": selected,
    "masked_fill": lambda w, m: w.masked_fill(~m, 0),
    "dropped": lambda w, m: torch.where(m, 0, w),
    "product": lambda w, m: w * m,
    "cast": lambda w, m: m.to(w.dtype) * w,
    "twice": lambda w, m: selected(selected(w, m), m.flip(0)),
}
PRODUCTS = {
    "linear": ((4, 8), F.linear, (3, 8)),
    "one row": ((4, 8), F.linear, (1, 8)),
    "3d": ((4, 8), F.linear, (2, 3, 8)),
    "[in, out]": ((8, 4), torch.matmul, (3, 8)),
    "[in, out], 3d": ((8, 4), torch.matmul, (2, 3, 8)),
    "1x1": ((4, 8, 1), lambda x, w: F.linear(x, w[:, :, 0]), (3, 8)),
    "part": ((12, 8), lambda x, w: F.linear(x, w.chunk(3)[1]), (3, 8)),
    "empty": ((4, 8), F.linear, (0, 8)),
    "conv1d": ((4, 8, 3), lambda x, w: F.conv1d(x, w, None, 2), (2, 8, 9)),
    "groups": ((8, 4, 3, 3), lambda x, w: F.conv2d(x, w, None, 1, 1, groups=2), (1, 8, 5, 4)),
    "depthwise": ((8, 1, 3), lambda x, w: F.conv1d(x, w, groups=8), (2, 8, 9)),
    "conv3d": ((4, 4, 2, 1, 2), lambda x, w: F.conv3d(x, w, dilation=2), (1, 4, 4, 4, 3)),
}
LINEAR = list(PRODUCTS)[:8]


def sparse_ops(got):
    return [n.target for n in got.gm.graph.nodes if ops.is_sparse_op(n.target)]


CASES = [(form, product) for form in MASKED for product in ("linear", "groups")]
CASES += [
    ("product" if i % 2 else "where", product)
    for i, product in enumerate(p for p in PRODUCTS if p not in ("linear", "groups"))
]


@pytest.mark.parametrize(("form", "product"), CASES)
def test_values(joint, form, product):
    shape, function, inner = PRODUCTS[product]
    model = Layer(MASKED[form], shape, function).double()
    x = torch.randn(inner, dtype=torch.float64, requires_grad=True)
    expected = joint(model, x).values()
    got = found(joint, model, x)
    assert got.run(rewrite_masked).modified
    convolutions = [ops.masked_conv, ops.masked_conv_grad_input, ops.conv_grad_weight]
    assert sparse_ops(got) == ([ops.masked_mm] * 2 if product in LINEAR else convolutions)
    torch.testing.assert_close(got.values(), expected)
    for function in (share_masks, cleanup, inline_references):
        got.run(function)
    assert not sparse_ops(got)
    torch.testing.assert_close(got.values(), expected)


def test_values_with_a_sampled_gradient(joint):
    model = Layer(selected).double()
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    config = SparseConfig(rules=[Rule("*", grad_weight=Sampled(0.5))], keep_output_dense=False)
    got = found(joint, model, x, config=config)
    expected = joint(model, x).values()
    got.run(rewrite_masked)
    got.run(rewrite_sampled)
    assert sparse_ops(got).count(ops.masked_mm) == 2
    assert ops.sampled_mm in sparse_ops(got)
    (y, gradients), (y_expected, expected_gradients) = got.values(), expected
    torch.testing.assert_close(y, y_expected)
    torch.testing.assert_close(gradients["l_x_"], expected_gradients["l_x_"])
    assert not gradients["weight"][~model.mask].any()
    assert not torch.allclose(gradients["weight"], expected_gradients["weight"])


def test_a_factor_that_is_a_scale_stays_one(joint):
    model = Layer(lambda w, m: w * m).double()
    model.mask = torch.randn(4, 8, dtype=torch.float64)
    model.mask[0, 0] = 0
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    expected = joint(model, x).values()
    got = found(joint, model, x)
    assert got.run(rewrite_masked).modified
    torch.testing.assert_close(got.values(), expected)


def test_nan_under_a_zero_shows_where_the_model_multiplies_and_not_where_it_selects(joint):
    for masked, shows in ((MASKED["product"], True), (MASKED["where"], False)):
        model = Layer(masked)
        with torch.no_grad():
            model.weight[~model.mask] = float("nan")
        x = torch.ones(3, 8)
        expected, _ = joint(model, x).values()
        got = found(joint, model, x)
        got.run(rewrite_masked)
        y, _ = got.values()
        assert bool(y.isnan().any()) == shows
        torch.testing.assert_close(y, expected, equal_nan=True)


def test_bits_may_flip_behind_the_graph(joint):
    model = Layer(selected)
    x = torch.randn(3, 8, requires_grad=True)
    got, dense = found(joint, model, x), joint(model, x)
    got.run(rewrite_masked)
    before = got.values()
    model.mask.logical_not_()
    torch.testing.assert_close(got.values(), dense.values())
    assert not torch.equal(got.values()[0], before[0])


def test_one_weight_with_two_uses_is_taken_apart_once(joint):
    class Twice(Layer):
        def forward(self, x):
            w = self.masked(self.weight, self.mask).to(torch.float64)
            return F.linear(F.linear(x, w), w)

    for form in ("where", "product"):
        model = Twice(MASKED[form], (8, 8))
        x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        expected = joint(model, x).values()
        got = found(joint, model, x)
        got.run(rewrite_masked)
        assert sparse_ops(got) == [ops.masked_mm] * 4
        calls = [n for n in got.gm.graph.nodes if n.target is ops.masked_mm]
        assert len({peel(n.args[1])[0] for n in calls}) == 1
        assert len({peel(n.args[2])[0] for n in calls}) == 1
        torch.testing.assert_close(got.values(), expected)


def test_symbolic_sizes(joint):
    model = Layer(selected)
    x = torch.randn(3, 8, requires_grad=True)
    expected = joint(model, x).values()
    got = found(joint, model, x, dynamic=True)
    got.run(rewrite_masked)
    assert sparse_ops(got) == [ops.masked_mm] * 2
    torch.testing.assert_close(got.values(), expected)


# --- what it leaves alone


def test_a_forward_that_is_not_planned_as_masked(joint):
    model = Layer(selected)
    got = found(joint, model, torch.randn(3, 8))
    for node in got.gm.graph.nodes:
        if (plan := plan_of(node)) is not None:
            node.meta[PLAN] = plan.decided(replace(plan.decision, pattern=Dense()))
    assert not got.run(rewrite_masked).modified


def test_a_product_whose_weight_is_read_past_its_mask(joint):
    for model, x in (
        (nn.Linear(8, 4), torch.randn(3, 8)),
        (nn.Conv1d(8, 4, 3), torch.randn(1, 8, 5)),
    ):
        got = found(joint, model, x.requires_grad_())
        for node in got.gm.graph.nodes:
            plan = plan_of(node)
            if plan is not None and plan.site.role != "grad_weight":
                node.meta[PLAN] = plan.decided(replace(plan.decision, pattern=Masked()))
        result = got.run(rewrite_masked)
        assert not result.modified
        assert set(result.skipped.values()) == {
            "its weight is not read through the mask that its forward reads"
        }
        assert len(result.skipped) == 2


def test_a_graph_without_masks(joint):
    got = found(joint, nn.Linear(8, 4), torch.randn(3, 8))
    assert not got.run(rewrite_masked).modified
    assert all(plan.decision.dense for plan in plans(got.gm))
