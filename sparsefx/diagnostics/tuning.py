"""``tune_ratio``: a ratio for every layer, under a budget of FLOPs."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsefx.config import Rule, Sampled, SparseConfig, as_config
from sparsefx.diagnostics import printing
from sparsefx.diagnostics.allocation import Option, allocate
from sparsefx.diagnostics.bench import bench
from sparsefx.diagnostics.curves import Measured
from sparsefx.diagnostics.meter import check_draws, interpreted
from sparsefx.diagnostics.programs import Observed
from sparsefx.diagnostics.running import Loss
from sparsefx.diagnostics.units import KEYS, Key, Unit, acts, units_of, with_ratio
from sparsefx.errors import ConfigError, DiagnosticsError

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
OBJECTIVES = ("gradients", "scaled", "products")


@dataclass(frozen=True)
class Tuned:
    """The ratio of one layer's product, what it costs, and the relative error foretold.

    Attributes:
        layer: qualified name.
        role: "forward" (its gradients follow, where they have no pattern of their own),
            "grad_input" or "grad_weight".
        ratio: that was chosen; 1 is exact.
        flops_dense: operations of the full products.
        flops: that are left, as the compiler's report counts them.
        relative: error at this ratio with all else exact: of all gradients, or, with "products" for
            an objective, the root of the summed squares of these products' own.
        curve: (ratio, operations, error) of every ratio that was tried.
    """

    layer: str
    role: str
    ratio: float
    flops_dense: int
    flops: int
    relative: float
    curve: tuple[tuple[float, int, float], ...]


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune_ratio` proposes.

    Attributes:
        config: to compile with: a rule by name for each layer, then the rules that were given.
        rows: one a tuned product of a layer.
        flops_dense: operations of the tuned products in full.
        flops: that are left; within the budget.
        objective: whose errors were made small.
        error: relative error of all gradients with every layer changed at once, on the same batch.
        uniform_ratio: the largest that meets the budget as one ratio for all; None if none does.
        uniform_error: the error that it leaves, measured alike.
    """

    config: SparseConfig
    rows: tuple[Tuned, ...]
    flops_dense: int
    flops: int
    objective: str
    error: float
    uniform_ratio: float | None
    uniform_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json.dumps`` takes, the config included.

        A config whose rules have no plain form, such as a lambda for a match, is told as text.
        """
        rows = []
        for row in self.rows:
            curve = [
                {"ratio": r, "flops": f, "relative": printing.finite(e)} for r, f, e in row.curve
            ]
            rows.append({**printing.plain(asdict(row)), "curve": curve})
        found = {key: value for key, value in vars(self).items() if key not in ("config", "rows")}
        return {**printing.plain(found), "rows": rows, "config": _plain_config(self.config)}

    def __str__(self) -> str:
        """Return a table of the ratios, the totals, and the error beside that of one ratio."""
        rows = [
            (
                "" if i and row.layer == self.rows[i - 1].layer else row.layer,
                row.role,
                f"{row.ratio:g}",
                f"{printing.count(row.flops_dense)} → {printing.count(row.flops)}",
                f"{row.flops / max(row.flops_dense, 1):.0%}",
                row.relative,
            )
            for i, row in enumerate(self.rows)
        ]
        what = "of its products" if self.objective == "products" else "of gradients"
        head = ("layer", "role", "ratio", "FLOPs", "", f"error {what}")
        share = f"{100 * self.flops / max(self.flops_dense, 1):.1f}%"
        title = f"ratios under a budget of FLOPs: {share} of the tuned products' are left"
        lines = ["", "relative error of all gradients, every layer changed, on this batch:"]
        lines.append(f"  these ratios       {printing.number(self.error)}")
        if self.uniform_ratio is not None and self.uniform_error is not None:
            name = f"{self.uniform_ratio:g} for all"
            lines.append(f"  {name:<18} {printing.number(self.uniform_error)}")
            if self.error > self.uniform_error:
                lines.append("  one ratio for all is better here: errors of layers are correlated")
        return "\n".join([printing.table(head, rows, title, text=2), *lines])

    def plot(self, path: printing.Path) -> None:
        """Draw the ratios, and the curves that they were chosen on.

        Args:
            path: a file ending in .png, .svg or .pdf.

        Raises:
            DiagnosticsError: when matplotlib isn't installed, and for another ending.
        """
        printing.curves(path, self.rows, self.uniform_ratio)


def _plain_config(config: SparseConfig) -> Any:
    try:
        return config.to_dict()
    except ConfigError:  # a predicate or a pass without an importable name
        return repr(config)


def tune_ratio(
    model: Any, batch: Any, config: object = None, *, flops: float = 0.5,
    roles: Sequence[str] = ("grad_input", "grad_weight"), ratios: Sequence[float] = RATIOS,
    estimator: str = "systematic", scores: str = "product", min_k: int = 1,
    objective: str = "scaled", loss: Loss | None = None, draws: int = 4, seed: int = 0,
) -> Tuning:  # fmt: skip
    """Propose a ratio for every layer, so that errors are small and FLOPs within a budget.

    What is lowered is the sum over layers of the squared relative error that each leaves when it is
    sampled alone. FLOPs go where they lower it most, along the convex hulls of the layers' curves:
    the optimum of the relaxed problem (Lagrange), one step off that of the whole one at most. The
    sum takes errors of different layers for uncorrelated: so are draws of unbiased estimators;
    errors of top-k may add up or cancel. Therefore the result also tells what was measured with
    every layer changed, beside one ratio for all, on the same batch.

    Args:
        model: a module, compiled or not.
        batch: one input, a tuple of them, or a dict by name. Ratios suit this batch: take a typical
            one.
        config: what everything else is taken from; its rules follow behind the tuned ones. If rules
            of it sample, their patterns are what is tuned, and ``roles``, ``estimator``, ``scores``
            and ``min_k`` are not used; a schedule gives way to a number. Else ``roles`` are sampled
            in every layer beside what its rules say.
        flops: budget, as a share of the dense FLOPs of the products that are tuned.
        roles: which products. A tuned forward takes its gradients along, where these are not tuned
            on their own.
        ratios: to choose from; 1.0 is exact.
        estimator: of :class:`~sparsefx.Sampled`.
        scores: of :class:`~sparsefx.Sampled`.
        min_k: of :class:`~sparsefx.Sampled`.
        objective: whose errors count. "gradients": all gradients as one vector, by a run of the
            model for every layer, ratio and draw. "scaled": the same for one ratio, near the
            budget; at others it is taken to grow as the products' own errors do. "products": each
            product's own, given exact operands, all in one run; it doesn't know which matter.
            Nothing is compiled for any of these runs.
        loss: function of (model, batch) to one number; by default the model's own.
        draws: how often random estimators draw.
        seed: of everything random.

    Raises:
        DiagnosticsError: for a budget below what the smallest ratios leave, with that share; for
            roles or ratios that are none; for a model of which no product can be sampled.
        ConfigError: for a bad config, ratio, estimator, scores or min_k.
    """
    _check(flops, roles, ratios, objective)
    check_draws(draws, seed)
    known = sorted({float(ratio) for ratio in ratios})
    patterns = [Sampled(ratio, min_k, estimator, scores) for ratio in known]
    base = as_config(config) if config is not None else SparseConfig(rules=())
    template = _template(base, dict.fromkeys(roles, patterns[0]))
    eager = interpreted(template)
    with bench(model, batch, loss, seed) as runs:
        observed = Observed(_uniform(eager, known[0]))
        measured = Measured(runs, observed, runs.run(observed)[1], eager, draws)
        every = units_of(observed.calls, eager)
        units = [unit for unit in every if any(acts(measured.decided(unit, r)) for r in known)]
        if not units:
            raise DiagnosticsError(_nothing(type(model).__name__, roles, measured, every, known[0]))
        dense = sum(unit.dense_flops() for unit in units)
        budget = math.floor(flops * dense)
        curves = measured.curves(units, known, objective, flops)
        chosen = dict(zip(units, _allocate(curves, budget, dense, flops), strict=True))
        picked = {unit: known[place] for unit, place in chosen.items()}
        uniform = measured.uniform(units, budget)
        error = measured.together(picked)
        beside = None if uniform is None else measured.together(dict.fromkeys(units, uniform))
    rows = [
        _row(unit, known, curve, chosen[unit]) for unit, curve in zip(units, curves, strict=True)
    ]
    return Tuning(
        config=_config(base, every, picked, known[-1]),
        rows=tuple(rows),
        flops_dense=dense,
        flops=sum(row.flops for row in rows),
        objective=objective,
        error=error,
        uniform_ratio=uniform,
        uniform_error=beside,
    )


def _check(flops: object, roles: Sequence[str], ratios: Sequence[float], objective: str) -> None:
    if isinstance(flops, bool) or not isinstance(flops, int | float) or not 0 < flops <= 1:
        raise DiagnosticsError(f"flops={flops!r} must be a share in (0, 1]")
    if not roles or not ratios or isinstance(roles, str):
        raise DiagnosticsError(f"roles={roles!r}, ratios={ratios!r}: give at least one of each")
    for role in roles:
        if role not in KEYS:
            raise DiagnosticsError(f"roles: {role!r} is not one of {', '.join(KEYS)}")
    if objective not in OBJECTIVES:
        raise DiagnosticsError(f"objective={objective!r} is not one of {', '.join(OBJECTIVES)}")


def _template(base: SparseConfig, patterns: Mapping[str, Any]) -> SparseConfig:
    """The config whose sampled patterns are tuned."""
    rules = base.effective_rules()
    if any(True for rule in rules for _ in rule.sampled()):
        return base
    sampling = [replace(rule, **patterns) for rule in (*rules, Rule("*"))]
    return replace(base, rules=tuple(sampling))


def _uniform(config: SparseConfig, ratio: float) -> SparseConfig:
    rules = [with_ratio(rule, dict.fromkeys(KEYS, ratio)) for rule in config.effective_rules()]
    return replace(config, rules=tuple(rules))


def _config(
    base: SparseConfig, units: Sequence[Unit], picked: Mapping[Unit, float], most: float
) -> SparseConfig:
    """Rules that name each layer, then the given ones; what can't be tuned gets most."""
    layers: dict[str, tuple[Rule, dict[Key, float]]] = {}
    for unit in units:
        layers.setdefault(unit.layer, (unit.rule, {}))[1][unit.key] = picked.get(unit, most)
    rules = [
        replace(with_ratio(rule, ratios), match=glob.escape(layer))
        for layer, (rule, ratios) in layers.items()
    ]
    return replace(base, rules=(*rules, *base.effective_rules()))


