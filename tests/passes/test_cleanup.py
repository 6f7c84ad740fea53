"""cleanup: what canonicalize split for nothing is joined again."""

# ruff: noqa: E501  # golden text
import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn

from sparsefx.config import NM, Dense, Sampled
from sparsefx.passes import canonicalize, cleanup, find_sites, rewrite_nm, rewrite_sampled
from sparsefx.testing import run_pass, traced

PATTERNS = [Dense(), NM(2, 4), Sampled(0.5)]


def conv():
    return nn.Conv1d(8, 4, 3, bias=False)


def test_graph(joint, every):
    found = joint(conv(), torch.randn(2, 8, 6, requires_grad=True)).find(every(Dense()))
    assert_text(
        found.run(cleanup).text,
        """\
%0 = input(weight) : float32[4, 8, 3]
%1 = input(l_args_0_) : float32[2, 8, 6]
%2 = input() : float32[2, 4, 4]
%3 = convolution(%1, %0, None, [1], [0], [1], False, [0], 1) : float32[2, 4, 4]
%4 = convolution_backward(%2, %1, %0, None, [1], [0], [1], False, [0], 1, [True, True, False]) : (float32[2, 8, 6], float32[4, 8, 3], NoneType)
%5 = getitem(%4, 0) : float32[2, 8, 6]
%6 = getitem(%4, 1) : float32[4, 8, 3]
return [%3, %6, %5]""",
    )


def test_graph_of_a_lone_half(joint, every):
    found = joint(conv(), torch.randn(2, 8, 6, requires_grad=True)).find(every(NM(2, 4)))
    found.run(rewrite_nm)
    assert_text(
        found.run(cleanup).text,
        """\
%0 = input(weight) : float32[4, 8, 3]
%1 = input(l_args_0_) : float32[2, 8, 6]
%2 = input() : float32[2, 4, 4]
%3 = nm_conv(%1, %0, None, [1], [0], [1], 1, 2, 4, 1, False) : float32[2, 4, 4]
%4 = nm_conv_grad_input(%2, %0, [2, 8, 6], [1], [0], [1], 1, 2, 4, 1, False) : float32[2, 8, 6]
%5 = empty([], dtype=float32, layout=torch.strided, device=cpu, pin_memory=False) : float32[]
%6 = expand(%5, [4, 8, 3]) : float32[4, 8, 3]
%7 = convolution_backward(%2, %1, %6, None, [1], [0], [1], False, [0], 1, [False, True, False]) : (NoneType, float32[4, 8, 3], NoneType)
%8 = getitem(%7, 1) : float32[4, 8, 3]
return [%3, %8, %4]""",
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("asks", [False, True])
def test_values(joint, every, pattern, asks):
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 2, dilation=2)
    ).double()
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64, requires_grad=asks)
    found = joint(model, x).find(every(pattern))
    found.run(rewrite_nm)
    found.run(rewrite_sampled)
    before = found.values()
    text = found.run(cleanup).text
    torch.testing.assert_close(found.values(), before)
    dense = [line for line in text.splitlines() if " conv_grad_" in line]
    assert dense == []


def test_a_dense_graph_gets_its_products_back(joint, every):
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Conv1d(8, 4, 3))
    found = joint(model, torch.randn(2, 4, 9, requires_grad=True))
    original = [str(n.target) for n in found.gm.graph.nodes]
    count = original.count("aten.convolution_backward.default")
    assert count == 2
    found.find(every(Dense()))
    found.run(cleanup)
    targets = [str(n.target) for n in found.gm.graph.nodes]
    assert targets.count("aten.convolution_backward.default") == count


def test_a_symbolic_batch(joint, every):
    model, x = conv().double(), torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    for pattern in PATTERNS:
        found = joint(model, x, dynamic=True).find(every(pattern))
        found.run(rewrite_nm)
        found.run(rewrite_sampled)
        before = found.values()
        found.run(cleanup)
        torch.testing.assert_close(found.values(), before)


def test_nothing_to_do():
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))
    for function in (canonicalize, find_sites, cleanup):
        found = run_pass(function, gm)
    assert (found.modified, found.diff) == (False, "")
