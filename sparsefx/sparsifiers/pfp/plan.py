"""What a pruner is going to do, worked out before the model is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsefx.config import Dense, Rule
from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.pfp.allocation import Allocation, Demand, allocate
from sparsefx.sparsifiers.pfp.selection import select
from sparsefx.sparsifiers.pfp.sensitivity import Seen, look, sample_size
from sparsefx.sparsifiers.targets import Rules, Target, find_targets
from sparsefx.sparsifiers.unstructured import Unstructured

if TYPE_CHECKING:
    from sparsefx.sparsifiers.pfp.channels import Wiring

BUDGETS = ("parameters", "flops")
PATTERN = Unstructured(unit="filter")
Channels = Mapping[str, Tensor]  # by layer, a value for each input channel


@dataclass
class Plan:
    """Layers, what was seen of them, and how many channels each keeps.

    Attributes:
        targets: by name, those that examples reached.
        seen: by name.
        wiring: between them.
        rules: that make a sparsifier choose these layers alone.
        unreached: layer -> why it stays dense.
        examples: how many were seen, and how many the bound asks for.
        delta: chance that the bound fails.
        allocations: for each of the wiring's groups, once :meth:`allocate` ran.
    """

    targets: dict[str, Target]
    seen: dict[str, Seen]
    wiring: Wiring
    rules: Rules
    unreached: dict[str, str]
    examples: tuple[int, int]
    delta: float
    allocations: list[Allocation] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Pool what was seen over the layers that decide together."""
        self.demands = [self._demand(names) for names in self.wiring.groups]

    def _demand(self, names: Sequence[str]) -> Demand:
        """Of each unit the larger sensitivity; a unit of several channels has their sum."""
        pooled, outputs = [], 1
        for name in names:
            seen, units = self.seen[name], self.wiring.units[name]
            sums = torch.zeros(int(units.max()) + 1, dtype=torch.float64)
            pooled.append(sums.index_add_(0, units, seen.sensitivity.cpu()))
            outputs = max(outputs, (seen.patches + 1) * _taps(self.targets[name]))
        return Demand(torch.stack(pooled).amax(0), outputs)

    def allocate(self, keep: float, budget: str) -> None:
        """Divide a share of the budget, "parameters" or "flops", among the layers."""
        order = [torch.argsort(-demand.sensitivity, stable=True) for demand in self.demands]
        ranks = [torch.argsort(one) for one in order]

        def cost(kept: Sequence[int]) -> float:
            chosen = [rank < k for rank, k in zip(ranks, kept, strict=True)]
            return self._cost(self._spread(chosen), budget)

        total = sum(self._price(name, budget) * t.weight.numel() for name, t in
                    self.targets.items())  # fmt: skip
        self.allocations = allocate(self.demands, cost, keep * total, self.delta)

    def choose(self, variant: str, seed: int) -> dict[str, Tensor]:
        """Return the weight of every input channel of every layer, 0 where it is dropped."""
        chosen = []
        for i, (demand, one) in enumerate(zip(self.demands, self.allocations, strict=True)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % (1 << 63))
            chosen.append(select(demand, one, variant, generator))
        return self._spread(chosen)

    def masks(self, weights: Channels) -> dict[str, Tensor]:
        """Return each layer's mask, bool in its weight's layout: kept columns of needed filters."""
        kept = {name: values > 0 for name, values in weights.items()}
        found = {}
        for name, target in self.targets.items():
            matrix = target.matrix(target.weight)
            rows = self.wiring.rows[name].needed(kept).view(-1, *[1] * (matrix.dim() - 1))
            mask = (rows & columns(target, kept[name])).expand(matrix.shape)
            found[name] = target.unmatrix(mask).to(matrix.device)
        return found

    def numbers(self, name: str) -> Tensor:
        """Return what a report needs of a layer and its mask doesn't hold, float64 [5].

        eps, draws, sum of sensitivities, examples seen, examples that the bound asks for.
        """
        at = next(i for i, names in enumerate(self.wiring.groups) if name in names)
        one, demand = self.allocations[at], self.demands[at]
        total = float(demand.sensitivity.sum())
        return torch.tensor([one.eps, float(one.draws), total, *self.examples], dtype=torch.float64)

    # --- what it costs

    def _spread(self, chosen: Sequence[Tensor]) -> dict[str, Tensor]:
        """Values of units [units], one for each group, as values of input channels by layer."""
        groups = zip(self.wiring.groups, chosen, strict=True)
        return {name: of[self.wiring.units[name]] for names, of in groups for name in names}

    def _cost(self, kept: Channels, budget: str) -> float:
        total = 0.0
        for name, target in self.targets.items():
            rows = self.wiring.rows[name].needed(kept).view(target.groups, -1).sum(1)
            inside = kept[name].view(target.groups, -1).sum(1)
            weights = int((rows * inside).sum()) * _taps(target)
            total += weights * self._price(name, budget)
        return total

    def _price(self, name: str, budget: str) -> int:
        """What one weight counts: 1, or how often it is multiplied."""
        return 1 if budget == "parameters" else self.seen[name].places


def make_plan(
    model: nn.Module, rules: Rules, batches: Iterable[Any], delta: float, taps: str
) -> Plan:
    """Look at the examples and at the graph; the model is left as it is.

    Args:
        model: a plain one.
        rules: which layers.
        batches: see :class:`ProvableFilterPruner`.
        delta: chance that the bound fails.
        taps: "sum" or "max".

    Raises:
        SparsifierError: what find_targets() and look() refuse, or no layer was reached.
    """
    from sparsefx.sparsifiers.pfp.channels import wiring_of  # the tracer takes a while to import

    found, skipped = find_targets(model, rules, PATTERN)
    every = [target for target, _ in found]
    wanted = sample_size([len(target.matrix(target.weight)) for target in every], delta)
    seen, examples, batch = look(model, every, batches, wanted, taps)
    reached = {target.name: target for target in every if target.name in seen}
    unreached = {t.name: _why(t) for t in every if t.name not in reached}
    if not reached:
        why = "; ".join(f"{name}: {reason}" for name, reason in unreached.items())
        raise SparsifierError(f"no layer is left to prune ({why}); give batches that reach one")
    if unreached:
        first = Rule(lambda target: target.name in unreached, forward=Dense())  # type: ignore[attr-defined]
        rules = [first, *(["*"] if rules is None else rules)]
    dense = [f"{name}.bias" for name in (*skipped, *unreached)]
    wiring = wiring_of(model, list(reached.values()), dense, batch)
    return Plan(reached, seen, wiring, rules, unreached, (examples, wanted), delta)


def _why(target: Target) -> str:
    if target.kind == "attention":
        return "no batch reached it, or its query, key and value are different tensors"
    return "no batch reached it"


def _taps(target: Target) -> int:
    return math.prod(target.matrix(target.weight).shape[2:])


def columns(target: Target, channels: Tensor) -> Tensor:
    """Spread a value for each input channel over [out, in/groups, 1 for each tap]."""
    matrix = target.matrix(target.weight)
    rows = len(matrix) // target.groups
    spread = channels.view(target.groups, -1).repeat_interleave(rows, 0)
    return spread.view(*spread.shape, *[1] * (matrix.dim() - 2))
