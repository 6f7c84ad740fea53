"""share_masks: each mask is made once, and nothing else changes."""

import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn import functional as F

from sparsefx import ops
from sparsefx.config import NM, Rule, SparseConfig
from sparsefx.passes import rewrite_nm, share_masks
from sparsefx.testing import run_pass, traced


def masks_in(gm):
    return sum(n.target is ops.nm_mask for n in gm.graph.nodes)


def rewritten(joint, every, model, x, pattern=None):
    found = joint(model, x).find(every(pattern or NM(2, 4)))
    found.run(rewrite_nm)
    return found


def shared_equals_before(found):
    before = found.values()
    result = found.run(share_masks)
    torch.testing.assert_close(found.values(), before)
    return result


def test_graph(joint, every):
    x = torch.randn(3, 8, requires_grad=True)
    found = rewritten(joint, every, nn.Linear(8, 4, bias=False), x)
    assert_text(
        shared_equals_before(found).text,
        """\
%0 = input(weight) : float32[4, 8]
%1 = input(l_args_0_) : float32[3, 8]
%2 = input() : float32[3, 4]
%3 = permute(%0, [1, 0]) : float32[8, 4]
%4 = nm_mask(%0, 2, 4, 1, False) : bool[4, 8]
%5 = permute(%4, [1, 0]) : bool[8, 4]
%6 = masked_mm(%1, %3, %5, None) : float32[3, 4]
%7 = permute(%2, [1, 0]) : float32[4, 3]
%8 = mm(%7, %1) : float32[4, 8]
%9 = permute(%8, [1, 0]) : float32[8, 4]
%10 = permute(%3, [1, 0]) : float32[4, 8]
%11 = masked_mm(%2, %10, %4, None) : float32[3, 8]
%12 = permute(%9, [1, 0]) : float32[4, 8]
return [%6, %12, %11]""",
    )


def test_a_mask_with_one_use_stays_inside_the_product(joint, every):
    found = rewritten(joint, every, nn.Linear(8, 4), torch.randn(3, 8))
    result = found.run(share_masks)
    assert not result.modified
    assert "nm_mm" in result.text


def test_equal_masks_become_one():
    def twice(x, w):
        return F.linear(x, w), F.linear(x + 1, w)

    x, w = torch.randn(3, 8), torch.randn(4, 8)
    for plan in (NM(2, 4), NM(2, 4, transposable=True)):
        gm = traced(twice, x, w, plan=plan)
        run_pass(rewrite_nm, gm)
        before = gm(x, w)
        assert run_pass(share_masks, gm).modified
        assert masks_in(gm) == 1
        torch.testing.assert_close(gm(x, w), before)


def test_masks_of_another_pattern_axis_or_weight_stay_apart(joint):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x).tanh()).tanh())

    rules = [Rule("a", NM(2, 4)), Rule("b", NM(1, 4), grad_input=NM(1, 4)), Rule("c", NM(2, 4))]
    found = joint(Model(), torch.randn(3, 8, requires_grad=True))
    found.find(SparseConfig(rules=rules, keep_output_dense=False))
    found.run(rewrite_nm)
    shared_equals_before(found)
    # a and c in forward and backward; b's two masks have one use each and stay in the products
    assert masks_in(found.gm) == 2
    assert sum(n.target is ops.nm_mm for n in found.gm.graph.nodes) == 2


def test_convolutions(joint, every):
    model = nn.Conv1d(8, 4, 3, groups=2)
    for pattern in (NM(2, 4), NM(1, 2, True), NM(2, 4, weight_grad="masked", decay=0.1)):
        found = rewritten(joint, every, model, torch.randn(2, 8, 6, requires_grad=True), pattern)
        result = shared_equals_before(found)
        assert masks_in(found.gm) == 1
        assert "masked_conv(" in result.text
        assert "masked_conv_grad_input(" in result.text


def test_the_epilogue_of_the_weight_gradient_shares_too(joint, every):
    pattern = NM(2, 4, weight_grad="masked", decay=0.1)
    x = torch.randn(3, 8, requires_grad=True)
    found = rewritten(joint, every, nn.Linear(8, 4), x, pattern)
    shared_equals_before(found)
    assert masks_in(found.gm) == 1


def test_a_graph_without_masks():
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))
    found = run_pass(share_masks, gm)
    assert (found.modified, found.diff) == (False, "")


def test_where_a_kernel_makes_masks_in_registers_they_stay_there(joint, every, monkeypatch):
    found = rewritten(joint, every, nn.Linear(8, 4), torch.randn(3, 8, requires_grad=True))
    monkeypatch.setattr(ops, "has_kernel", lambda op, device: op is ops.nm_mm)
    assert not found.run(share_masks).modified
