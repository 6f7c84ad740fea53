"""The speed-up that a machine allows a sampled linear layer: its products, and the bytes it moves.

Forward + backward over k of K pairs, x[M, K], w[N, K], g[M, N], float32. No way of computing it
does without the three products over k pairs, in the best of the layouts tried, and without

    scores    reading x and w
    gather    reading the cache lines of x and w that hold a pair of S, writing x[:, S] and w[:, S]
    spread    writing both gradients, zeros included
    bias      reading g (in a product it is read for the product)

at what this machine streams, into memory that was just allocated as every result is. Choosing S is
not counted, nor what a cache may save of the bytes. ``limit = dense time / (products + bytes)``,
measured in one run: the median of dense, the least of each part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from timing import Work, race
from torch import Tensor

LINE = 16  # floats in a cache line
STREAM = 1 << 26  # floats: 256 MiB, beyond every cache


@dataclass(frozen=True)
class Step:
    """One part of the limit; bytes, and milliseconds."""

    name: str
    read: float
    written: float
    time: float


def bandwidth(rounds: int) -> tuple[float, float]:
    """Bytes a millisecond that this machine reads and writes, over memory that no cache holds."""
    memory = torch.ones(STREAM)
    halves = memory.view(2, -1)
    reads = (memory.sum, lambda: torch.dot(halves[0], halves[1]))
    *read, write = map(min, race([*reads, memory.zero_], rounds))
    return 4 * STREAM / min(read), 4 * STREAM / write


def filling(results: Sequence[Tensor], rounds: int) -> float:
    """Milliseconds that writing new tensors of these shapes takes."""
    works = [lambda like=like: torch.empty_like(like).zero_() for like in results]
    return sum(map(min, race(works, rounds)))


def products(x: Tensor, w: Tensor, grad: Tensor, bias: Tensor, k: int) -> dict[str, list[Work]]:
    """The three products over k pairs, each with operands laid out either way."""
    picked = (t[:, :k].contiguous() for t in (x, w))
    left, right = ([rows, rows.t().contiguous().t()] for rows in picked)
    return {
        "forward": [partial(torch.addmm, bias, xs, ws.t()) for xs in left for ws in right],
        "grad_input": [partial(torch.mm, grad, ws) for ws in right],
        "grad_weight": [partial(torch.mm, grad.t(), xs) for xs in left],
    }


def steps(x: Tensor, w: Tensor, grad: Tensor, bias: Tensor, k: int, rounds: int) -> list[Step]:
    """What the limit is made of."""
    read, write = bandwidth(rounds)
    ways = products(x, w, grad, bias, k)
    with torch.no_grad():
        times = iter(race([way for each in ways.values() for way in each], rounds))
    found = []
    for name, each in ways.items():
        best = min(min(next(times)) for _ in each)
        found.append(Step(f"product, {name}", 0, 0, best))
    both, share = 4.0 * (x.numel() + w.numel()), k / x.shape[1]
    touched = 1 - (1 - share) ** LINE
    bytes_of = {
        "scores": (both, 0.0),
        "gather": (touched * both, share * both),
        "bias": (4.0 * grad.numel(), 0.0),
    }
    found += [Step(n, r, s, r / read + s / write) for n, (r, s) in bytes_of.items()]
    return [*found, Step("spread", 0.0, both, filling([x, w], rounds))]


def total(found: Sequence[Step]) -> float:
    """Milliseconds that no way of computing it can do without."""
    return sum(step.time for step in found)
