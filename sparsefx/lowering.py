"""What a sparse op runs as on a device, and whether that is what a rule forces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sparsefx import cost
from sparsefx.config import LOWERINGS, NM, Pattern, Sampled
from sparsefx.errors import ConfigError
from sparsefx.kernels import kernel_for
from sparsefx.plan import Plan

MASKED_DENSE = "masked dense"
_KINDS = {"triton": "triton", "C++": "cpp"}  # by the first word of a kernel's name


def lowering_of(
    op: str, device: str, pattern: Pattern | None = None, forced: str | None = None
) -> str:
    """Name what a sparse op runs as: a kernel, or the kind of reference.

    Args:
        op: its name, such as "nm_mm".
        device: type of the device.
        pattern: that the op serves, where known; kernels leave some to the reference.
        forced: what the rule forces, see :class:`sparsefx.config.Rule`.
    """
    kernel = kernel_for(op, device)
    if kernel is not None and forced != "reference" and not _beyond_kernels(op, pattern):
        return str(kernel)
    if cost.executes_dense(op) or op.startswith("nm_packed"):  # the latter is unpacked
        return MASKED_DENSE
    return "gathered conv" if "conv" in op else "gathered GEMM"


def kind_of(lowering: str) -> str:
    """Return which of ``config.LOWERINGS`` a lowering's name stands for."""
    return _KINDS.get(lowering.partition(" ")[0], "reference")


def check_forced(plans: Iterable[Plan], ops: Mapping[tuple[int, str], str]) -> None:
    """Hold a graph against what its rules force.

    Args:
        plans: of the graph's products, decided.
        ops: the sparse op that serves a product, by (group, role).

    Raises:
        ConfigError: naming layer, op, device and what there is instead.
    """
    for plan in plans:
        decision, site = plan.decision, plan.site
        op = ops.get((site.group, site.role), "")
        if decision is None or decision.dense or decision.lowering is None or not op:
            continue
        found = _available(op, site.device, decision.pattern)
        if decision.lowering not in found:
            there = " and ".join(f"{kind!r} ({name})" for kind, name in found.items())
            raise ConfigError(
                f"Rule: lowering={decision.lowering!r}: {site.layer} {site.role} as "
                f"{decision.pattern} is {op} on {site.device}, which has {there}; force that, or "
                "leave lowering=None"
            )


def _available(op: str, device: str, pattern: Pattern) -> dict[str, str]:
    """What can serve an op, by kind."""
    names = [lowering_of(op, device, pattern, forced) for forced in (None, "reference")]
    found = {kind_of(name): name for name in names}
    # a transposable mask loops over values: no graph can stand in for the kernel's op
    loops = op.startswith("nm_") and isinstance(pattern, NM) and pattern.transposable
    if len(found) > 1 and loops:
        del found["reference"]
    return {kind: found[kind] for kind in LOWERINGS if kind in found}


def _beyond_kernels(op: str, pattern: Pattern | None) -> bool:
    """Whether pairs are scaled, or stood in for: kernels leave both to the reference."""
    if not isinstance(pattern, Sampled):
        return False
    scaled = pattern.random or pattern.mass is not None
    holds_scale = op == "sampled_mm_grad_weight"  # its operand was scaled when it was gathered
    return pattern.estimator == "topk_mean" or (scaled and not holds_scale)
