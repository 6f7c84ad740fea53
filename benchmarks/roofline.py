"""The speed-up that a machine allows a sampled linear layer: its products, and the bytes it moves.

Forward + backward over k of K pairs, x[M, K], w[N, K], g[M, N], float32. No way of computing it
does without the three products over k pairs, in the best of the layouts tried, and without

    scores    reading x and w
    gather    reading the cache lines of x and w that hold a pair of S, writing x[:, S] and w[:, S]
    spread    writing both gradients, zeros included
    bias      reading g (in a product it is read for the product)

at what this machine streams. Where gradients are so large that they live in new memory each time,
what the system takes to provide it counts instead, in huge pages if that is faster. Choosing S is
not counted, nor what a cache may save of the bytes. ``limit = dense time / (products + bytes)``,
all medians of one run.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

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
    *read, write = map(median, race([*reads, memory.zero_], rounds))
    return 4 * STREAM / min(read), 4 * STREAM / write


def filling(results: Sequence[Tensor], rounds: int) -> float:
    """Milliseconds that zeros in new tensors of these shapes take, in pages of either size."""
    ways = [
        (lambda x=x: torch.empty_like(x).zero_(), lambda x=x: huge(x.nbytes).zero_())
        for x in results
    ]
    return sum(min(map(median, race(each, rounds))) for each in ways)


def huge(size: int) -> Tensor:
    """New memory in huge pages, where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def aligned(a: Tensor, b: Tensor) -> Tensor:
    """A @ b into new memory whose rows start on a cache line."""
    width = b.shape[1]
    out = a.new_empty(a.shape[0], width + -width % LINE)
    return torch.mm(a, b, out=out[:, :width])


def products(x: Tensor, w: Tensor, grad: Tensor, bias: Tensor, k: int) -> dict[str, list[Work]]:
    """The three products over k pairs, operands laid out either way, results on whole lines too."""
    picked = (t[:, :k].contiguous() for t in (x, w))
    left, right = ([rows, rows.t().contiguous().t()] for rows in picked)
    return {
        "forward": [partial(torch.addmm, bias, xs, ws.t()) for xs in left for ws in right],
        "grad_input": [partial(mm, grad, ws) for ws in right for mm in (torch.mm, aligned)],
        "grad_weight": [partial(mm, grad.t(), xs) for xs in left for mm in (torch.mm, aligned)],
    }


def steps(x: Tensor, w: Tensor, grad: Tensor, bias: Tensor, k: int, rounds: int) -> list[Step]:
    """What the limit is made of."""
    read, write = bandwidth(rounds)
    ways = products(x, w, grad, bias, k)
    with torch.no_grad():
        times = iter(race([way for each in ways.values() for way in each], rounds))
        alone = {name: [median(next(times)) for _ in each] for name, each in ways.items()}
        fastest = [each[alone[name].index(min(alone[name]))] for name, each in ways.items()]
        # their results live side by side, as in a step: alone, each finds its memory in a cache
        (together,) = race([lambda: [way() for way in fastest]], rounds)
    found = [Step("the three products", 0, 0, median(together))]
    both, share = 4.0 * (x.numel() + w.numel()), k / x.shape[1]
    touched = 1 - (1 - share) ** LINE
    bytes_of = {
        "scores": (both, 0.0),
        "gather": (touched * both, share * both),
        "bias": (4.0 * grad.numel(), 0.0),
    }
    found += [Step(n, r, s, r / read + s / write) for n, (r, s) in bytes_of.items()]
    return [*found, Step("spread", 0.0, both, max(both / write, filling([x, w], rounds)))]


def total(found: Sequence[Step]) -> float:
    """Milliseconds that no way of computing it can do without."""
    return sum(step.time for step in found)
