"""Masks on a CUDA device: 2:4 with compression, exact 2:4, and transposable N:M.

    python benchmarks/device_masks.py mask_compress|tmask_2_4_exact|tmask_nm [--seconds 60]

"x dense" is beside ``clone`` here, what the memory allows. Every mask is checked before it is
timed: no row or column of a tile is over or under n. How close solvers come to the best is told
for a sample of tiles, whose best masks a certificate proves.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparsefx import masks, ops
from sparsefx.masks.patterns import legal_patterns
from sparsefx.masks.tiles import map_tiles

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

import gpu
from cases import Case, Contestant, Field, Goal, Setting
from lin24 import kept_of, share

CLONE = "clone"
CHUNK = 1 << 18  # tiles that by_patterns scores at once
TILES = 256  # that are compared with the best


def clone(w: Tensor) -> Contestant:
    return Contestant(CLONE, w.clone, dense=True, bytes=4 * w.numel())


def valid(name: str, mask: Tensor, n: int, m: int) -> None:
    """Leave when a transposable mask breaks its pattern, or leaves places free."""
    verdict = masks.is_valid(mask, n, m, transposable=True, exact=True)
    if not verdict:
        raise SystemExit(f"{name} at {n}:{m}: {verdict.reason}; nothing is timed")


def of_best(w: Tensor, mask: Tensor, n: int, m: int, name: str, exact: bool) -> str:
    """What the mask keeps of the best there is, over a sample of tiles."""
    side = max(1, int(TILES**0.5)) * m
    part, chosen = w[:side, :side].float().cpu(), mask[:side, :side].cpu()
    best, proof = masks.transposable_mask(part, n, m, return_certificate=True)
    if not (verdict := proof.holds(part, best)):
        raise SystemExit(f"the certificate of {n}:{m} doesn't hold: {verdict.reason}")
    found = masks.retained(part, chosen) / masks.retained(part, best)
    if exact and not (verdict := masks.certify(part, chosen, n, m).holds(part, chosen)):
        raise SystemExit(f"{name} isn't the best mask at {n}:{m}: {verdict.reason}")
    met = "met" if found >= 0.995 else "MISSED"
    return f"{name}: keeps {found:.4%} of the best (goal 99.5%: {met}), rows and columns full"


# --- mask_compress: the exact mask, and both orientations packed as products want them


def greedy_tile(w: Tensor, s: Setting) -> object:
    if s.dry:
        return kept_of(w, "greedy")
    return torch._sparse_semi_structured_tile(w, algorithm="", use_cutlass=False)


def masked_copy(w: Tensor) -> Tensor:
    return torch.where(ops.nm_mask(w, 2, 4, 1, True), w, 0)


def compressed(w: Tensor) -> tuple[Tensor, Tensor]:
    mask = ops.nm_mask(w, 2, 4, 1, True)
    return ops.nm24_compress(w, mask), ops.nm24_compress(w.t(), mask.t())


def packed_both(w: Tensor) -> tuple[Tensor, ...]:
    return ops.nm_pack_both(w, ops.nm_mask(w, 2, 4, 1, True), 2, 4)


def compression(rows: int, deep: int, s: Setting) -> Field:
    w = s.randn(rows, deep)
    kept = masked_copy(w)
    valid("sparsefx", kept != 0, 2, 4)
    packed_bytes = int(w.numel() * 2 * (1 + 2 * 9 / 16))
    name, work = "sparsefx, masked copy", partial(masked_copy, w)
    field = [clone(w), Contestant(name, work, bytes=4 * w.numel(), ours=True)]
    goals = [Goal(name, 0.77, CLONE)]
    for name, work in {
        "sparsefx, nm24_compress both ways": partial(compressed, w),
        "sparsefx, nm_pack_both": partial(packed_both, w),
    }.items():
        field.append(Contestant(name, work, bytes=packed_bytes, ours=True))
        goals.append(Goal(name, 0.77, CLONE))
    for one in field[1:]:
        one.kept, one.limit = share(w, kept), 1 / 1.06
    if s.dry or torch.backends.cusparselt.is_available():
        tile = partial(greedy_tile, w, s)
        field.append(Contestant("torch's greedy tile", tile, bytes=packed_bytes))
    return Field(field, goals)


def compression_cases(s: Setting) -> list[Case]:
    shapes = [(4096, 4096), (8192, 28672), (13008, 4096)]
    shapes = [(32, 64)] if s.dry else shapes
    return [Case(f"{r} x {k}, 2:4", partial(compression, r, k)) for r, k in shapes]


# --- tmask_2_4_exact


def by_patterns(w: Tensor) -> Tensor:
    """Hu et al. (2024): of a 4 x 4 tile's 90 masks the one that keeps the most, by a product."""
    legal = torch.tensor(legal_patterns(4, 4, 2), device=w.device)
    weights = legal.to(torch.float32).t()  # [16, 90]

    def solve(tiles: Tensor) -> Tensor:
        flat = tiles.abs().float().flatten(1)
        best = torch.cat([(part @ weights).argmax(1) for part in flat.split(CHUNK)])
        return legal[best].bool().view_as(tiles)

    return map_tiles(w, 4, solve)


