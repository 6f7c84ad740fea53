"""Column-row sampling on a CUDA device: a forward, a sampled weight gradient, gathers alone.

    python benchmarks/device_sampled.py crs_fwd|crs_wgrad_train|gather_gemm [--seconds 60]

Operands are random normal, their columns then scaled to sizes from 1 to e, no two alike: the order
of the scores is the same in every sum, so that all contestants take the same pairs, and values can
be compared. Norms, choice and gathers are inside every time.
"""

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import sparsefx as sfx
from sparsefx import ops

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

import gpu
from cases import (
    SEEN,
    Case,
    Contestant,
    Field,
    Goal,
    Setting,
    judged,
    missing,
    off,
    product64,
    tried,
)
from lin24 import layer_of
from linear import ColumnRowLinear, step

DENSE, COMPILED = "dense, eager", "dense, torch.compile"
RATIOS = (0.1, 0.3, 0.5)


def columns(s: Setting, rows: int, depth: int, slope: float) -> Tensor:
    """[rows, depth] whose columns' norms lie exactly between 1 and e**slope, shuffled."""
    x = s.randn(rows, depth, dtype=torch.float32)
    size = torch.linspace(0, slope, depth, device=s.device).exp()
    size = size[torch.randperm(depth, generator=torch.Generator().manual_seed(1)).to(s.device)]
    return (x * size / x.norm(dim=0) * rows**0.5).bfloat16()


def compiled(layer: nn.Linear, s: Setting, **sampled: sfx.Sampled) -> Any:
    rule = sfx.Rule("*", **sampled)
    config = sfx.SparseConfig([rule], keep_output_dense=False, strict=True, codegen=s.codegen)
    return torch.compile(layer, backend="sparsefx", options={"config": config}, dynamic=False)


def strongest(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, float]:
    """The k columns of the largest |x_i| |w_i|, and their share of the sum."""
    scores = x.double().norm(dim=0) * w.double().norm(dim=0)
    top = scores.topk(k)
    return top.indices, float(top.values.sum() / scores.sum())


# --- crs_fwd

OURS = "sparsefx, forward sampled"
LIMITS = {  # x dense of a pre-gather with norms for free, at 790 TFLOP/s and 4.3 TB/s
    4096: {0.1: 4.90, 0.3: 2.27, 0.5: 1.48},
    8192: {0.1: 8.35, 0.3: 2.96, 0.5: 1.80},
}
WANTED = {4096: {0.1: 4.1, 0.3: 1.9, 0.5: 1.25}, 8192: {0.1: 7.1, 0.3: 2.5, 0.5: 1.53}}


def by_hand(x: Tensor, w: Tensor, bias: Tensor, k: int) -> Tensor:
    """Adelman et al. (2021), as ColumnRowLinear's forward does it."""
    scores = x.norm(dim=0, dtype=torch.float32) * w.norm(dim=0, dtype=torch.float32)
    picked = scores.topk(k).indices
    return torch.addmm(bias, x.index_select(1, picked), w.index_select(1, picked).t())


def forward(size: int, ratio: float, s: Setting) -> Field:
    x, w = columns(s, size, size, 1.0), columns(s, size, size, 0.0)
    k = max(1, int(ratio * size))
    bias, notes = x.new_zeros(size), []
    picked, kept = strongest(x, w, k)
    dense, twin = product64(x, w), product64(x[:, picked], w[:, picked])
    ours = compiled(layer_of(w), s, forward=sfx.Sampled(ratio, inference=True))
    works = {
        DENSE: partial(linear, x, w),
        COMPILED: partial(s.compile(linear), x, w),
        "by hand, eager": partial(ColumnRowLinear.apply, x, w, bias, k),
        "by hand, torch.compile": partial(s.compile(by_hand), x, w, bias, k),
        OURS: partial(_inference, ours, x),
    }
    field = []
    for name, work in works.items():
        one = Contestant(name, work, dense=name.startswith("dense"), ours=name == OURS)
        if not one.dense:
            one.kept, one.limit = kept, LIMITS.get(size, {}).get(ratio, 1 / ratio)
        if judged(one, work(), dense if one.dense else twin, dense, size, notes):
            field.append(one)
    wanted = WANTED.get(size, {}).get(ratio)
    return Field(field, [Goal(OURS, wanted)] if wanted else [], notes)


