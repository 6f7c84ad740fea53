"""N:M weights on a CUDA device: packed for a few rows, and masked inside the product.

    python benchmarks/device_nm.py nm_decode|masked_gemm [--seconds 60] [--json PATH]

With a few rows a product is bound by the weight's bytes. Times are of the device, the L2 cache
flushed; "CUDA graph" is without the host; "warm" is a call among many, whose weight may sit in L2.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

import sparsefx as sfx
from sparsefx import masks, ops

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

import gpu
from cases import (
    FEW_ROWS,
    Case,
    Contestant,
    Field,
    Goal,
    Setting,
    Vendor,
    judged,
    missing,
    product64,
    tried,
    vendor,
)
from lin24 import layer_of, share

DENSE = "dense, eager"


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_of(w: Tensor, n: int, m: int) -> Tensor:
    return torch.where(masks.nm_mask(w, n, m), w, 0)


# --- nm_decode

PACKED = "nm_packed_mm"
WANTED = {(2, 4): 1.6, (1, 4): 3.0, (2, 8): 2.9, (4, 8): 1.5}  # at 28672 x 8192


def goals_of(tokens: int, out: int, n: int, m: int) -> list[Goal]:
    if out == 28672:
        return [Goal(PACKED, WANTED[n, m])]
    return [Goal(PACKED, 1.35)] if (out, n, m) == (14336, 2, 4) and tokens <= 16 else []


def padded(lib: Vendor, packed: Tensor, x: Tensor) -> Tensor:
    """Rows in eights, which cuSPARSELt wants."""
    more = -len(x) % 8
    return lib.mm(packed, pad(x, (0, 0, 0, more)) if more else x, 0)[: len(x)]


def decode(tokens: int, out: int, deep: int, n: int, m: int, s: Setting) -> Field:
    w, x = s.randn(out, deep), s.randn(tokens, deep)
    values, codes = ops.nm_pack(w, n, m)
    kept, dense, notes = kept_of(w, n, m), product64(x, w), missing("macko_spmv")
    twin = product64(x, kept)
    field = [Contestant(DENSE, partial(linear, x, w), bytes=size_of(w), dense=True, graph=True)]
    if tokens <= 2:  # Inductor has a kernel of its own for these alone
        work = partial(s.compile(linear), x, w)
        field.append(Contestant("dense, torch.compile", work, bytes=size_of(w), dense=True))
    work = partial(ops.nm_packed_mm, x, values, codes, None, n, m)
    limit = size_of(w) / size_of(values, codes)
    own = Contestant(PACKED, work, bytes=size_of(values, codes), limit=limit, ours=True, graph=True)
    if (n, m) == (2, 4) and (lib := vendor(s)) is not None:
        packed = lib.compress(kept)
        work = partial(padded, lib, packed, x)
        field.append(Contestant("cuSPARSELt, algorithm 0", work, bytes=size_of(packed)))
    field.append(own)
    right = [
        one
        for one in field
        if (y := tried(one, one.work, notes)) is not None
        and judged(one, y, dense if one.dense else twin, dense, deep, notes)
    ]
    for one in right:
        one.kept = None if one.dense else share(w, kept)
    return Field(right, goals_of(tokens, out, n, m), notes, few_rows=tokens <= FEW_ROWS)


def decode_cases(s: Setting) -> list[Case]:
    shapes = [
        (tokens, out, deep, n, m)
        for out, deep in ((28672, 8192), (14336, 4096), (4096, 4096))
        for tokens in (1, 16, 64, 4)
        for n, m in WANTED
    ]
    if s.dry:
        shapes = [(2, 32, 64, 2, 4)]
    return [
        Case(f"{tokens} x {deep} -> {out}, {n}:{m}", partial(decode, tokens, out, deep, n, m))
        for tokens, out, deep, n, m in shapes
    ]


# --- masked_gemm: forward and the input's gradient, the mask made at every step

OURS, MADE = "sparsefx nm_mm", "mask made, copied, then cuBLAS"


def both(call: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    y = call(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def made(w: Tensor, n: int, m: int, x: Tensor) -> Tensor:
    return linear(x, torch.where(ops.nm_mask(w, n, m, 1, False), w, 0))


def with_mask(w: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    return linear(x, w * mask)


def compiled(w: Tensor, n: int, m: int, s: Setting) -> Any:
    layer = layer_of(w)
    layer.weight.requires_grad_(False)
    rule = sfx.Rule("*", forward=sfx.NM(n, m))
    config = sfx.SparseConfig([rule], keep_output_dense=False, strict=True, codegen=s.codegen)
    return torch.compile(layer, backend="sparsefx", options={"config": config}, dynamic=False)


def masked(tokens: int, size: int, n: int, m: int, s: Setting) -> Field:
    w, x, grad = s.randn(size, size), s.randn(tokens, size), s.randn(tokens, size)
    x.requires_grad_()
    kept, dense, notes = kept_of(w, n, m), product64(x, w), []
    stored = partial(s.compile(with_mask), w, kept != 0)
    calls = {
        DENSE: partial(linear, weight=w),
        MADE: partial(made, w, n, m),
        "mask stored, torch.compile": stored,
        OURS: compiled(w, n, m, s),
    }
    field = []
    for name, call in calls.items():
        one = Contestant(name, partial(both, call, x, grad), dense=name == DENSE, ours=name == OURS)
        seen = w if one.dense else kept
        y, gx = one.work()
        good = judged(one, gx, product64(grad, seen.t()), product64(grad, w.t()), size, notes)
        if good and judged(one, y, product64(x, seen), dense, size, notes):
            one.kept = None if one.dense else share(w, kept)
            field.append(one)
    wanted = {512: 1.4, 2048: 1.05}.get(tokens)
    goals = [Goal(OURS, wanted, MADE)] if wanted and (n, m) == (2, 4) else []
    return Field(field, [*goals, Goal(OURS, 0.97, MADE)], notes)


def masked_cases(s: Setting) -> list[Case]:
    shapes = [(m, 4096, 2, 4) for m in (512, 2048, 128, 8192, 4096)]
    shapes += [(512, 4096, 4, 8), (512, 4096, 16, 32)]
    shapes = [(6, 32, 2, 4)] if s.dry else shapes
    return [
        Case(f"{rows} x {size} -> {size}, {n}:{m}, fw + dgrad", partial(masked, rows, size, n, m))
        for rows, size, n, m in shapes
    ]


ROWS = {"nm_decode": decode_cases, "masked_gemm": masked_cases}

if __name__ == "__main__":
    gpu.main(ROWS, __doc__)
