"""What each ratio of each layer costs and spoils, measured on one compiled form of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsefx.config import SparseConfig
from sparsefx.diagnostics.allocation import Option
from sparsefx.diagnostics.bench import Bench
from sparsefx.diagnostics.cuts import Decisions
from sparsefx.diagnostics.figures import Sums
from sparsefx.diagnostics.meter import run_alone
from sparsefx.diagnostics.products import compare_products, observe
from sparsefx.diagnostics.programs import Call, Observed
from sparsefx.diagnostics.units import Unit, acts, flops
from sparsefx.plan import Role

Decided = dict[Call, Decisions]
_GRID = 200  # ratios that are tried as one for all


class Measured:
    """Measures what ratios of units spoil: of one, the rest exact, or of all together."""

    def __init__(
        self, runs: Bench, observed: Observed, exact: list[Tensor | None], config: SparseConfig,
        draws: int,
    ) -> None:  # fmt: skip
        """Take what runs the model, its exact gradients, and the template."""
        self._runs, self._observed, self._exact = runs, observed, exact
        self._config, self._draws = config, draws

    def decided(self, unit: Unit, ratio: float) -> Decided:
        """Return what becomes of a unit's products at a ratio."""
        return unit.decisions(self._config, ratio)

    def curves(
        self, units: Sequence[Unit], ratios: Sequence[float], objective: str, near: float
    ) -> list[list[Option]]:
        """Return the options of every unit: what each ratio costs, and its squared error.

        Args:
            units: what is tuned.
            ratios: to choose from.
            objective: of ``tune_ratio``.
            near: at which ratio "scaled" measures.
        """
        every = [[self.decided(unit, ratio) for ratio in ratios] for unit in units]
        if objective == "gradients":
            errors = [[self._alone(decided) for decided in row] for row in every]
        else:
            errors = self._of_products(every)
        if objective == "scaled":
            errors = [
                self._scaled(row, found, ratios, near)
                for row, found in zip(every, errors, strict=True)
            ]
        return [
            [Option(flops(decided), error) for decided, error in zip(row, found, strict=True)]
            for row, found in zip(every, errors, strict=True)
        ]

    def _alone(self, decided: Decided) -> float:
        return self._sums(decided).squared if acts(decided) else 0.0

    def _sums(self, decided: Decided) -> Sums:
        return run_alone(self._runs, self._observed, self._exact, decided, self._draws)

    def _scaled(
        self, decided: Sequence[Decided], errors: list[float], ratios: Sequence[float], near: float
    ) -> list[float]:
        """Scale products' errors so that one of them is that of all gradients."""
        wrong = [place for place, error in enumerate(errors) if error > 0]
        if not wrong:
            return errors
        place = min(wrong, key=lambda p: abs(ratios[p] - near))
        factor = self._alone(decided[place]) / errors[place]
        return [factor * error for error in errors]

    def _of_products(self, every: Sequence[Sequence[Decided]]) -> list[list[float]]:
        """Go through the model once; every call's operands serve all ratios of all its units."""
        errors = [[0.0] * len(row) for row in every]

        def take(call: Call, values: Mapping[str, Any], roles: Sequence[Role]) -> None:
            for found, row in zip(errors, every, strict=True):
                for place, decided in enumerate(row):
                    if call in decided:
                        sums = compare_products(
                            self._observed, call, decided[call], values, roles, self._draws
                        )
                        found[place] += sum(s.squared for s in sums.values())

        observe(self._runs, self._observed, take)
        return errors

    def together(self, ratios: Mapping[Unit, float]) -> float:
        """Return the relative error of all gradients with every unit at its ratio."""
        every: Decided = {}
        for unit, ratio in ratios.items():
            for call, decisions in self.decided(unit, ratio).items():
                every[call] = {**every.get(call, {}), **decisions}
        return self._sums(every).error().relative if acts(every) else 0.0

    def uniform(self, units: Sequence[Unit], budget: int) -> float | None:
        """Return the largest ratio for all that meets the budget; None if none does."""
        for step in range(_GRID, 0, -1):
            if sum(flops(self.decided(unit, step / _GRID)) for unit in units) <= budget:
                return step / _GRID
        return None
