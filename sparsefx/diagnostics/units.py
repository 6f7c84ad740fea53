"""What can be tuned: a layer's own sampled patterns, each with the products that follow it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sparsefx import cost, policy
from sparsefx.config import Rule, SparseConfig
from sparsefx.diagnostics.cuts import Decisions, changed
from sparsefx.diagnostics.programs import Call
from sparsefx.errors import DiagnosticsError
from sparsefx.plan import Role

Key = Literal["forward", "grad_input", "grad_weight"]
KEYS: tuple[Key, ...] = ("forward", "grad_input", "grad_weight")


@dataclass(eq=False)
class Unit:
    """One ratio to be chosen.

    Attributes:
        layer: the layer's name.
        key: the rule's product that is sampled.
        rule: the template's rule that matches the layer.
        calls: every call of the layer.
    """

    layer: str
    key: Key
    rule: Rule
    calls: list[Call] = field(default_factory=list)

    def roles(self, call: Call) -> list[Role]:
        """Return the products that the ratio acts on: its own, and gradients that follow it."""
        follow = [r for r in call.sites if r != "forward" and getattr(self.rule, r) is None]
        own: list[Role] = [self.key] if self.key in call.sites else []
        return own + (follow if self.key == "forward" else [])

    def decisions(self, config: SparseConfig, ratio: float) -> dict[Call, Decisions]:
        """Return what becomes of these products at a ratio."""
        asked = replace(
            config, rules=(replace(with_ratio(self.rule, {self.key: ratio}), match="*"),)
        )
        profitable = cost.unprofitable if config.select == "profitable" else None
        found: dict[Call, Decisions] = {}
        for call in self.calls:
            every = policy.decide(call.sites, asked, failed=call.failed, unprofitable=profitable)
            found[call] = {role: every[role] for role in self.roles(call)}
        return found

    def dense_flops(self) -> int:
        """Operations of the full products."""
        return sum(
            cost.dense_flops(call.sites[role]) for call in self.calls for role in self.roles(call)
        )


def flops(decided: dict[Call, Decisions]) -> int:
    """Operations that decisions leave, as the compiler's report counts them."""
    total = 0
    for call, decisions in decided.items():
        for role, decision in decisions.items():
            follows = call.sites["forward"] if decision.derived else None
            total += cost.sparse_flops(call.sites[role], decision.pattern, follows)
    return total


def acts(decided: dict[Call, Decisions]) -> bool:
    """Whether any product is changed."""
    return any(changed(d) for decisions in decided.values() for d in decisions.values())


def with_ratio(rule: Rule, ratios: dict[Key, float]) -> Rule:
    """Return a rule with other ratios for some of its sampled products."""
    other: dict[str, Any] = {
        key: replace(pattern, ratio=ratios[key]) for key, pattern in rule.sampled() if key in ratios
    }
    return replace(rule, **other)


def units_of(calls: Iterable[Call], config: SparseConfig) -> list[Unit]:
    """Return what a template's rules let be tuned, in the order of the calls.

    Raises:
        DiagnosticsError: for calls of one layer that different rules match, since rules by the
            layer's name can't tell them apart, and for a sampled pattern that a mass sizes.
    """
    found: dict[tuple[str, Key], Unit] = {}
    rules: dict[str, Rule | None] = {}
    for call in calls:
        forward = call.sites["forward"]
        rule = next((r for r in config.effective_rules() if r.matches(forward)), None)
        if rules.setdefault(call.layer, rule) != rule:
            raise DiagnosticsError(
                f"calls of layer {call.layer!r} match different rules, {rules[call.layer]!r} and "
                f"{rule!r}, which rules by its name can't tell apart: give it one rule"
            )
        for key, pattern in rule.sampled() if rule is not None else ():
            if pattern.mass is not None:
                raise DiagnosticsError(
                    f"{key}={pattern!r} of layer {call.layer!r} takes as many pairs as hold a "
                    "mass: give a ratio in its place, which is then tuned"
                )
            assert rule is not None
            place: Key = next(k for k in KEYS if k == key)
            found.setdefault((call.layer, place), Unit(call.layer, place, rule)).calls.append(call)
    return list(found.values())