def _row(unit: Unit, ratios: Sequence[float], curve: Sequence[Option], place: int) -> Tuned:
    points = [(r, o.cost, math.sqrt(o.error)) for r, o in zip(ratios, curve, strict=True)]
    _, flops, error = points[place]
    dense = unit.dense_flops()
    return Tuned(unit.layer, unit.key, ratios[place], dense, flops, error, tuple(points))


def _allocate(
    curves: Sequence[Sequence[Option]], budget: int, dense: int, flops: float
) -> list[int]:
    least = sum(min(option.cost for option in curve) for curve in curves)
    if least > budget:
        share = math.ceil(1e4 * least / dense) / 1e4  # rounded up, so that it suffices
        raise DiagnosticsError(
            f"flops={flops:g} is below {share:.4f}, what the smallest ratio leaves: raise it, or "
            "give smaller ratios"
        )
    return allocate(curves, budget)


def _nothing(
    name: str, roles: Sequence[str], measured: Measured, units: Sequence[Unit], ratio: float
) -> str:
    reasons = [
        f"{unit.layer} {role}: {decision.reason}"
        for unit in units
        for decisions in measured.decided(unit, ratio).values()
        for role, decision in decisions.items()
    ]
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    found = "; ".join(reasons[:5]) or "no rule that samples matches a layer"
    return f"no {' or '.join(roles)} of {name} can be sampled: {found}{more}"
