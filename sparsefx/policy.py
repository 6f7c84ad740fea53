"""Site -> pattern, with a reason for every no. Pure: no graph in sight, no device asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from sparsefx.config import NM, Dense, Masked, Pattern, Rule, Sampled, SparseConfig
from sparsefx.plan import Decision, Role, Site

_FLOATS = {"float64", "float32", "float16", "bfloat16"}
Profitable = Callable[[Sequence[Site], Pattern], str]


def decide(
    sites: Mapping[Role, Site],
    config: SparseConfig,
    *,
    failed: str = "",
    unprofitable: Profitable | None = None,
) -> dict[Role, Decision]:
    """Decide what each product of one layer call becomes.

    Args:
        sites: the products by role; the forward is always there.
        config: whose rules apply, first match wins.
        failed: why the layer must stay dense, if rewriting it failed before.
        unprofitable: reason to decline a pattern on this machine, or "". It is asked once for
            products that stand or fall together: a site that has the pattern, and those derived
            from it, which are worth what their sum is worth.

    Returns:
        A decision by role, for the roles in ``sites``.
    """
    forward = sites["forward"]
    blocked = failed or _impossible(sites) or _output(forward, config)
    rule = None if blocked else _first_match(forward, config)
    derived = _derived(sites, rule)
    if rule is not None and rule.lowering is not None:
        unprofitable = None  # what is forced is not weighed
    if forward.mask and not (rule and _samples(forward, rule, unprofitable, derived)):
        left = "the weight is the left operand of the product" if forward.weight == "left" else ""
        impossible = failed or _impossible(sites) or left
        return _forced(_masked(sites, rule, impossible, unprofitable), rule)
    if blocked or rule is None:
        reason = blocked or "no rule matches"
        return {role: Decision(Dense(), reason) for role in sites}
    chosen = {"forward": _own(forward, rule.forward, unprofitable, derived)}
    base = chosen["forward"].pattern
    for role in sites:
        if role == "grad_input":
            chosen[role] = _gradient(sites[role], rule.grad_input, base, unprofitable)
        elif role == "grad_weight":
            chosen[role] = _gradient(sites[role], rule.grad_weight, base, unprofitable)
    return _forced({role: chosen[role] for role in sites}, rule)


def _forced(chosen: dict[Role, Decision], rule: Rule | None) -> dict[Role, Decision]:
    """Write down what the rule forces to run, of products that are sparse."""
    if rule is None or rule.lowering is None:
        return chosen
    return {
        role: decision if decision.dense else replace(decision, lowering=rule.lowering)
        for role, decision in chosen.items()
    }


def _first_match(site: Site, config: SparseConfig) -> Rule | None:
    return next((rule for rule in config.effective_rules() if rule.matches(site)), None)


def _derived(sites: Mapping[Role, Site], rule: Rule | None) -> list[Site]:
    """Gradients that a rule gives no pattern: they follow the forward's."""
    if rule is None:
        return []
    given = {
        "forward": rule.forward,
        "grad_input": rule.grad_input,
        "grad_weight": rule.grad_weight,
    }
    return [site for role, site in sites.items() if given.get(role) is None]


def _output(forward: Site, config: SparseConfig) -> str:
    if config.keep_output_dense and forward.is_output:
        return "feeds the model's output (keep_output_dense=True)"
    return ""


def _impossible(sites: Mapping[Role, Site]) -> str:
    """Why the whole layer stays dense, whatever the rules say."""
    forward = sites["forward"]
    if forward.dtype not in _FLOATS:
        return f"dtype {forward.dtype} is not a real floating-point type"
    if forward.opaque:
        return forward.opaque
    if forward.transposed:
        return "transposed convolution"
    if forward.depthwise and not forward.mask:
        return "depthwise convolution: one input channel per group"
    if any(site.op == "convolution_backward" for site in sites.values()):
        return "its backward could not be split into products"
    return ""


# --- a layer whose mask the model holds


def _samples(
    forward: Site, rule: Rule, unprofitable: Profitable | None, derived: Sequence[Site]
) -> bool:
    """Whether a rule's sampling acts: it takes the masked weight, and goes before the mask."""
    if not isinstance(rule.forward, Sampled) or forward.depthwise:
        return False
    return not _own(forward, rule.forward, unprofitable, derived).dense


def _masked(
    sites: Mapping[Role, Site], rule: Rule | None, impossible: str, unprofitable: Profitable | None
) -> dict[Role, Decision]:
    """Decide on the products of a masked weight: the mask's zeros are there, whatever is asked."""
    if impossible:
        return {role: Decision(Dense(), impossible) for role in sites}
    asked: dict[Role, Pattern | None] = {}
    if rule is not None:
        asked = {"grad_input": rule.grad_input, "grad_weight": rule.grad_weight}
    chosen = {}
    for role, site in sites.items():
        own = asked.get(role)
        if role == "forward":
            decision = _profitably(site, Decision(Masked(), note=_not_acting(rule)), unprofitable)
        elif isinstance(own, Dense | Sampled) and not site.depthwise:
            decision = _own(site, own, unprofitable)
        elif role == "grad_input":
            derived = Decision(Masked(), derived=True, forward=Masked())
            decision = _profitably(site, derived, unprofitable)
        else:
            decision = Decision(Dense(), _MASKED_GRADIENT, derived=True, forward=Masked())
        chosen[role] = decision
    return chosen


