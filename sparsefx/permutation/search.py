"""Order columns so that N:M keeps more: swaps between groups, to a local optimum, and escapes.

Kept is, of every m consecutive columns of a row, the n largest magnitudes. Only how columns are
grouped matters, so a move swaps two columns of two groups; what it gains has a closed form. With
x_q a column and t_p the n-th largest magnitude of p's group without column p, row by row,

    M[p, q] = sum over rows of max(0, x_q - t_p)        what q adds to p's group once p has left
    gain(p, q) = M[p, q] + M[q, p] - M[p, p] - M[q, q]

so all swaps are one matrix away, and after a swap only the rows of M of the two groups change. M is
a matrix of L1 distances, since max(0, a) = (a + |a|) / 2. Far faster, and slightly too large, it is
a matrix product: max(0, x - t) is linear in x apart from its kink, so between knots s_b it is the
sum of hat_b(x) max(0, s_b - t). The climb goes up with the product and, unless the matrix is
large, ends with the distances. What a swap really gained is checked in float64, and one that lost
is undone.

Any n and m. The exhaustive tables of Pool & Yu, "Channel Permutations for N:M Sparsity" (NeurIPS
2021), grow with the number of ways to group m columns, and are for 2:4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import MaskError
from sparsefx.masks.checks import check_pattern, check_values, check_weight

_KNOTS = 8  # of the fast M, for each row
_EXACT = 2**31  # numbers to compare for all distances at most: 2048 rows of 1024 columns
_ROUNDING = 1e-6  # a gain smaller than this share of all that is kept is none
_SHAKEN = 4  # pairs of groups that an escape disturbs, at most


def search(
    weights: Tensor | Sequence[Tensor],
    n: int,
    m: int,
    *,
    movable: Tensor | None = None,
    budget: int = 100,
    seed: int = 0,
) -> Tensor:
    """Find an order of columns whose N:M mask keeps more magnitude; never less than as given.

    Args:
        weights: matrices [rows, K] of a dtype that ``nm_mask`` takes; they share their columns, and
            what each keeps is added up.
        n: how many are kept of each group.
        m: the size of a group; it has to divide K.
        movable: bool [K], which columns may leave their place; all by default.
        budget: how many rounds of swaps, escapes from local optima included. The result depends
            on it and on ``seed`` alone, not on the machine's speed.
        seed: of the escapes.

    Returns:
        int64 [K]: the column that each place takes, so ``w[:, order]`` is the better matrix. The
        order given is returned where nothing better was found.

    Raises:
        MaskError: no matrix, other ranks or sizes, n, m or the budget makes no sense, NaN.
    """
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)
    _check(matrices, n, m, movable, budget)
    x = _magnitudes(matrices)
    free = torch.ones(len(x), dtype=torch.bool) if movable is None else movable.cpu()
    given = torch.arange(len(x))
    if x.shape[1] == 0 or len(x) <= m or int(free.sum()) < 2:
        return given
    kept = float(_kept(x.view(-1, m, x.shape[1]), n).sum())
    best = _search(x, n, m, free, budget, seed)
    return best.order if best.total > kept * (1 + _ROUNDING) else given


def _magnitudes(matrices: Sequence[Tensor]) -> Tensor:
    """[R, K] each -> |w| of all, [K, R] in float32, scaled so that sums stay in its range."""
    x = torch.cat([w.detach().abs().to(torch.float64) for w in matrices])
    if not bool(x.isfinite().all()):
        raise MaskError("a weight holds NaN or infinity; repair it first: no order could help")
    largest = float(x.max()) if x.numel() else 0.0
    return (x / (largest or 1.0)).to(torch.float32).T.contiguous()


def _search(x: Tensor, n: int, m: int, free: Tensor, budget: int, seed: int) -> _Grouping:
    orders = torch.arange(len(x)), _dealt(x, m, free)
    start = max(orders, key=lambda order: float(_kept(x[order].view(-1, m, x.shape[1]), n).sum()))
    rough, spent = _climb(_Grouping(x, n, m, start, free, _Hats.of(x)), budget)
    best = rough
    if len(x) * x.numel() <= _EXACT:
        best, used = _climb(_Grouping(x, n, m, rough.order, free), budget - spent)
        spent += used
    generator = torch.Generator().manual_seed(seed)
    while spent < budget:
        shaken = best.copy()
        shaken.shake(generator)
        other, used = _climb(shaken, budget - spent - 1)
        spent += used + 1
        if other.total > best.total:
            best = other
    return best


def _check(matrices: list[Tensor], n: int, m: int, movable: Tensor | None, budget: int) -> None:
    check_pattern(n, m)
    if not matrices:
        raise MaskError("there is no matrix to search; pass at least one [rows, K]")
    for w in matrices:
        check_weight(w)
        check_values(w, "search")
        if w.dim() != 2 or w.shape[1] != matrices[0].shape[-1] or w.shape[1] % m:
            raise MaskError(
                f"a matrix has shape {tuple(w.shape)}; pass [rows, K] with one K for all, "
                f"a multiple of m={m}"
            )
    if movable is not None and (
        movable.dtype != torch.bool or movable.shape != (matrices[0].shape[1],)
    ):
        raise MaskError(
            f"movable is {movable.dtype} of shape {tuple(movable.shape)}; pass torch.bool "
            f"[{matrices[0].shape[1]}]"
        )
    check_budget(budget)


def check_budget(budget: int) -> None:
    """Raise MaskError unless ``budget`` is a number of rounds."""
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise MaskError(f"budget={budget!r} is no number of rounds; pass an int above 0")


def _dealt(x: Tensor, m: int, free: Tensor) -> Tensor:
    """Deal the columns out to the groups like cards, the heaviest first, back and forth."""
    groups = len(x) // m
    if not bool(free.all()):
        return torch.arange(len(x))
    ranked = x.sum(1).argsort(descending=True, stable=True).view(m, groups)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.T.reshape(-1).cpu()


def _kept(groups: Tensor, n: int) -> Tensor:
    """[G, m, R] -> what each group keeps, [G], in float64."""
    return groups.topk(n, dim=1).values.sum(dim=(1, 2), dtype=torch.float64)


@dataclass(frozen=True)
class _Hats:
    """max(0, x_q - t_p) as a product: hats of x once, ramps of t whenever t changes.

    Attributes:
        knots: [R, B], for each row its own: quantiles of its magnitudes.
        hats: [K, R B], of each magnitude its share of the two knots around it.
    """

    knots: Tensor
    hats: Tensor

    @staticmethod
    def of(x: Tensor) -> _Hats:
        """Make them of magnitudes [K, R]."""
        rows = x.T.contiguous()
        ranks = torch.linspace(0, len(x) - 1, _KNOTS, device=x.device).long()
        knots = rows.sort(1).values[:, ranks]  # [R, B]
        below = (torch.searchsorted(knots, rows, right=True) - 1).clamp(0, _KNOTS - 2)
        left, right = knots.gather(1, below), knots.gather(1, below + 1)
        share = ((rows - left) / (right - left).clamp(min=1e-30)).clamp(0, 1)
        hats = x.new_zeros(*rows.shape, _KNOTS)
        hats.scatter_(2, below[..., None], (1 - share)[..., None])
        hats.scatter_(2, below[..., None] + 1, share[..., None])
        return _Hats(knots, hats.transpose(0, 1).flatten(1))

    def adds(self, without: Tensor, order: Tensor) -> Tensor:
        """[P, R] -> the sums over rows of max(0, x_q - t_p), [P, K]."""
        ramps = (self.knots - without[..., None]).clamp(min=0)  # [P, R, B]
        return (ramps.flatten(1) @ self.hats.T)[:, order]


@dataclass
class _Grouping:
    """An order of columns with what swaps would gain.

    Attributes:
        x: magnitudes [K, R], by column.
        order: the column in each place [K].
        free: which columns may move [K].
        hats: for the fast M; without them it is exact.
        kept: what each group keeps [G].
        adds: M above, by places [K, K].
    """

    x: Tensor
    n: int
    m: int
    order: Tensor
    free: Tensor
    hats: _Hats | None = None
    kept: Tensor | None = None
    adds: Tensor | None = None

    def __post_init__(self) -> None:
        if self.adds is None:
            size = len(self.order)
            self.adds = self.x.new_empty(size, size)
            self.kept = torch.empty(size // self.m, dtype=torch.float64, device=self.x.device)
            self.refresh(torch.arange(size // self.m))

    @property
    def total(self) -> float:
        """What is kept in all."""
        assert self.kept is not None
        return float(self.kept.sum())

    def copy(self) -> _Grouping:
        """Return the same in memory of its own, the columns apart."""
        assert self.kept is not None
        assert self.adds is not None
        return _Grouping(
            self.x, self.n, self.m, self.order.clone(), self.free, self.hats,
            self.kept.clone(), self.adds.clone(),
        )  # fmt: skip

    def refresh(self, groups: Tensor) -> None:
        """Compute anew what depends on the columns of these groups."""
        assert self.kept is not None
        assert self.adds is not None
        places = (groups[:, None] * self.m + torch.arange(self.m)).flatten()
        mine = self.x[self.order[places]].view(len(groups), self.m, -1)  # [g, m, R]
        top = mine.topk(self.n + 1, dim=1).values
        last, after = top[:, self.n - 1 : self.n], top[:, self.n :]
        self.kept[groups] = top[:, : self.n].sum(dim=(1, 2), dtype=torch.float64)
        without = torch.where(mine >= last, after, last).flatten(0, 1)  # t, [g m, R]
        if self.hats is not None:
            self.adds[places] = self.hats.adds(without, self.order)
            return
        theirs = self.x[self.order]
        distance = torch.cdist(without, theirs, p=1.0)
        self.adds[places] = (distance + theirs.sum(1) - without.sum(1)[:, None]) / 2

    def swap(self, ones: Tensor, twos: Tensor) -> None:
        """Exchange the columns in these places."""
        assert self.adds is not None
        if not len(ones):
            return
        places, other = torch.cat([ones, twos]), torch.cat([twos, ones])
        self.order[places] = self.order[other]
        self.adds[:, places] = self.adds[:, other]
        self.refresh(torch.unique(places // self.m))

    def shake(self, generator: torch.Generator) -> None:
        """Swap columns of some groups at random."""
        groups = len(self.order) // self.m
        count = min(_SHAKEN, groups // 2)
        pairs = torch.randperm(groups, generator=generator)[: 2 * count].view(2, -1)
        inside = torch.randint(self.m, pairs.shape, generator=generator)
        ones, twos = pairs * self.m + inside
        both = self.free[self.order[ones]] & self.free[self.order[twos]]
        self.swap(ones[both], twos[both])

    def best_swaps(self) -> tuple[Tensor, Tensor]:
        """Return places of swaps that gain, in pairs of groups of which none is in two pairs."""
        assert self.adds is not None
        m, groups = self.m, len(self.order) // self.m
        loses = self.adds.diagonal()
        gain = self.adds + self.adds.T
        gain -= loses[:, None] + loses
        stuck = ~self.free[self.order].to(gain.device)
        gain[stuck] = -torch.inf
        gain[:, stuck] = -torch.inf
        value = gain.view(groups, m, -1).amax(1).view(groups, groups, m).amax(2)
        value.fill_diagonal_(-torch.inf)
        value, partner = value.max(1)
        ones, twos, used = list[int](), list[int](), set[int]()
        for a in value.argsort(descending=True, stable=True).tolist():
            b = int(partner[a])
            if float(value[a]) <= 0:
                break
            if a not in used and b not in used:
                used |= {a, b}
                block = gain[a * m : (a + 1) * m, b * m : (b + 1) * m]
                i, j = divmod(int(block.argmax()), m)
                ones.append(a * m + i)
                twos.append(b * m + j)
        return torch.tensor(ones, dtype=torch.long), torch.tensor(twos, dtype=torch.long)


def _climb(grouping: _Grouping, budget: int) -> tuple[_Grouping, int]:
    """Swap until nothing gains; the grouping is changed. Returns it and the rounds spent."""
    for spent in range(1, budget + 1):
        ones, twos = grouping.best_swaps()
        if not len(ones):
            return grouping, spent
        assert grouping.kept is not None
        pairs = torch.stack([ones, twos]) // grouping.m
        before = grouping.kept[pairs].sum(0)
        grouping.swap(ones, twos)
        worse = (grouping.kept[pairs].sum(0) <= before).cpu()  # float32 promised too much
        if bool(worse.any()):
            grouping.swap(ones[worse], twos[worse])
        if bool(worse.all()):
            return grouping, spent
    return grouping, max(budget, 0)
