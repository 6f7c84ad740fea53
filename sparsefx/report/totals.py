"""Sums over a report: operations by role, bytes of weights and of saved activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsefx import cost
from sparsefx.config import Dense
from sparsefx.plan import Plan
from sparsefx.report.rows import ROLES, Row


@dataclass(frozen=True)
class Flops:
    """Operations: of the full products, that the patterns leave, and that are executed."""

    dense: int = 0
    sparse: int = 0
    executed: int = 0


@dataclass(frozen=True)
class Totals:
    """Sums over every product of every graph.

    Attributes:
        flops: by role, and under "all".
        unknown: products whose sizes depend on data, which no sum counts.
        weight_bytes: of the weights that products read, each parameter once, in the dtype that
            the products read.
        packed_bytes: of the same if only kept values and their indices were stored; a weight
            that some product reads densely is counted whole.
        saved_bytes: of what the dense graphs save for their backward; inputs, parameters and views
            of them are not counted.
        saved_bytes_sparse: of what the rewritten graphs save.
    """

    flops: Mapping[str, Flops]
    unknown: int
    weight_bytes: int
    packed_bytes: int
    saved_bytes: int
    saved_bytes_sparse: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def totals_of(
    rows: Sequence[Row], plans: Iterable[Plan], saved: Iterable[tuple[int, int]]
) -> Totals:
    """Add up.

    Args:
        rows: of every graph.
        plans: of every graph, which the rows were made of.
        saved: bytes that each graph saves, (dense, sparse).
    """
    known = [row for row in rows if row.flops_dense is not None]
    by_role = {str(role): _sum([r for r in known if r.role == role]) for role in ROLES}
    flops = {role: total for role, total in by_role.items() if total.dense or role != "other"}
    weight_bytes, packed_bytes = _weights(plans)
    pairs = list(saved)
    return Totals(
        flops={**flops, "all": _sum(known)},
        unknown=len(rows) - len(known),
        weight_bytes=weight_bytes,
        packed_bytes=packed_bytes,
        saved_bytes=sum(dense for dense, _ in pairs),
        saved_bytes_sparse=sum(sparse for _, sparse in pairs),
    )


def _sum(rows: Sequence[Row]) -> Flops:
    return Flops(
        dense=sum(row.flops_dense or 0 for row in rows),
        sparse=sum(row.flops_sparse or 0 for row in rows),
        executed=sum(row.flops_executed or 0 for row in rows),
    )


def _weights(plans: Iterable[Plan]) -> tuple[int, int]:
    """(dense, packed) bytes; of a weight that is used twice, the use that needs most of it."""
    dense: dict[str, int] = {}
    packed: dict[str, int] = {}
    for plan in plans:
        site, decision = plan.site, plan.decision
        if site.role != "forward" or site.weight_name is None:
            continue
        pattern = decision.pattern if decision is not None else Dense()
        name = site.weight_name
        dense[name] = max(dense.get(name, 0), cost.packed_weight_bytes(site, Dense()))
        packed[name] = max(packed.get(name, 0), cost.packed_weight_bytes(site, pattern))
    return sum(dense.values()), sum(packed.values())
