"""Pieces and headers without processes: what travels, and what ranks conclude from the sums."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx.distributed import SampledAllreduceState, Traffic, sampled_allreduce_hook
from sparsefx.distributed.parcel import Part, Whole, header_of, parts_of, read_header
from sparsefx.distributed.plan import Finder, Plan, Sliced
from sparsefx.distributed.slices import Cut
from sparsefx.distributed.traffic import AllreduceReport


def entry(axis: int, groups: int, depth: int, *chosen: list[int], name: str = "w") -> Sliced:
    """A parameter whose levels are fixed indices of each group."""
    levels = []
    for indices in chosen:
        found = torch.tensor([indices] * groups)
        cut: Any = Cut(lambda k, found=found: found, (), len(indices), "code")  # type: ignore[arg-type]
        levels.append([Finder(cut, (), len(indices), f"code {name}")])
    return Sliced(name, axis, groups, depth, levels)


def part(grad: Tensor, sliced: Sliced) -> Part:
    return Part(grad, sliced, tuple(sliced.indices(i) for i in range(len(sliced.levels))))


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_put_undoes_piece_and_missing_sees_every_value(data: st.DataObject):
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    shape = [groups * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))]
    shape += data.draw(st.lists(st.integers(1, 3), max_size=2))
    axis = 1 if groups > 1 else data.draw(st.integers(0, 1))
    chosen = data.draw(st.sets(st.integers(0, shape[axis] - 1), min_size=1))
    grad = torch.zeros(shape)
    sliced = part(grad, entry(axis, groups, shape[axis], sorted(chosen)))
    inside = torch.randn(sliced.piece().shape)
    sliced.put(inside)
    assert torch.equal(sliced.piece(), inside)
    assert not sliced.missing()[0]
    assert grad.count_nonzero() == inside.numel()
    where = [data.draw(st.integers(0, size - 1)) for size in shape]
    grad[tuple(where)] = data.draw(st.sampled_from([1e-30, float("nan"), float("-inf"), -2.0]))
    assert bool(sliced.missing()[0]) == (where[axis] not in chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranks", [2, 300])
def test_what_ranks_conclude(dtype: torch.dtype, ranks: int):
    """In bfloat16 a sum of ones stops at 256: only whether it is zero counts."""
    sliced = entry(1, 1, 6, [0, 1], [0, 1, 2])
    grads = [torch.zeros(4, 6) for _ in range(ranks)]
    for grad in grads:
        grad[:, :2] = 1
    assert said(grads, sliced, dtype) == ([0], [False], False, False)
    grads[-1][3, 2] = 1e-20
    assert said(grads, sliced, dtype) == ([1], [True], False, False)
    assert said(grads, sliced, dtype, level=1) == ([1], [False], False, False)
    grads[0][0, 5] = float("nan")
    assert said(grads, sliced, dtype) == ([2], [True], False, False)
    assert said(grads, sliced, dtype, level=2) == ([2], [False], False, False)
    assert said(grads, sliced, dtype, level=2, stale=True)[3]


def said(
    grads: list[Tensor], sliced: Sliced, dtype: torch.dtype, level: int = 0, stale: bool = False
) -> tuple[Any, ...]:
    """What one rank reads from the sum of all headers."""
    sliced.level = level
    like = torch.zeros(0, dtype=dtype)
    headers = [header_of([part(g, sliced)], stale and i == 0, like) for i, g in enumerate(grads)]
    total = headers[0]
    for header in headers[1:]:
        total = total + header
    answer = read_header(total, [part(grads[0], sliced)])
    return answer.needed, answer.short, answer.differ, answer.stale


@given(st.sets(st.integers(0, 40), min_size=3, max_size=3), st.sets(st.integers(0, 40), min_size=3))
@settings(deadline=None, max_examples=40)
def test_ranks_that_choose_differently_see_it(one: set[int], other: set[int]):
    grad = torch.zeros(2, 41)
    parts = [part(grad, entry(1, 1, 41, sorted(list(found)[:3]))) for found in (one, other)]
    total = sum(header_of([each], False, grad) for each in parts)
    same = sorted(one) == sorted(list(other)[:3])
    for each in parts:  # both sides conclude the same
        answer = read_header(total, [each])
        assert answer.differ is not same
        assert answer.short == [not same]
        assert answer.needed == [0 if same else 1]


def test_gradients_lie_in_their_parameters_layout():
    """DDP copies a gradient into its bucket by the parameter's strides."""
    shapes = [(3, 4, 2, 2), (5, 6), (0, 3), (1, 7)]
    params = [torch.randn(shape) for shape in shapes]
    params[0] = params[0].contiguous(memory_format=torch.channels_last)
    params[1] = params[1].t()
    params.append(torch.randn(4, 4)[:, ::2])  # has holes: it lies as if contiguous
    buffer = torch.cat([dense_order(p) for p in params])
    splits = buffer.split([p.numel() for p in params])
    flat = [piece.view(p.shape) for piece, p in zip(splits, params, strict=True)]
    bucket = SimpleNamespace(
        buffer=lambda: buffer, gradients=lambda: flat, parameters=lambda: params
    )
    for found, param in zip(parts_of(bucket, {}), params, strict=True):
        assert isinstance(found, Whole)
        assert torch.equal(found.grad, param)


