"""sum_rows: a bias's gradient is summed along memory, and only where that is known to help."""

import pytest
import torch
from torch import nn

from sparsefx import ops
from sparsefx.config import NM, Dense, Sampled
from sparsefx.passes import rewrite_nm, rewrite_sampled, sum_rows
from sparsefx.testing import run_pass, traced

aten = torch.ops.aten


def graph_of(reduce, g):
    """A gradient that a sampled product reads, directly and transposed, and a sum of it."""

    def function(g, w, picked):
        return ops.sampled_mm_grad_input(g, w, picked), reduce(g)

    return traced(function, g, torch.randn(4, g.shape[1]), torch.arange(2))


@pytest.mark.parametrize("keepdim", [True, False])
def test_graph(keepdim):
    gm = graph_of(lambda g: g.sum(0, keepdim), torch.randn(1024, 512))
    found = run_pass(sum_rows, gm)
    lines = [line for line in found.diff.splitlines() if line[0] in "+-" and "sum" in line]
    assert "sum_rows(%0, False)" in lines[-1]
    assert "sum(%0, [0]" in lines[0]
    assert gm.graph.output_node().args[0][1].meta["val"].shape == ((1, 512) if keepdim else (512,))


@pytest.mark.parametrize("pattern", [Sampled(0.5), NM(2, 4)], ids=["sampled", "nm"])
@pytest.mark.parametrize("rows", [1024, 1033])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values(joint, every, pattern, rows, dtype):
    x = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    found = joint(nn.Linear(8, 512).to(dtype), x).find(every(pattern))
    found.run(rewrite_nm)
    found.run(rewrite_sampled)
    y, before = found.values()
    assert found.run(sum_rows).modified
    z, after = found.values()
    assert torch.equal(y, z)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)  # sums of a thousand


def test_what_no_sparse_op_reads_is_left_alone(joint, every):
    x = torch.randn(1024, 8, requires_grad=True)
    found = joint(nn.Linear(8, 512), x).find(every(Dense()))
    result = found.run(sum_rows)
    assert not result.modified
    assert result.skipped == {}


@pytest.mark.parametrize(
    ("reduce", "g", "reason"),
    [
        (lambda g: g.sum(1), torch.randn(1024, 512), "not a sum over the rows of a matrix"),
        (lambda g: g.sum([0, 1]), torch.randn(1024, 512), "not a sum over the rows of a matrix"),
        (
            lambda g: g.sum(0, dtype=torch.float64),
            torch.randn(1024, 512),
            "not a sum over the rows of a matrix",
        ),
        (
            lambda g: g.sum(0),
            torch.randn(1024, 512).bfloat16(),
            "torch.bfloat16 on cpu: sum_rows is for float32 and float64 on CPU",
        ),
        (
            lambda g: g.sum(0),
            torch.randn(1023, 512),
            "1023 x 512: not known to have 524288 elements",
        ),
    ],
)
def test_other_sums(reduce, g, reason):
    found = run_pass(sum_rows, graph_of(reduce, g))
    assert not found.modified
    assert list(found.skipped.values()) == [reason]


def test_batches_of_a_size_not_known_yet_are_summed_as_they_were(joint, every):
    x = torch.randn(1024, 8, requires_grad=True)
    found = joint(nn.Linear(8, 512), x, dynamic=True).find(every(Sampled(0.5)))
    found.run(rewrite_sampled)
    (reason,) = found.run(sum_rows).skipped.values()
    assert reason.endswith("x 512: not known to have 524288 elements")


def test_an_excluded_sum_is_left_alone():
    gm = graph_of(lambda g: g.sum(0), torch.randn(1024, 512))
    (node,) = [n for n in gm.graph.nodes if n.target is aten.sum.dim_IntList]
    assert not sum_rows(gm, excluded={node.name}).modified
    assert sum_rows(gm).modified
