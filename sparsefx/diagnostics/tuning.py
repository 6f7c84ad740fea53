"""``tune_ratio``: a ratio for every layer, under a budget of FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx import compat, cost
from sparsefx.config import Dense, Rule, Sampled, SparseConfig, as_config
from sparsefx.diagnostics import printing
from sparsefx.diagnostics.products import Draw, approximate, derivative, draw, product_of, scores_of
from sparsefx.diagnostics.replay import Step, record_step, visit_products
from sparsefx.diagnostics.running import Loss, parameters_of, undisturbed
from sparsefx.errors import DiagnosticsError
from sparsefx.plan import Plan, Site

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ROLES = ("forward", "grad_input", "grad_weight")
Unit = tuple[str, str]  # layer, role


@dataclass(frozen=True)
class Option:
    """What a unit costs at a ratio: its FLOPs, and its squared relative error."""

    ratio: float
    flops: int
    error: float


@dataclass(frozen=True)
class Tuned:
    """The ratio of one layer's product, what it costs, and the relative error foretold."""

    layer: str
    role: str
    ratio: float
    flops_dense: int
    flops: int
    relative: float


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune_ratio` proposes: ``config``, and ``rows`` to look at."""

    config: SparseConfig
    rows: tuple[Tuned, ...]
    flops_dense: int
    flops: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the config included."""
        rows = [asdict(row) for row in self.rows]
        own = {"flops_dense": self.flops_dense, "flops": self.flops, "rows": rows}
        return {**own, "config": self.config.to_dict()}

    def __str__(self) -> str:
        """Return a table."""
        share = 100 * self.flops / max(self.flops_dense, 1)
        return printing.table(
            ("layer", "role", "ratio", "relative error", "FLOPs left"),
            [
                (r.layer, r.role, r.ratio, r.relative, f"{100 * r.flops / r.flops_dense:.0f}%")
                for r in self.rows
            ],
            f"ratios under a budget of FLOPs: {share:.1f}% of the tuned products' are left",
        )

    def plot(self, path: str) -> None:
        """Draw ratios and errors by product into a picture (png, svg, pdf).

        Raises:
            DiagnosticsError: when matplotlib isn't installed.
        """
        names = [f"{row.layer} {row.role}" for row in self.rows]
        series = {
            "ratio": [row.ratio for row in self.rows],
            "relative error": [row.relative for row in self.rows],
        }
        printing.bars(path, names, series, "ratio, and |error| / |exact product|")


def tune_ratio(
    model: Any, batch: Any, config: object = None, *, flops: float = 0.5,
    roles: Sequence[str] = ("grad_input", "grad_weight"), ratios: Sequence[float] = RATIOS,
    estimator: str = "systematic", scores: str = "product", min_k: int = 1,
    loss: Loss | None = None, draws: int = 4, seed: int = 0,
) -> Tuning:  # fmt: skip
    """Propose a ratio for every layer, so that errors are small and FLOPs within a budget.

    Every product is measured at every ratio from the operands of one exact step. What is lowered is
    the squared error to expect of all gradients: that of a weight's gradient counts as it is, the
    relative error of a grad_input for the gradients of the layers before it, that of a forward for
    all of them. FLOPs go where they lower it most, along the convex hulls of the products' curves:
    the optimum of the relaxed problem (Lagrange), one option off that of the whole one at most.

    Args:
        model: a module, compiled or not.
        batch: one input, a tuple of them, or a dict by name.
        config: what everything else is taken from; its rules follow behind the tuned ones.
        flops: budget, as a share of the dense FLOPs of the products that are tuned.
        roles: which products. A tuned forward takes its gradients along, where these are not tuned
            on their own.
        ratios: to choose from; 1.0 is dense.
        estimator: of :class:`~sparsefx.Sampled`.
        scores: of :class:`~sparsefx.Sampled`.
        min_k: of :class:`~sparsefx.Sampled`.
        loss: function of (model, batch) to one number; by default the model's own.
        draws: how often random estimators draw.
        seed: of the draws.

    Raises:
        DiagnosticsError: for a budget below what the smallest ratio leaves, with that share; for
            roles or ratios that are none; for a model of which no product can be sampled.
        ConfigError: for a bad config, estimator, scores or min_k.
    """
    _check(flops, roles, ratios)
    base = as_config(config)
    options = [Sampled(r, min_k, estimator, scores) for r in sorted({*map(float, ratios), 1.0})]
    probe = dataclasses.replace(base, rules=(_rule("*", dict.fromkeys(roles, options[0])),))
    measured: dict[Unit, list[Option]] = {}
    forwards: list[Site] = []
    with compat.as_written(model) as plain:
        parameters_of(plain)
        with undisturbed(plain), compat.many_recompiles():
            torch.manual_seed(seed)
            recorded = record_step(plain, batch, probe, loss)
            for step in recorded.steps:
                forwards += _measure_step(step, probe, options, draws, measured)
    if not measured:
        raise DiagnosticsError(
            f"no {' or '.join(roles)} of {type(plain).__name__} can be sampled: see "
            "sfx.explain(model, config=...)(batch) for the reasons"
        )
    weights = {unit: _weight(unit, forwards, recorded.squares) for unit in measured}
    chosen = allocate(measured, flops, weights)
    return _tuning(base, options, chosen, measured)


def _check(flops: float, roles: Sequence[str], ratios: Sequence[float]) -> None:
    if isinstance(flops, bool) or not isinstance(flops, int | float) or not 0 < flops <= 1:
        raise DiagnosticsError(f"flops={flops!r} must be a share in (0, 1]")
    for role in roles:
        if role not in ROLES:
            raise DiagnosticsError(f"roles: {role!r} is not one of {', '.join(ROLES)}")
    if not roles or not ratios:
        raise DiagnosticsError(f"roles={roles!r}, ratios={ratios!r}: give at least one of each")


# --- measuring


def _weight(unit: Unit, forwards: Sequence[Site], squares: Mapping[str, float]) -> float:
    """How much a squared relative error of this product adds to that of all gradients."""
    layer, role = unit
    places = [place for place, site in enumerate(forwards) if site.layer == layer]
    own = forwards[places[0]].weight_name
    if role == "grad_weight" and own is not None:
        return squares.get(own, 0.0)
    reached = forwards if role == "forward" else forwards[: places[-1]]
    names = {site.weight_name for site in reached if site.weight_name is not None}
    return sum(squares.get(name, 0.0) for name in names)


def _measure_step(
    step: Step, probe: SparseConfig, options: Sequence[Sampled], draws: int,
    measured: dict[Unit, list[Option]],
) -> list[Site]:  # fmt: skip
    forwards: dict[int, tuple[Site, list[list[Draw]]]] = {}  # group -> its draws, by option

    def visit(plan: Plan, node: Node, args: tuple[Any, ...], result: Tensor) -> None:
        site, derived = plan.site, bool(plan.decision and plan.decision.derived)
        exact = product_of(node.target, args, result).double()
        if derived:
            follows, drawn = forwards[site.group]
        else:
            follows, drawn = site, _draws(plan, node, args, options, draws)
            if site.role == "forward":
                forwards[site.group] = site, drawn
        unit = site.layer, "forward" if derived else site.role
        squares = float(exact.square().sum()) or 1.0
        total = measured.setdefault(unit, [Option(p.ratio, 0, 0.0) for p in options])  # type: ignore[arg-type]
        for i, pattern in enumerate(options):
            error = 0.0
            for one in drawn[i]:
                if derived:
                    found = derivative(plan, node.target, exact, one)
                else:
                    found = approximate(node.target, args, one).double()
                error += float((found - exact).square().sum()) / squares / len(drawn[i])
            spent = cost.sparse_flops(site, pattern, follows)
            total[i] = Option(total[i].ratio, total[i].flops + spent, total[i].error + error)

    return visit_products(step, probe, visit)


def _draws(
    plan: Plan, node: Node, args: tuple[Any, ...], options: Sequence[Sampled], draws: int
) -> list[list[Draw]]:
    scores = scores_of(plan, options[0], node.target, args)
    return [
        []
        if pattern.k(scores.shape[-1]) == scores.shape[-1]  # exact
        else [draw(scores, pattern) for _ in range(draws if pattern.random else 1)]
        for pattern in options
    ]


# --- choosing


def allocate(
    measured: Mapping[Unit, Sequence[Option]], share: float, weights: Mapping[Unit, float]
) -> dict[Unit, Option]:
    """Choose an option for every unit: small errors, FLOPs within a share of the dense ones.

    Args:
        measured: options by unit.
        share: of the FLOPs of the dearest options.
        weights: what an error of each unit counts.

    Raises:
        DiagnosticsError: when even the cheapest options are over the budget.
    """
    hulls = {unit: _hull(options) for unit, options in measured.items()}
    budget = share * sum(max(o.flops for o in options) for options in measured.values())
    place = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].flops for hull in hulls.values())
    if spent > budget:
        least = share * spent / budget
        raise DiagnosticsError(
            f"flops={share:g} is below {least:.4f}, what the smallest ratio leaves: raise it, or "
            "give smaller ratios"
        )
    steps = [
        (-weights[unit] * _slope(hull[i], hull[i + 1]), unit, i)
        for unit, hull in hulls.items()
        for i in range(len(hull) - 1)
    ]
    for _, unit, i in sorted(steps, key=lambda step: -step[0]):
        more = hulls[unit][i + 1].flops - hulls[unit][i].flops
        if place[unit] == i and spent + more <= budget:
            place[unit], spent = i + 1, spent + more
    return {unit: hulls[unit][i] for unit, i in place.items()}


def _hull(options: Sequence[Option]) -> list[Option]:
    """Lower convex hull of error over FLOPs: falling, ever less steeply."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.flops, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(one: Option, other: Option) -> float:
    return (other.error - one.error) / (other.flops - one.flops)


# --- the result


def _rule(match: str, patterns: Mapping[str, Any]) -> Rule:
    own = {role: patterns[role] for role in ROLES if role in patterns}
    return Rule(match, **{"forward": Dense(), **own})


def _tuning(
    base: SparseConfig, options: Sequence[Sampled], chosen: Mapping[Unit, Option],
    measured: Mapping[Unit, Sequence[Option]],
) -> Tuning:  # fmt: skip
    by_ratio = {pattern.ratio: pattern for pattern in options}
    layers: dict[str, dict[str, Any]] = {}
    rows = []
    for (layer, role), option in chosen.items():
        exact = option.ratio == 1.0
        layers.setdefault(layer, {})[role] = Dense() if exact else by_ratio[option.ratio]
        dense = max(o.flops for o in measured[layer, role])
        relative = option.error**0.5
        rows.append(Tuned(layer, role, option.ratio, dense, option.flops, relative))
    rules = [_rule(_escaped(layer), patterns) for layer, patterns in layers.items()]
    config = dataclasses.replace(base, rules=(*rules, *(base.rules or ())))
    total = sum(row.flops_dense for row in rows)
    return Tuning(config, tuple(rows), total, sum(row.flops for row in rows))


def _escaped(name: str) -> str:
    """A glob that matches exactly this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
