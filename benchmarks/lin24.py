"""2:4 linear layers on a CUDA device, alone and in training.

    python benchmarks/lin24.py lin24_fwd|lin24_train [--seconds 60] [--json PATH]

sparsefx is timed as users run it, through torch.compile, with a transposable 2:4 rule in bfloat16:
masks are made at every step, inside the time. cuSPARSELt's products, and the op nm24_mm, see a
weight that was packed before the clock started: the bound that the sparse tensor core sets.
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
from sparsefx import masks, ops

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

import gpu
from cases import (
    Case,
    Contestant,
    Field,
    Goal,
    Setting,
    best_algorithm,
    installed,
    judged,
    missing,
    product64,
    tried,
    vendor,
)
from linear import step

OURS, OP, DENSE = "sparsefx 2:4", "nm24_mm, packed before", "dense, eager"
BEST = "cuSPARSELt, best right algorithm"
TOKENS = [4096, 16384, 1024, 256]
WEIGHTS = [(8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336)]  # [out, in]


def rule(pattern: str) -> sfx.Rule:
    return sfx.Rule(pattern, forward=sfx.NM(2, 4, transposable=True))


def ours(module: nn.Module, s: Setting, *layers: str) -> Any:
    """The module with 2:4 weights in these layers (default: all), compiled by sparsefx."""
    rules = [rule(pattern) for pattern in layers or ("*",)]
    config = sfx.SparseConfig(rules, keep_output_dense=False, strict=True, codegen=s.codegen)
    return torch.compile(module, backend="sparsefx", options={"config": config}, dynamic=False)


def layer_of(w: Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    layer.weight.data.copy_(w)
    return layer


def kept_of(w: Tensor, solver: str = "exact") -> Tensor:
    return torch.where(masks.transposable_mask(w, 2, 4, solver=solver), w, 0)


def share(w: Tensor, kept: Tensor) -> float:
    return float(kept.abs().sum(dtype=torch.float64) / w.abs().sum(dtype=torch.float64))


def without_grad(call: Any, *args: Any) -> Any:
    with torch.no_grad():
        return call(*args)


# --- lin24_fwd


def vendors(
    s: Setting, x: Tensor, kept: Tensor, dense: Tensor, notes: list[str]
) -> list[Contestant]:
    """The first algorithm of cuSPARSELt, and the fastest one whose values are right."""
    lib = vendor(s)
    if lib is None:
        notes.append("cuSPARSELt: this torch comes without it")
        return []
    packed, twin = lib.compress(kept), product64(x, kept)
    best, refused = best_algorithm(lib, packed, x, twin)
    field = [
        Contestant("cuSPARSELt, algorithm 0", partial(lib.mm, packed, x, 0), limit=2.0),
        Contestant(BEST, partial(lib.mm, packed, x, best), limit=2.0, note=f"number {best}"),
    ]
    if refused:
        notes.append(f"cuSPARSELt: {refused} of {lib.algorithms} algorithms wrong or refused")
    return [
        one
        for one in field
        if (y := tried(one, one.work, notes)) is not None
        and judged(one, y, twin, dense, x.shape[1], notes)
    ]


def forward(tokens: int, out: int, deep: int, tune: bool, s: Setting) -> Field:
    w, x = s.randn(out, deep), s.randn(tokens, deep)
    kept, dense = kept_of(w), product64(x, w)
    notes: list[str] = []
    field = [
        Contestant(DENSE, partial(linear, x, w), dense=True),
        Contestant("dense, torch.compile", partial(s.compile(linear, tune), x, w), dense=True),
    ]
    for one in field:
        judged(one, one.work(), dense, dense, deep, notes)
    field[1].note = "max-autotune" if tune else ""
    field += vendors(s, x, kept, dense, notes)
    run = partial(without_grad, ours(layer_of(w), s), x)
    mask = kept != 0
    packed = ops.nm24_compress(w, mask)
    alone = partial(ops.nm24_mm, x, packed, w.t(), mask.t(), None)
    own = [
        Contestant(OURS, run, limit=2.0, ours=True, note="mask in it"),
        Contestant(OP, alone, limit=2.0, ours=True),
    ]
    for one in own:
        judged(one, one.work(), product64(x, kept), dense, deep, notes)
    field += own
    for one in field:
        one.kept = None if one.dense else share(w, kept)
    goals = [Goal(OURS, 0.98), Goal(OP, 0.98), Goal(OP, 0.98, BEST)]
    goals += [Goal(OP, 1.45)] if (tokens, out, deep) == (8192, 8192, 8192) else []
    return Field(field, goals, notes)


def forward_cases(s: Setting) -> list[Case]:
    shapes = [(8192, 8192, 8192, False)]
    shapes += [(tokens, out, deep, False) for tokens in TOKENS for out, deep in WEIGHTS]
    shapes.insert(4, (8192, 4096, 4096, True))  # to tune takes as long as several other cases
    shapes = [(32, 64, 32, True)] if s.dry else shapes
    return [Case(f"{m} x {k} -> {n}", partial(forward, m, n, k, t)) for m, n, k, t in shapes]


# --- lin24_train: forward, both gradients, and the mask of every step


class Tile(torch.autograd.Function):
    """torch's own greedy 2:4 tile of a weight, straight-through, as torchao's SemiSparseLinear."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Packed

        return Packed.prune_dense_static_sort(w.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class GreedyTile(Tile):
    """The same without a vendor library: what a dry run takes."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return kept_of(w.detach(), "greedy")


class TileLinear(nn.Linear):
    sparsify: Any = Tile.apply

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.sparsify(self.weight), self.bias)


def tiled(module: nn.Module, sparsify: Any) -> nn.Module:
    """A copy whose linear layers sparsify their weight at each call."""
    copied = copy.deepcopy(module)
    for layer in copied.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = TileLinear
            layer.sparsify = sparsify
    return copied


def peers(module: nn.Module, s: Setting, notes: list[str]) -> dict[str, nn.Module]:
    """Eager 2:4 training as others do it, as far as it is there."""
    found = {}
    if s.dry:
        found["torch's tile + cuSPARSELt, eager"] = tiled(module, GreedyTile.apply)
    elif torch.backends.cusparselt.is_available():
        found["torch's tile + cuSPARSELt, eager"] = tiled(module, Tile.apply)
    if installed("xformers"):
        from xformers.ops import sparsify24_ste

        found["xformers sp24, eager"] = tiled(module, partial(sparsify24_ste, backend="cusparselt"))
    notes += missing("xformers", "torchao")
    if installed("torchao"):
        notes.append("torchao: its SemiSparseLinear, which it dropped, is the rebuilt tile")
    return found


def weight_seen(layer: nn.Module, w: Tensor) -> Tensor:
    """The dense values of what a layer multiplies with."""
    sparsify = getattr(layer, "sparsify", None)
    return kept_of(w) if sparsify is None else sparsify(w).to_dense()


def once(one: Contestant, layer: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer that has also gone backward once, and the weight it multiplies with."""
    one.work()
    return layer(x).detach(), w if one.dense else weight_seen(layer, w).detach()


def training(tokens: int, deep: int, out: int, s: Setting) -> Field:
    w, x, grad = s.randn(out, deep), s.randn(tokens, deep), s.randn(tokens, out)
    x.requires_grad_()
    base = layer_of(w)
    notes: list[str] = []
    dense = product64(x, w)
    layers: dict[str, Any] = {DENSE: base, "dense, torch.compile": s.compile(copy.deepcopy(base))}
    layers |= peers(base, s, notes)
    layers[OURS] = ours(copy.deepcopy(base), s)
    field = []
    for name, layer in layers.items():
        one = Contestant(name, partial(step, layer, x, grad), dense=name.startswith("dense"))
        one.ours = name == OURS
        one.limit = None if one.dense else 1.5
        if (found := tried(one, partial(once, one, layer, x, w), notes)) is None:
            continue
        y, seen = found
        one.kept = None if one.dense else share(w, seen)
        if judged(one, y, product64(x, seen), dense, deep, notes):
            field.append(one)
    return Field(field, [Goal(OURS, 1.25)], notes)


def training_cases(s: Setting) -> list[Case]:
    shapes = [(16384, 4096, 14336), (13008, 1024, 4096), (13008, 4096, 1024)]
    shapes = [(32, 32, 64)] if s.dry else shapes
    return [Case(f"{m} x {k} -> {n}, fw + bw", partial(training, m, k, n)) for m, k, n in shapes]


ROWS = {"lin24_fwd": forward_cases, "lin24_train": training_cases}

if __name__ == "__main__":
    gpu.main(ROWS, __doc__)