def _inference(call: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(x)


def forward_cases(s: Setting) -> list[Case]:
    shapes = [(size, ratio) for ratio in (0.3, 0.1, 0.5) for size in (8192, 4096)]
    shapes = [(48, 0.3)] if s.dry else shapes
    return [Case(f"{size} cubed, ratio {r}", partial(forward, size, r)) for size, r in shapes]


# --- crs_wgrad_train: the tokens of the weight's gradient are sampled, the rest is exact

MEMORY = "sparsefx, grad_weight sampled"


class RowsLinear(torch.autograd.Function):
    """x @ w.T whose weight gradient sees k rows, drawn by their norm in the forward and scaled.

    Adelman et al. (2021); WTA-CRS takes the strongest without a draw on top.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, k: int) -> Tensor:
        p = x.norm(dim=1, dtype=torch.float32)
        p = p / p.sum()
        picked = torch.multinomial(p, k, replacement=True)
        scale = (1 / (k * p[picked])).to(x.dtype).unsqueeze(1)
        ctx.save_for_backward(x.index_select(0, picked) * scale, picked, w)
        return linear(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        xs, picked, w = ctx.saved_tensors
        return grad @ w, grad.index_select(0, picked).t() @ xs, None


class Rows(nn.Linear):
    k = 1

    def forward(self, x: Tensor) -> Tensor:
        return RowsLinear.apply(x, self.weight, self.k)


def saved_bytes(layer: Any, x: Tensor, w: Tensor) -> int:
    """What autograd is handed to keep, the weight apart."""
    sizes: dict[int, int] = {}

    def pack(kept: Tensor) -> Tensor:
        if kept.shape not in (w.shape, w.t().shape):
            sizes[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        layer(x)
    return sum(sizes.values())


def training(tokens: int, deep: int, out: int, ratio: float, s: Setting) -> Field:
    x, w, grad = s.randn(tokens, deep), s.randn(out, deep), s.randn(tokens, out)
    x.requires_grad_()
    base, notes = layer_of(w), []
    rows = copy.deepcopy(base)
    rows.__class__, rows.k = Rows, max(1, int(ratio * tokens))
    drawn = sfx.Sampled(ratio, estimator="systematic", scores="input")
    layers: dict[str, Any] = {
        DENSE: base,
        COMPILED: s.compile(copy.deepcopy(base)),
        "rows drawn by hand, eager": rows,
        MEMORY: compiled(copy.deepcopy(base), s, grad_weight=drawn),
    }
    dense = product64(x, w)
    exact = grad[:, :SEEN].double().t() @ x.detach().double()
    field = []
    for name, layer in layers.items():
        one = Contestant(name, partial(step, layer, x, grad), dense=name.startswith("dense"))
        one.ours = name == MEMORY
        if judged(one, layer(x).detach(), dense, dense, deep, notes):  # the forward is exact
            one.work()
            one.error = off(next(layer.parameters()).grad[:SEEN], exact)
            one.saved = saved_bytes(layer, x, w)
            one.limit = None if one.dense else 3 / (2 + ratio)
            field.append(one)
    wanted = {0.1: 1.36, 0.3: 1.25, 0.5: 1.16}.get(ratio)
    return Field(field, [Goal(MEMORY, wanted)] if wanted else [], notes)


def training_cases(s: Setting) -> list[Case]:
    shapes = [(16384, 4096, 14336, ratio) for ratio in (0.3, 0.1, 0.5)]
    shapes = [(24, 16, 32, 0.5)] if s.dry else shapes
    return [
        Case(f"{t} x {k} -> {out}, ratio {ratio}, fw + bw", partial(training, t, k, out, ratio))
        for t, k, out, ratio in shapes
    ]


# --- gather_gemm: inside the product, or copied before it

BEFORE = "index_select, then cuBLAS"


def gathered(way: str, size: int, ratio: float, s: Setting) -> Field:
    """``columns`` and ``blocks`` of x @ w.T's depth, or ``rows`` of both in x.T @ g."""
    x, w = s.randn(size, size), s.randn(size, size)
    k = max(16, int(ratio * size) // 16 * 16)
    if way == "blocks":
        first = torch.randperm(size // 16)[: k // 16].sort().values * 16
        index = (first.unsqueeze(1) + torch.arange(16)).flatten().to(s.device)
    else:
        index = torch.randperm(size)[:k].sort().values.to(s.device)
    return _rows(x, w, index, s) if way == "rows" else _columns(x, w, index, size / k)


def _columns(x: Tensor, w: Tensor, index: Tensor, limit: float) -> Field:
    works = {
        DENSE: partial(linear, x, w),
        BEFORE: lambda: linear(x.index_select(1, index), w.index_select(1, index)),
        "sampled_mm": partial(ops.sampled_mm, x, w.t(), index, None),
    }
    dense, twin = product64(x, w), product64(x[:, index], w[:, index])
    return _compared(works, dense, twin, limit, len(w), [])


def _rows(x: Tensor, grad: Tensor, index: Tensor, s: Setting) -> Field:
    xs = x.index_select(0, index)  # what a forward saved
    ends = torch.tensor([len(index)], dtype=torch.int32, device=s.device)
    works = {
        DENSE: lambda: x.t() @ grad,
        BEFORE: lambda: xs.t() @ grad.index_select(0, index),
        "sampled_mm_weight": partial(ops.sampled_mm_weight, xs, grad, index, False),
    }
    notes = missing("scattermoe")
    if s.device == "cuda" and hasattr(torch, "_grouped_mm"):
        works["index_select, then grouped_mm"] = lambda: torch._grouped_mm(
            xs.t(), grad.index_select(0, index), offs=ends
        )[0]
    dense = x.double().t()[:SEEN] @ grad.double()
    twin = xs.double().t()[:SEEN] @ grad[index].double()
    return _compared(works, dense, twin, len(x) / len(index), len(x), notes)


def _compared(
    works: dict[str, Any], dense: Tensor, twin: Tensor, limit: float, terms: int, notes: list[str]
) -> Field:
    field = []
    for name, work in works.items():
        one = Contestant(name, work, dense=name == DENSE, ours=name.startswith("sampled"))
        one.limit = None if one.dense else limit
        found = tried(one, work, notes)
        if found is not None and judged(
            one, found, dense if one.dense else twin, dense, terms, notes
        ):
            field.append(one)
    own = next(one.method for one in field if one.ours)
    return Field(field, [Goal(own, 0.98, BEFORE)], notes)


def gathered_cases(s: Setting) -> list[Case]:
    ways = ("rows", "columns", "blocks")
    shapes = [(way, size, 0.3) for size in (4096, 8192, 2048, 1024) for way in ways]
    shapes = [(way, 64, 0.3) for way in ways] if s.dry else shapes
    return [
        Case(f"{way}, {size} cubed, ratio {ratio}", partial(gathered, way, size, ratio))
        for way, size, ratio in shapes
    ]


ROWS = {"crs_fwd": forward_cases, "crs_wgrad_train": training_cases, "gather_gemm": gathered_cases}

if __name__ == "__main__":
    gpu.main(ROWS, __doc__)
