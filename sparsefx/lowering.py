"""What a sparse op runs as on a device, and whether that is what a rule forces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sparsefx import cost
from sparsefx.config import LOWERINGS, NM, Pattern, Sampled
from sparsefx.errors import ConfigError
from sparsefx.kernels import kernel_for
from sparsefx.plan import Plan, Site

MASKED_DENSE = "masked dense"
READS_KEPT = "C++ masked_mm"  # a masked product that isn't one
# by the first word of a kernel's name
_KINDS = {"triton": "triton", "C++": "cpp", "vendor": "vendor"}


def lowering_of(
    op: str,
    device: str,
    pattern: Pattern | None = None,
    forced: str | None = None,
    site: Site | None = None,
) -> str:
    """Name what a sparse op runs as: a kernel, or the kind of reference.

    Args:
        op: its name, such as "nm_mm".
        device: type of the device.
        pattern: that the op serves, where known; kernels leave some to the reference.
        forced: what the rule forces, see :class:`sparsefx.config.Rule`.
        site: the product, where known; a kernel that reads what is kept serves some.
    """
    kernel = kernel_for(op, device)
    if kernel is not None and not _left(op, device, pattern, forced, site):
        return str(kernel)
    if cost.executes_dense(op) or op.startswith(("nm_packed", "nm24")):  # these are unpacked
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
        found = _available(op, site, decision.pattern)
        if decision.lowering not in found:
            there = " and ".join(f"{kind!r} ({name})" for kind, name in found.items())
            raise ConfigError(
                f"Rule: lowering={decision.lowering!r}: {site.layer} {site.role} as "
                f"{decision.pattern} is {op} on {site.device}, which has {there}; force that, or "
                f"leave lowering=None{'; ' * bool(decision.note)}{decision.note}"
            )


def _available(op: str, site: Site, pattern: Pattern) -> dict[str, str]:
    """What can serve an op, by kind."""
    ways = (None, "reference", "cpp", "triton")
    names = [lowering_of(op, site.device, pattern, forced, site) for forced in ways]
    found = {kind_of(name): name for name in names}
    # a transposable mask loops over values: no graph can stand in for the kernel's op
    loops = op.startswith("nm_") and isinstance(pattern, NM) and pattern.transposable
    if len(found) > 1 and loops:
        del found["reference"]
    return {kind: found[kind] for kind in LOWERINGS if kind in found}


def _left(
    op: str, device: str, pattern: Pattern | None, forced: str | None, site: Site | None
) -> bool:
    """Whether the kernel that there is leaves a product to the reference."""
    if forced == "reference":
        return True
    if op == "masked_mm":
        return site is None or pattern is None or not cost.reads_kept(site, pattern, forced)
    return _beyond_kernels(op, pattern)


def _beyond_kernels(op: str, pattern: Pattern | None) -> bool:
    """Whether pairs of a convolution are scaled, or stood in for: its kernels leave both."""
    if not isinstance(pattern, Sampled) or "conv" not in op:
        return False
    scaled = pattern.random or pattern.mass is not None
    holds_scale = op == "sampled_conv_grad_weight"  # its operand was scaled when it was gathered
    return pattern.estimator == "topk_mean" or (scaled and not holds_scale)
