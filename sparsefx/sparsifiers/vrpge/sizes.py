"""How many channels a step computes: the drawn ones, rounded up so that few programs serve all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Sizes = tuple[int, ...]
SLACK = 1.3  # times the cost of the tightest sizes, at which a program of larger ones is taken


def round_up(count: int, size: int, buckets: int) -> int:
    """Return the smallest of ``buckets`` equal parts of ``size`` that holds ``count``, at least 1.

    >>> round_up(9, 32, 8), round_up(0, 32, 8), round_up(3, 3, 8)
    (12, 4, 3)
    """
    for part in range(1, buckets + 1):
        bound = -(-size * part // buckets)
        if bound >= max(count, 1):
            return bound
    return size


class Programs:
    """Which sizes were compiled, and which of them a draw takes.

    Args:
        full: the sizes of all axes.
        buckets: parts of each axis.
        most: how many programs there may be, beside that of the full sizes.
        cost: what sizes cost.
    """

    def __init__(
        self, full: Sizes, buckets: int, most: int, cost: Callable[[Sizes], float]
    ) -> None:
        """Begin with none."""
        self.full, self.buckets, self.most, self.cost = full, buckets, most, cost
        self.known: dict[Sizes, float] = {}

    def tight(self, counts: Sequence[float]) -> Sizes:
        """Round counts up."""
        return tuple(
            round_up(-int(-count // 1), size, self.buckets)
            for count, size in zip(counts, self.full, strict=True)
        )

    def choose(self, counts: Sequence[int], expected: Sequence[float]) -> Sizes:
        """Return sizes that hold the counts: known ones if they cost little more, else new ones.

        Args:
            counts: live channels of each axis.
            expected: what later draws will want: their mean and a deviation.
        """
        tight = self.tight(counts)
        fitting = [
            (cost, known) for known, cost in self.known.items()
            if all(a >= b for a, b in zip(known, counts, strict=True))
        ]  # fmt: skip
        best = min(fitting, default=None)
        if best is not None and (
            best[0] <= SLACK * self.cost(tight) or len(self.known) >= self.most
        ):
            return best[1]
        later = self.tight([min(e, size) for e, size in zip(expected, self.full, strict=True)])
        new = tuple(max(a, b) for a, b in zip(tight, later, strict=True))
        if len(self.known) >= self.most:
            new = self.full
        self.known[new] = self.cost(new)
        return new