_MASKED_GRADIENT = "the gradient that the model gives its masked weight, masked or straight-through"


def _not_acting(rule: Rule | None) -> str:
    """Which patterns of a rule a stored mask takes the place of."""
    asked = (rule.forward, rule.grad_input) if rule is not None else ()
    found = dict.fromkeys(_told(pattern) for pattern in asked if isinstance(pattern, NM))
    if not found:
        return ""
    verb = "does" if len(found) == 1 else "do"
    return f"the rule's {' and '.join(found)} {verb} not act on a weight with a stored mask"


def _told(pattern: NM) -> str:
    more = ["weight_grad='masked'"] if pattern.weight_grad == "masked" else []
    more += [f"decay={pattern.decay:g}"] if pattern.decay else []
    return f"{pattern} ({', '.join(more)})" if more else str(pattern)


def _own(
    site: Site,
    pattern: Pattern,
    unprofitable: Profitable | None,
    derived: Sequence[Site] = (),
) -> Decision:
    """Decide on a pattern that is asked for by name, with the products derived from it."""
    if isinstance(pattern, Dense):
        return Decision(pattern, "the rule says Dense()")
    if isinstance(pattern, Masked):
        return Decision(Dense(), "no stored mask was found in the graph")
    reason = nm_illegal(site, pattern) if isinstance(pattern, NM) else sampled_exact(site, pattern)
    if reason:
        return Decision(Dense(), reason)
    return _profitably(site, Decision(pattern), unprofitable, derived)


def _profitably(
    site: Site,
    decision: Decision,
    unprofitable: Profitable | None,
    derived: Sequence[Site] = (),
) -> Decision:
    if unprofitable is None:
        return decision
    reason = unprofitable((site, *derived), decision.pattern)
    return Decision(Dense(), reason) if reason else decision


def _gradient(
    site: Site, pattern: Pattern | None, base: Pattern, unprofitable: Profitable | None
) -> Decision:
    """Decide on a gradient: of its own, or derived from the forward's pattern ``base``."""
    if pattern is not None:
        return _with_decay(_own(site, pattern, unprofitable), base, site)
    if isinstance(base, Sampled):
        return Decision(base, derived=True, forward=base)
    if isinstance(base, NM) and site.role == "grad_input":
        return Decision(base, derived=True, forward=base)
    if isinstance(base, NM):
        reason = "straight-through: reaches every weight (weight_grad='dense')"
        if base.weight_grad == "masked":
            reason = "dense product, masked afterwards (weight_grad='masked')"
        return Decision(Dense(), reason, derived=True, forward=base)
    return Decision(Dense(), "the derivative of a dense forward", derived=True)


def _with_decay(own: Decision, base: Pattern, site: Site) -> Decision:
    """SR-STE's decay belongs to the weight, so it acts whatever computes the product."""
    if site.role != "grad_weight" or not isinstance(base, NM) or not base.decay:
        return own
    decay_only = NM(base.n, base.m, base.transposable, "dense", base.decay)
    return Decision(own.pattern, own.reason, own.derived, decay_only)


def nm_illegal(site: Site, pattern: NM) -> str:
    """Why this product can't have an N:M weight, or ""."""
    if site.weight is None:
        return "both operands are activations: N:M needs a weight"
    if site.weight == "both":
        return "both operands are weights"
    if site.weight == "left":
        return "the weight is the left operand of the product"
    if site.kind == "bmm" and pattern.transposable:
        return "a batch of weights has no transposable masks, only row-wise ones"
    _, width, depth = site.shape
    names = ("K", "N")
    if site.channels is not None:
        inner, outer, _, _ = site.channels
        depth, width = (inner, outer) if site.role == "forward" else (outer, inner)
        names = ("channels per group", "output channels per group")
        names = names if site.role == "forward" else (names[1], names[0])
    checks = [(names[0], depth, "")]
    if pattern.transposable:
        checks.append((names[1], width, " (transposable)"))
    for name, size, note in checks:
        if not isinstance(size, int):
            return f"{name}={size} is not known when compiling{note}"
        if size % pattern.m:
            return f"{name}={size} is not a multiple of m={pattern.m}{note}"
    return ""


def sampled_exact(site: Site, pattern: Sampled) -> str:
    """Why this product is not sampled, or ""."""
    if not site.has_backward and not pattern.inference:
        return "inference graph: exact unless Sampled(inference=True)"
    depth = sampled_depth(site)
    # a ratio of 1 is exact whatever a symbolic size will be
    if pattern.ratio == 1 or (isinstance(depth, int) and pattern.k(depth) == depth):
        return f"k = K = {depth}: exact"
    return ""


def sampled_depth(site: Site) -> int:
    """Return how many pairs there are: channels of a convolution, else K."""
    if site.channels is None:
        return site.shape[2]  # type: ignore[no-any-return]
    inner, outer, _, batch = site.channels
    by_role = {"forward": inner, "grad_input": outer, "grad_weight": batch}
    return by_role[site.role]  # type: ignore[no-any-return]