def exact_24(size: int, s: Setting) -> Field:
    w = s.randn(size, size)
    ways = {
        "sparsefx, exact": partial(masks.transposable_mask, w, 2, 4),
        "sparsefx op, exact": partial(ops.nm_mask, w, 2, 4, 1, True),
        "90 patterns, torch": partial(by_patterns, w),
    }
    field, notes = [clone(w)], []
    for name, work in ways.items():
        mask = work()
        valid(name, mask, 2, 4)
        notes.append(of_best(w, mask, 2, 4, name, exact=name.startswith("sparsefx")))
        kept = masks.retained(w, mask)
        field.append(Contestant(name, work, kept=kept, bytes=3 * w.numel(), ours=name[0] == "s"))
    if s.dry or torch.backends.cusparselt.is_available():
        field.append(Contestant("torch's greedy tile", partial(greedy_tile, w, s)))
    # 33 us of bytes at 8192 squared, 4.3 TB/s
    return Field(field, [Goal("sparsefx op, exact", at_most=0.07)] if size == 8192 else [], notes)


def exact_24_cases(s: Setting) -> list[Case]:
    sizes = [32] if s.dry else [8192, 4096, 1024]
    return [Case(f"{size} squared, 2:4", partial(exact_24, size)) for size in sizes]


# --- tmask_nm


def transposable(size: int, n: int, m: int, solvers: tuple[str, ...], s: Setting) -> Field:
    w = s.randn(size, size)
    field, notes = [clone(w)], []
    for solver in solvers:
        work = partial(masks.transposable_mask, w, n, m, solver=solver)
        mask = work()
        valid(solver, mask, n, m)
        notes.append(of_best(w, mask, n, m, solver, exact=solver == "exact"))
        kept = masks.retained(w, mask)
        field.append(Contestant(solver, work, kept=kept, bytes=3 * w.numel(), ours=True))
    rowwise = masks.nm_mask(w, n, m)
    field.append(
        Contestant("row-wise N:M", partial(masks.nm_mask, w, n, m), kept=masks.retained(w, rowwise))
    )
    goals = [Goal("entropic", at_most=10.0)] if size == 8192 else []
    return Field(field, goals, notes)


def transposable_cases(s: Setting) -> list[Case]:
    patterns = [(4, 8), (8, 16), (16, 32)]
    some, every = ("entropic", "greedy"), ("entropic", "greedy", "exact")
    shapes = [(8192, n, m, every if m == 8 else some) for n, m in patterns]
    shapes += [(1024, n, m, every) for n, m in patterns]  # exact takes long at 8192
    shapes = [(32, 4, 8, every)] if s.dry else shapes
    return [
        Case(f"{size} squared, {n}:{m}", partial(transposable, size, n, m, who))
        for size, n, m, who in shapes
    ]


ROWS = {
    "mask_compress": compression_cases,
    "tmask_2_4_exact": exact_24_cases,
    "tmask_nm": transposable_cases,
}

if __name__ == "__main__":
    gpu.main(ROWS, __doc__)
