"""``gradient_error``: gradients of a whole model under a config, against exact ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsefx.config import SparseConfig, as_config
from sparsefx.diagnostics import printing
from sparsefx.diagnostics.bench import Bench, bench
from sparsefx.diagnostics.cuts import Decisions, changed, is_random
from sparsefx.diagnostics.figures import Comparison, Error, Sums, together
from sparsefx.diagnostics.observing import Replacing
from sparsefx.diagnostics.programs import Call, Observed, Program, Rewritten
from sparsefx.diagnostics.running import Loss
from sparsefx.diagnostics.streams import Stream
from sparsefx.errors import DiagnosticsError

Grads = list[Tensor | None]
NOISE = 10**6  # seeds of layers taken alone lie apart from those of whole runs


@dataclass(frozen=True)
class GradientError(Error):
    """How far one parameter's gradient g is from the exact one, e; see :class:`Error`.

    Attributes:
        parameter: qualified name.
    """

    parameter: str


@dataclass(frozen=True)
class LayerError(Error):
    """How far all gradients are off when one layer alone is changed; see :class:`Error`.

    Attributes:
        layer: qualified name.
        pattern: what its products became.
    """

    layer: str
    pattern: str


@dataclass(frozen=True)
class GradientErrors:
    """What :func:`gradient_error` found: rows by parameter, their total, a table, a picture.

    Attributes:
        rows: one a parameter that the loss depends on, all layers changed at once.
        draws: runs that were averaged; 1 where nothing is random.
        total: all gradients as one vector.
        isolated: one a changed layer, if asked for.
        loss_exact: of the exact model.
        loss: of the changed one, averaged over draws; another where a forward is changed.
    """

    rows: tuple[GradientError, ...]
    draws: int
    total: GradientError
    isolated: tuple[LayerError, ...]
    loss_exact: float
    loss: float

    def __getitem__(self, parameter: str) -> GradientError:
        """Return the row of a parameter.

        Raises:
            DiagnosticsError: listing the parameters there are.
        """
        for row in self.rows:
            if row.parameter == parameter:
                return row
        names = ", ".join(row.parameter for row in self.rows)
        raise DiagnosticsError(f"no parameter {parameter!r}; there are: {names}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json.dumps`` takes; what is not finite is None."""
        return {
            "draws": self.draws,
            "loss_exact": printing.finite(self.loss_exact),
            "loss": printing.finite(self.loss),
            "total": printing.plain(asdict(self.total)),
            "rows": [printing.plain(asdict(row)) for row in self.rows],
            "isolated": [printing.plain(asdict(row)) for row in self.isolated],
        }

    def __str__(self) -> str:
        """Return tables of 120 columns at most, and what the words mean."""
        many = "one draw" if self.draws == 1 else f"{self.draws} draws"
        parts = [
            printing.table(
                ("parameter", *printing.FIGURES),
                [(r.parameter, *printing.figures(r)) for r in (*self.rows, self.total)],
                f"gradients against exact ones, {many}",
            )
        ]
        if self.isolated:
            rows = [(r.layer, r.pattern, *printing.figures(r)) for r in self.isolated]
            head = ("layer", "decision", *printing.FIGURES)
            parts.append(
                printing.table(head, rows, "all gradients, this layer alone changed", text=2)
            )
        parts.append(f"loss {self.loss_exact:.6g} exact, {self.loss:.6g} changed")
        return "\n\n".join([*parts, printing.legend(self.draws)])

    def plot(self, path: printing.Path) -> None:
        """Draw relative error and bias as bars, by parameter and by layer alone.

        Args:
            path: a file ending in .png, .svg or .pdf.

        Raises:
            DiagnosticsError: when matplotlib isn't installed, and for another ending.
        """
        named: list[tuple[str, Error]] = [(row.parameter, row) for row in self.rows]
        panels = [("gradients, all layers changed", named)]
        if self.isolated:
            alone: list[tuple[str, Error]] = [(row.layer, row) for row in self.isolated]
            panels.append(("all gradients, one layer changed", alone))
        printing.bars(path, panels, "|error| / |exact gradient|")


