"""inline_references: ATen in an op's place, with the same values; what has to stay a call."""

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn import functional as F

from sparsefx import ops
from sparsefx.config import NM, Dense, Sampled
from sparsefx.passes import cleanup, inline_references, rewrite_nm, rewrite_sampled, share_masks
from sparsefx.testing import run_pass, traced


def sparse_ops(gm):
    return {n.target for n in gm.graph.nodes if ops.is_sparse_op(n.target)}


def test_graph():
    plan = NM(2, 4, transposable=True)
    gm = traced(F.linear, torch.randn(3, 8), torch.randn(4, 8), torch.randn(4), plan=plan)
    run_pass(rewrite_nm, gm)
    assert_text(
        run_pass(inline_references, gm).text,
        """\
%0 = input() : float32[3, 8]
%1 = input() : float32[4, 8]
%2 = input() : float32[4]
%3 = permute(%1, [1, 0]) : float32[8, 4]
%4 = nm_mask(%1, 2, 4, 1, True) : bool[4, 8]
%5 = permute(%4, [1, 0]) : bool[8, 4]
%6 = full([], 0, dtype=float32, layout=torch.strided, device=cpu, pin_memory=False) : float32[]
%7 = where(%5, %3, %6) : float32[8, 4]
%8 = addmm(%2, %0, %7) : float32[3, 4]
return %8""",
    )


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4, decay=0.1), Sampled(0.5)], ids=repr)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), (3, 8)),
        (lambda: nn.Conv2d(8, 4, 3, groups=2, stride=2), (2, 8, 5, 4)),
    ],
    ids=["mlp", "conv"],
)
def test_values(joint, every, make, shape, pattern):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = joint(make().double(), x).find(every(pattern))
    for function in (rewrite_nm, rewrite_sampled, share_masks, cleanup):
        found.run(function)
    before = found.values()
    assert sparse_ops(found.gm)
    result = found.run(inline_references)
    assert result.modified
    assert not sparse_ops(found.gm)
    torch.testing.assert_close(found.values(), before)


def test_gradients_of_their_own(joint, every):
    x = torch.randn(4, 8, 6, dtype=torch.float64, requires_grad=True)
    found = joint(nn.Conv1d(8, 4, 3).double(), x)
    found.find(every(Dense(), grad_input=Sampled(0.5), grad_weight=Sampled(0.5)))
    found.run(rewrite_sampled)
    before = found.values()
    found.run(inline_references)
    assert not sparse_ops(found.gm)
    torch.testing.assert_close(found.values(), before)


def test_batches_and_symbolic_sizes(joint, every):
    class Product(nn.Module):
        def forward(self, a, b):
            return a @ b

    a = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    for dynamic in (False, True):
        found = joint(Product(), a, b, dynamic=dynamic).find(every(Sampled(0.5)))
        found.run(rewrite_sampled)
        before = found.values()
        found.run(inline_references)
        assert not sparse_ops(found.gm)
        torch.testing.assert_close(found.values(), before)


def test_a_transposable_mask_stays_a_call():
    plan = NM(2, 4, transposable=True)
    gm = traced(F.linear, torch.randn(3, 8), torch.randn(4, 8), plan=plan)
    run_pass(rewrite_nm, gm)
    found = run_pass(inline_references, gm)
    assert list(found.skipped.values()) == ["the reference loops over values"]
    assert sparse_ops(gm) == {ops.nm_mask}
    again = run_pass(inline_references, gm)
    assert (again.modified, again.diff) == (False, "")


def test_where_the_device_has_a_kernel_the_op_stays(monkeypatch):
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5), plan=NM(2, 4))
    run_pass(rewrite_nm, gm)
    monkeypatch.setattr(ops, "has_kernel", lambda op, device: True)
    found = run_pass(inline_references, gm)
    assert list(found.skipped.values()) == ["the device has a kernel"]
    assert not found.modified


def test_a_graph_without_sparse_ops():
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))
    assert not run_pass(inline_references, gm).modified
