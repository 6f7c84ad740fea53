"""canonicalize: every product gets a node of its own, and computes what it did."""

import itertools
import math
from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn

from sparsefx.passes import canonicalize
from sparsefx.testing import run_pass, traced

aten = torch.ops.aten


def run(function, *args):
    """Trace, run the pass twice; the second must change nothing."""
    gm = traced(function, *args)
    found = run_pass(canonicalize, gm)
    again = run_pass(canonicalize, gm)
    assert (again.modified, again.diff) == (False, "")
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return gm, found, tensors


def test_the_linear_layer_s_addmm_stays():
    args = torch.randn(5), torch.randn(3, 8), torch.randn(8, 5)
    _, found, _ = run(torch.addmm, *args)
    assert not found.modified
    assert found.diff == ""


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [
        ((5,), {"alpha": 2}, """mm(%1, %2)|mul(%3, 2)|add(%4, %0)"""),
        ((5,), {"beta": 3}, """mm(%1, %2)|mul(%0, 3)|add(%3, %4)"""),
        ((5,), {"alpha": 2, "beta": 3}, """mm(%1, %2)|mul(%3, 2)|mul(%0, 3)|add(%4, %5)"""),
        ((3, 5), {}, """mm(%1, %2)|add(%3, %0)"""),
        ((1, 5), {}, """mm(%1, %2)|add(%3, %0)"""),
        ((3, 1), {"alpha": 0.5}, """mm(%1, %2)|mul(%3, 0.5)|add(%4, %0)"""),
        ((1,), {}, """mm(%1, %2)|add(%3, %0)"""),
        ((), {}, """mm(%1, %2)|add(%3, %0)"""),
    ],
)
def test_addmm(shape, options, text):
    args = torch.randn(shape), torch.randn(3, 8), torch.randn(8, 5)
    gm, found, _ = run(partial(torch.addmm, **options), *args)
    assert found.modified
    lines = [line.split(" = ")[1].split(" :")[0] for line in found.text.splitlines()[3:-1]]
    assert "|".join(lines) == text
    torch.testing.assert_close(gm(*args), torch.addmm(*args, **options))


def test_beta_0_does_not_read_the_bias():
    args = torch.full((3, 5), math.nan), torch.randn(3, 8), torch.randn(8, 5)
    gm, _, _ = run(partial(torch.addmm, beta=0), *args)
    torch.testing.assert_close(gm(*args), args[1] @ args[2])


@pytest.mark.parametrize("options", [{}, {"alpha": 2}, {"beta": 3, "alpha": 0.5}, {"beta": 0}])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 3, 1), (2, 1, 5), (5,)])
def test_baddbmm(shape, options):
    args = torch.randn(shape), torch.randn(2, 3, 8), torch.randn(2, 8, 5)
    gm, found, _ = run(partial(torch.baddbmm, **options), *args)
    assert "baddbmm" not in found.text
    assert "bmm(%1, %2) : float32[2, 3, 5]" in found.text
    torch.testing.assert_close(gm(*args), torch.baddbmm(*args, **options))


def backward(where, groups, mask, grad, x, w):
    zeros = [0] * len(where[0])
    parts = aten.convolution_backward(
        grad, x, w, [w.shape[0]], *where, False, zeros, groups, list(mask)
    )
    return tuple(part for part, asked in zip(parts, mask, strict=True) if asked)


def test_graph_of_convolution_backward():
    grad, x, w = torch.randn(2, 4, 6), torch.randn(2, 8, 8), torch.randn(4, 8, 3)
    where = ([1], [0], [1])
    _, found, _ = run(partial(backward, where, 1, (True, True, True)), grad, x, w)
    assert_text(
        found.text,
        """\
%0 = input() : float32[2, 4, 6]
%1 = input() : float32[2, 8, 8]
%2 = input() : float32[4, 8, 3]
%3 = conv_grad_input(%0, %2, [2, 8, 8], [1], [0], [1], 1) : float32[2, 8, 8]
%4 = conv_grad_weight(%0, %1, [4, 8, 3], [1], [0], [1], 1) : float32[4, 8, 3]
%5 = sum(%0, [0, 2]) : float32[4]
return [%3, %4, %5]""",
    )


@pytest.mark.parametrize("mask", [m for m in itertools.product([False, True], repeat=3) if any(m)])
@pytest.mark.parametrize(
    ("x", "w", "where", "groups"),
    [
        ((2, 8, 9), (4, 8, 3), ([2], [1], [1]), 1),
        ((2, 8, 7, 6), (6, 4, 3, 2), ([1, 2], [1, 0], [2, 1]), 2),
        ((2, 4, 6, 5), (8, 1, 3, 3), ([1, 1], [1, 1], [1, 1]), 4),
        ((1, 4, 4, 4, 3), (2, 4, 2, 1, 2), ([1, 2, 1], [0, 1, 0], [1, 1, 1]), 1),
    ],
    ids=["1d", "groups", "depthwise", "3d"],
)
def test_convolution_backward(x, w, where, groups, mask):
    x, w = torch.randn(x), torch.randn(w)
    y = aten.convolution(x, w, None, *where, False, [0] * len(where[0]), groups)
    args = torch.randn_like(y), x, w
    function = partial(backward, where, groups, mask)
    gm, found, _ = run(function, *args)
    assert ("conv_grad_input" in found.text) is mask[0]
    assert ("conv_grad_weight" in found.text) is mask[1]
    assert "convolution_backward" not in found.text
    torch.testing.assert_close(gm(*args), function(*args))


def test_a_transposed_convolution_is_left_alone(joint):
    found = joint(nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 5, requires_grad=True))
    result = found.run(canonicalize)
    assert not result.modified
    assert set(result.skipped.values()) == {"transposed convolution"}


def test_excluded_nodes_are_left_alone():
    gm = traced(partial(torch.addmm, alpha=2), torch.randn(5), torch.randn(3, 8), torch.randn(8, 5))
    (name,) = (n.name for n in gm.graph.nodes if n.target is aten.addmm.default)
    assert not run_pass(partial(canonicalize, excluded=[name]), gm).modified
    assert run_pass(canonicalize, gm).modified


def test_a_symbolic_batch(joint):
    model, x = nn.Conv1d(4, 6, 3), torch.randn(2, 4, 5, requires_grad=True)
    found = joint(model, x, dynamic=True)
    before = found.values()
    assert "conv_grad_input" in found.run(canonicalize).text
    after = found.values()
    torch.testing.assert_close(after, before)


def test_provenance_travels(joint):
    gm = joint(nn.Conv1d(4, 6, 3), torch.randn(2, 4, 5, requires_grad=True)).gm
    canonicalize(gm)
    new = [n for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "sparsefx"]
    assert len(new) == 2
    for node in new:
        assert node.meta["partitioner_tag"] == "is_backward"
        assert "seq_nr" in node.meta