def gradient_error(
    model: Any, batch: Any, config: object, *, loss: Loss | None = None, draws: int = 8,
    seed: int = 0, isolated: bool = False,
) -> GradientErrors:  # fmt: skip
    """Compare a model's gradients under a config with exact ones, parameter by parameter.

    As the meter of Adelman et al.'s code: mean, relative norm, std and max of approximate minus
    exact; for random estimators bias and noise apart. Every layer is as the config says at once, so
    errors of deeper layers are in it.

    All runs start alike: buffers, dropout, whatever else is random; only what is sampled is drawn
    anew. The model, its parameters' ``.grad``, buffers, modes and all random state stay as they
    were, whatever happens. Runs are made with gradients on, under the autocast that is on here.
    Hooks on the accumulation of gradients don't run, so what they add counts nowhere.

    Args:
        model: a module, compiled or not; its graphs are taken anew and interpreted.
        batch: one input, a tuple of them, or a dict by name.
        config: as for the backend; its ``codegen`` is not used, nothing is generated. A schedule
            counts as the ratio that it stands at.
        loss: function of (model, batch) to one number; by default the model's own output, or the
            ``loss`` of that.
        draws: how often random estimators draw; a config without them runs once.
        seed: of everything random.
        isolated: also change one layer at a time, the others exact, and compare all gradients: one
            run a layer and draw, without compiling anything for it.

    Raises:
        DiagnosticsError: for a model without gradients, a loss that is no number or never calls the
            model, bad counts.
        ConfigError: for a bad config.
        PassError: under ``strict=True``.
    """
    check_draws(draws, seed)
    asked = interpreted(as_config(config))
    with bench(model, batch, loss, seed) as runs:
        loss_exact, exact = runs.run(Rewritten(interpreted(SparseConfig(rules=()))))
        program = Rewritten(asked)
        found = [runs.run(program)]
        found += [runs.run(program, i) for i in range(1, draws if _varies(program) else 1)]
        sums = compare_gradients(runs, exact, [grads for _, grads in found])
        layers = _layers(runs, Observed(asked), draws) if isolated else ()
    return GradientErrors(
        rows=tuple(GradientError(**vars(s.error()), parameter=name) for name, s in sums.items()),
        draws=len(found),
        total=GradientError(**vars(together(list(sums.values())).error()), parameter="all"),
        isolated=layers,
        loss_exact=loss_exact,
        loss=sum(value for value, _ in found) / len(found),
    )


def interpreted(config: SparseConfig) -> SparseConfig:
    """Return a config without schedules or code generation."""
    return replace(config.resolved(), codegen="aot_eager")


def check_draws(draws: object, seed: object) -> None:
    """Refuse numbers of draws and seeds that can't serve."""
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise DiagnosticsError(f"draws={draws!r} must be an int, at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise DiagnosticsError(f"seed={seed!r} must be an int, at least 0 and below 2**31")


def _varies(program: Program) -> bool:
    """Whether two runs may differ: by what is sampled, or by what the user's own passes do."""
    patterns = [plan.decision.pattern for plan in program.plans if plan.decision is not None]
    return bool(program.config.passes) or any(getattr(p, "random", False) for p in patterns)


def compare_gradients(runs: Bench, exact: Grads, found: Sequence[Grads]) -> dict[str, Sums]:
    """Compare gradients by parameter; those that the loss doesn't depend on are left out."""
    sums = {}
    for i, name in enumerate(runs.names):
        reference = exact[i]
        if reference is None:
            continue
        comparison = Comparison(reference)
        for grads in found:
            grad = grads[i]
            comparison.add(torch.zeros_like(reference) if grad is None else grad)
        sums[name] = comparison.sums()
    return sums


# --- one layer at a time


def _layers(runs: Bench, observed: Observed, draws: int) -> tuple[LayerError, ...]:
    """One row a layer that the config changes; all of its calls are changed together."""
    exact = runs.run(observed)[1]
    layers: dict[str, dict[Call, Decisions]] = {}
    for call in observed.calls:
        if any(map(changed, call.decisions.values())):
            layers.setdefault(call.layer, {})[call] = call.decisions
    rows = []
    for layer, chosen in layers.items():
        sums = run_alone(runs, observed, exact, chosen, draws)
        patterns = [
            d.pattern for decided in chosen.values() for d in decided.values() if changed(d)
        ]
        text = ", ".join(dict.fromkeys(map(str, patterns)))
        rows.append(LayerError(**vars(sums.error()), layer=layer, pattern=text))
    return tuple(rows)


def run_alone(
    runs: Bench, observed: Observed, exact: Grads, chosen: Mapping[Call, Decisions], draws: int
) -> Sums:
    """Compare all gradients when some calls are as decided and the rest of the model is exact."""
    graphs = {call: observed.rewriter(call.cut, decided) for call, decided in chosen.items()}
    found = []
    try:
        for draw in range(draws if is_random(chosen) else 1):
            observed.probe = Replacing(graphs, Stream(NOISE + draw))
            found.append(runs.run(observed, draw)[1])
    finally:
        observed.probe = None
    return together(list(compare_gradients(runs, exact, found).values()))
