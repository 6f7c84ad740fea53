"""``product_error``: each changed product on its own, from exact operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sparsefx import cost
from sparsefx.config import as_config
from sparsefx.diagnostics import printing
from sparsefx.diagnostics.bench import Bench, bench
from sparsefx.diagnostics.cuts import Decisions, Lazy, changed, is_random
from sparsefx.diagnostics.figures import Comparison, Error, Sums
from sparsefx.diagnostics.meter import NOISE, check_draws, interpreted
from sparsefx.diagnostics.observing import Operands
from sparsefx.diagnostics.programs import Call, Observed
from sparsefx.diagnostics.running import Loss
from sparsefx.diagnostics.streams import Stream
from sparsefx.plan import Role

_ROLES = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True)
class ProductError(Error):
    """How far one product is from the exact one, given exact operands; see :class:`Error`.

    Attributes:
        layer: qualified name.
        role: "forward", "grad_input" or "grad_weight".
        pattern: what it became, in words.
        derived: it follows the forward: its draw, or its mask.
        flops_dense: operations of the full product.
        flops_sparse: operations that are left.
    """

    layer: str
    role: str
    pattern: str
    derived: bool
    flops_dense: int
    flops_sparse: int


@dataclass(frozen=True)
class ProductErrors:
    """What :func:`product_error` found: rows in the graph's order, ``str()``, ``to_dict()``.

    Attributes:
        rows: one a changed product; a layer that is called several times has rows for each call.
        draws: that were averaged, where something is random.
    """

    rows: tuple[ProductError, ...]
    draws: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json.dumps`` takes; what is not finite is None."""
        return {"draws": self.draws, "rows": [printing.plain(asdict(row)) for row in self.rows]}

    def __str__(self) -> str:
        """Return a table of 120 columns at most, and what the words mean."""
        shown = [
            (
                ""
                if i and row.layer == self.rows[i - 1].layer and row.role != "forward"
                else row.layer,
                row.role,
                row.pattern + (" (fwd)" if row.derived else ""),
                *printing.figures(row),
            )
            for i, row in enumerate(self.rows)
        ]
        head = ("layer", "role", "decision", *printing.FIGURES)
        title = "products against exact ones, operands exact"
        return "\n\n".join(
            [printing.table(head, shown, title, text=3), printing.legend(self.draws)]
        )

    def plot(self, path: printing.Path) -> None:
        """Draw relative error and bias by product as bars.

        Args:
            path: a file ending in .png, .svg or .pdf.

        Raises:
            DiagnosticsError: when matplotlib isn't installed, and for another ending.
        """
        named = [(f"{row.layer} {row.role}", row) for row in self.rows]
        printing.bars(path, [("products, operands exact", named)], "|error| / |exact product|")


def product_error(
    model: Any, batch: Any, config: object, *, loss: Loss | None = None, draws: int = 8,
    seed: int = 0,
) -> ProductErrors:  # fmt: skip
    """Measure every product that a config changes, given what an exact step feeds it.

    One exact forward and backward; each product's operands are used as they come by, and let go.
    A gradient that follows its forward uses what that drew. N:M products are measured, too; a
    stored mask changes nothing. Like :func:`gradient_error` it leaves the model as it was.

    Args:
        model: a module, compiled or not.
        batch: one input, a tuple of them, or a dict by name.
        config: as for the backend.
        loss: function of (model, batch) to one number; by default the model's own.
        draws: how often random estimators draw.
        seed: of everything random.

    Raises:
        DiagnosticsError: for a model without gradients, a loss that is no number, bad counts.
        ConfigError: for a bad config.
    """
    check_draws(draws, seed)
    observed = Observed(interpreted(as_config(config)))
    rows: list[tuple[int, int, ProductError]] = []

    def take(call: Call, values: Mapping[str, Any], roles: Sequence[Role]) -> None:
        sums = compare_products(observed, call, call.decisions, values, roles, draws)
        place = observed.calls.index(call)
        rows.extend((place, _ROLES.index(r), _row(call, r, found)) for r, found in sums.items())

    with bench(model, batch, loss, seed) as runs:
        observe(runs, observed, take)
    ordered = sorted(rows, key=lambda row: row[:2])  # stable: repeated calls as they ran
    random = is_random({call: call.decisions for call in observed.calls})
    return ProductErrors(tuple(row for *_, row in ordered), draws if random else 1)


def _row(call: Call, role: Role, sums: Sums) -> ProductError:
    decision, site = call.decisions[role], call.sites[role]
    follows = call.sites["forward"] if decision.derived else None
    return ProductError(
        **vars(sums.error()),
        layer=call.layer,
        role=role,
        pattern=str(decision.pattern),
        derived=decision.derived,
        flops_dense=cost.dense_flops(site),
        flops_sparse=cost.sparse_flops(site, decision.pattern, follows),
    )


def observe(runs: Bench, observed: Observed, take: Any) -> None:
    """Run the exact model once, and hand on every call's operands."""
    observed.probe = probe = Operands(take)
    try:
        runs.run(observed)
        probe.finish()
    finally:
        observed.probe = None


def compare_products(
    observed: Observed, call: Call, decisions: Decisions, values: Mapping[str, Any],
    roles: Sequence[Role], draws: int,
) -> dict[Role, Sums]:  # fmt: skip
    """Compare the products of a call that decisions change with exact ones, from real operands."""
    wanted = [role for role in roles if changed(decisions.get(role))]
    if not wanted:
        return {}
    exact = Lazy(call.cut.gm, tuple(call.cut.feeds), Stream(0))
    exact.bind(values)
    comparisons = {role: Comparison(_without_bias(call, role, exact, values)) for role in wanted}
    graph = observed.rewriter(call.cut, decisions)
    for draw in range(draws if is_random({call: decisions}) else 1):
        lazy = Lazy(graph, tuple(call.cut.feeds), Stream(NOISE + draw))
        lazy.bind(values)
        for role in wanted:
            comparisons[role].add(_without_bias(call, role, lazy, values))
    return {role: comparison.sums() for role, comparison in comparisons.items()}


def _without_bias(call: Call, role: Role, lazy: Lazy, values: Mapping[str, Any]) -> Tensor:
    """The product alone: a bias would make the error look smaller than it is."""
    out: Tensor = lazy.result(role).double()
    if role != "forward" or call.cut.bias is None:
        return out
    bias: Tensor = values[call.cut.bias].double()
    shape = (-1, *[1] * (out.dim() - 2)) if call.sites[role].kind == "conv" else (-1,)
    return out - bias.reshape(shape)