def dense_order(param: Tensor) -> Tensor:
    """Values as they lie in memory, where they fill it."""
    if param.dim() == 4:
        return param.permute(0, 2, 3, 1).reshape(-1)
    return param.t().reshape(-1) if param.shape == (6, 5) else param.reshape(-1)


def test_ranks_that_compiled_differently_send_in_full():
    mine = Plan({1: entry(1, 1, 6, [0]), 2: entry(1, 1, 6, [0], name="v")})
    other = Plan({1: entry(1, 1, 6, [0, 1]), 2: entry(1, 1, 6, [0], name="v")})
    mine.keep_agreed([mine.signatures(), other.signatures()])
    assert [found.name for found in mine.sliced.values()] == ["v"]
    assert mine.whole == {"w": "the ranks compiled it differently"}
    mine.keep_agreed([mine.signatures(), {}])
    assert mine.sliced == {}


def test_report():
    traffic = Traffic()
    traffic.begin_step()
    traffic.sent(1000)
    traffic.dense(4000)
    sliced = entry(1, 1, 6, [0, 1])
    report = AllreduceReport(traffic, {"w": sliced.describe()}, {"out.v": "why"})
    assert str(report).splitlines() == [
        "1 steps, 0 buckets sent again in full",
        "last step  1,000 bytes sent of 4,000 dense (25.0%)",
        "in total   1,000 bytes sent of 4,000 dense (25.0%)",
        "  w      2 of 6 slices along axis 1",
        "  out.v  in full: why",
    ]
    sliced.level = 1
    assert sliced.describe() == "in full at present: 2 of 6 slices along axis 1 don't hold it"
    assert "dense" in str(AllreduceReport(Traffic()))


def test_refusals():
    for compress in (torch.int8, "bf16"):
        with pytest.raises(sfx.SparsefxError, match="must be None or a floating-point dtype"):
            SampledAllreduceState(nn.Linear(2, 2), compress=compress)
    with pytest.raises(sfx.ConfigError, match=r"must be an nn.Module; give a compiled function"):
        SampledAllreduceState(torch.sin)  # type: ignore[arg-type]
    state = SampledAllreduceState(nn.Linear(2, 2))
    assert (state.bytes_sent, state.bytes_dense) == (0, 0)
    assert state.report().sliced == {}
    with pytest.raises(sfx.SparsefxError, match="python_reducer"):
        sampled_allreduce_hook(state, (torch.zeros(2), torch.zeros(2)))  # type: ignore[arg-type]
