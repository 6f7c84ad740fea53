"""One row per product: what it is, what it became and why, what runs, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsefx import compat, cost
from sparsefx.config import Dense, Masked, Pattern, Sampled
from sparsefx.lowering import MASKED_DENSE, READS_KEPT, lowering_of
from sparsefx.pipeline import Outcome
from sparsefx.plan import Plan, Role, Site

ROLES: tuple[Role, ...] = ("forward", "grad_input", "grad_weight", "other")
Key = tuple[int, str]  # (group, role)


@dataclass(frozen=True)
class Row:
    """One product of one layer call.

    Attributes:
        layer: qualified name of the layer.
        role: "forward", "grad_input", "grad_weight", or "other" for a backward product that
            belongs to no forward product of its graph.
        op: the operator that computed it densely.
        shape: (M, N, K); where a size is dynamic, that of the example that was traced, and None
            where it depends on data.
        batch: how many products of this shape.
        dtype: of the operands.
        device: type of the device.
        decision: the pattern, or None when dense.
        reason: why it is dense; "" where it is sparse.
        lowering: what runs: "dense", a kernel's name, or the kind of reference.
        flops_dense: operations of the full product, None where a size is not known.
        flops_sparse: operations that the pattern leaves.
        flops_executed: operations that the lowering runs: a masked dense product runs them all.
        derived: the product follows the forward's pattern instead of having its own.
        source: file and line of the user's code, where known.
        graph: which graph it belongs to.
        weight: name of the parameter that is multiplied, where it is one.
        sparse_op: the sparsefx op that serves it, "" when dense.
        symbols: dynamic sizes as expressions, under "M", "N", "K" and "batch".
        mask: name of the mask that the model applies to the weight; "" where there is none.
        mask_pattern: of that mask when it was compiled, such as "2:4 transposable"; "" if none.
        mask_density: share that it kept then; None where its values were not at hand.
        holds: pattern of the zeros of an unmasked weight when it was compiled; "" if none.
        note: what of the rule does not act here, and from which batch on a sampled product whose
            batch is dynamic is expected to win.
        predicted_dense_us: microseconds that the cost model expects of the full product, None
            where a size is not known.
        predicted_us: likewise of what runs; a sampled forward's hold the scores and the choice of
            pairs that its gradients share.
    """

    layer: str
    role: Role
    op: str
    shape: tuple[int | None, int | None, int | None]
    batch: int | None
    dtype: str
    device: str
    decision: Pattern | None
    reason: str
    lowering: str
    flops_dense: int | None
    flops_sparse: int | None
    flops_executed: int | None
    derived: bool
    source: str
    graph: int
    weight: str | None = None
    sparse_op: str = ""
    symbols: Mapping[str, str] = field(default_factory=dict, compare=False)  # s0 here, s7 there
    mask: str = ""
    mask_pattern: str = ""
    mask_density: float | None = None
    holds: str = ""
    note: str = ""
    predicted_dense_us: float | None = None
    predicted_us: float | None = None

    @property
    def decided(self) -> str:
        """The decision in words; of a stored mask, what it was when it was compiled."""
        if not isinstance(self.decision, Masked):
            return "dense" if self.decision is None else str(self.decision)
        share = "" if self.mask_density is None else f"{100 * self.mask_density:.0f}%"
        return f"{self.decision} {self.mask_pattern or share}".strip()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; a dynamic size is the string of its expression."""
        data = {key: getattr(self, key) for key in self.__dataclass_fields__}
        data["decision"] = _pattern_to_dict(self.decision)
        data["shape"] = [self.symbols.get(n, s) for n, s in zip("MNK", self.shape, strict=True)]
        data["batch"] = self.symbols.get("batch", self.batch)
        data["symbols"] = dict(self.symbols)
        if self.symbols:
            sizes = [s if str(s).isalnum() else f"({s})" for s in (data["batch"], *data["shape"])]
            data["flops_dense_expression"] = "*".join(map(str, (2, *sizes)))
        return data


def _pattern_to_dict(pattern: Pattern | None) -> dict[str, Any] | None:
    if pattern is None:
        return None
    return {"kind": type(pattern).__name__, "text": str(pattern), **asdict(pattern)}


def rows_of(outcome: Outcome, graph: int) -> list[Row]:
    """Return the rows of one graph: layer calls in order, and each one's products by role."""
    forwards = {p.site.group: p for p in outcome.plans if p.site.role == "forward"}
    order = {group: place for place, group in enumerate(forwards)}
    plans = sorted(  # stable: products of no layer stay in the graph's order, at the end
        outcome.plans,
        key=lambda p: (order.get(p.site.group, len(order)), ROLES.index(p.site.role)),
    )
    derived: dict[int, list[Site]] = {}
    for plan in plans:
        if plan.decision is not None and plan.decision.derived and not plan.decision.dense:
            derived.setdefault(plan.site.group, []).append(plan.site)
    return [
        _row(plan, forwards.get(plan.site.group), outcome.ops, graph, derived) for plan in plans
    ]


def _row(
    plan: Plan,
    forward: Plan | None,
    ops: Mapping[Key, str],
    graph: int,
    derived: Mapping[int, Sequence[Site]],
) -> Row:
    site, decision = plan.site, plan.decision
    op = ops.get((site.group, site.role), "")
    sparse = decision is not None and not decision.dense and op != ""
    pattern = decision.pattern if decision is not None and sparse else Dense()
    forced = decision.lowering if decision is not None else None
    lowering = lowering_of(op, site.device, pattern, forced, site) if sparse else "dense"
    serves = "masked_mm" if lowering == MASKED_DENSE else op  # of what is unpacked first, too
    serves = lowering if lowering == READS_KEPT else serves
    dense_us = cost.predicted_dense(site)
    follows = forward.site if forward and decision and decision.derived else None
    full = left = executed = None
    if all(map(compat.has_size, (site.batch, *site.shape))):
        full, left = cost.dense_flops(site), cost.sparse_flops(site, pattern, follows)
        dense = lowering == MASKED_DENSE or (
            cost.executes_dense(op, site.device) and lowering != READS_KEPT
        )
        executed = full if dense else left
    sizes = dict(zip(("M", "N", "K", "batch"), (*site.shape, site.batch), strict=True))
    m, n, k, batch = (compat.size_hint(s) if compat.has_size(s) else None for s in sizes.values())
    return Row(
        layer=site.layer,
        role=site.role,
        op=site.op,
        shape=(m, n, k),
        batch=batch,
        dtype=site.dtype,
        device=site.device,
        decision=pattern if sparse else None,
        reason="" if sparse else _why_dense(plan),
        lowering=lowering,
        flops_dense=full,
        flops_sparse=left,
        flops_executed=executed,
        derived=decision is not None and decision.derived,
        source=site.source,
        graph=graph,
        weight=site.weight_name,
        sparse_op=op if sparse else "",
        symbols={name: str(s) for name, s in sizes.items() if not isinstance(s, int)},
        mask=site.mask,
        mask_pattern=site.mask_pattern,
        mask_density=site.mask_density,
        holds=site.holds,
        note=_note(plan, derived.get(site.group, ())),
        predicted_dense_us=dense_us,
        predicted_us=cost.predicted(site, pattern, serves, follows) if sparse else dense_us,
    )


def _note(plan: Plan, derived: Sequence[Site]) -> str:
    """What the decision notes, and a dynamic batch's break-even."""
    decision, site = plan.decision, plan.site
    if decision is None:
        return ""
    notes = [decision.note] if decision.note else []
    sizes = (*site.shape, site.batch)
    if isinstance(decision.pattern, Sampled) and not decision.derived and any(map(_dynamic, sizes)):
        together = (site, *derived) if site.role == "forward" else (site,)
        found = cost.break_even(together, decision.pattern)
        notes += [] if found is None else [str(found)]
    return "; ".join(notes)


def _dynamic(size: Any) -> bool:
    return not isinstance(size, int)


def _why_dense(plan: Plan) -> str:
    if plan.decision is None:
        return "its layer was not decided on: the forward product is not in this graph"
    if plan.decision.dense:
        return plan.decision.reason or "no reason was recorded"
    return f"planned as {plan.decision.pattern}, but a later pass took the sparse product out"
