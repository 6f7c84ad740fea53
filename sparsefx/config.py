"""What a user asks for: patterns, rules, a config. Frozen, checked when built, plain data.

Every object compares and hashes by value and round-trips through plain dicts (so YAML and JSON):
``SparseConfig.from_dict(config.to_dict()) == config``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sparsefx import checks, config_files
from sparsefx.errors import ConfigError
from sparsefx.patterns import NM, Dense, Masked, Pattern, Sampled
from sparsefx.schedules import RatioSchedule

if TYPE_CHECKING:
    from sparsefx.plan import Site

__all__ = [
    "NM",
    "PRESETS",
    "Dense",
    "Masked",
    "Pattern",
    "Rule",
    "Sampled",
    "SparseConfig",
    "as_config",
    "is_convolution",
    "preset",
    "reads_input",
]

_T = TypeVar("_T")

_PATTERNS: dict[str, type[Dense] | type[NM] | type[Sampled] | type[Masked]] = {
    "dense": Dense,
    "nm": NM,
    "sampled": Sampled,
    "masked": Masked,
}
Match = str | type | Callable[["Site"], bool]
LOWERINGS = ("reference", "triton", "cpp", "vendor")  # what a rule may force


@dataclass(frozen=True)
class Rule:
    """Which layers, and a policy for each of a layer's three products.

    Args:
        match: a glob on the layer's qualified name, a module type (the layer's, or that of a
            module around it), or a predicate on a
            :class:`sparsefx.plan.Site` (its forward product).
        forward: pattern of the forward product.
        grad_input: ``None`` is the derivative of what the forward computed; ``Dense()`` is the
            full product; another pattern replaces the product.
        grad_weight: likewise; never ``NM``, since neither operand is a weight. Neither gradient
            can be ``Masked``: what follows the forward does so by itself.
        lowering: ``None`` chooses what runs; ``"triton"``, ``"cpp"``, ``"vendor"`` (2:4 by
            cuSPARSELt or CUTLASS) or ``"reference"`` forces it for every sparse product of the
            layer. Where a product has no kernel of that kind on its device, compiling raises
            ConfigError.

    Raises:
        ConfigError: for a match, a pattern or a lowering that is none of these.
    """

    match: Match
    forward: Pattern = dataclasses.field(default_factory=Dense)
    grad_input: Pattern | None = None
    grad_weight: Pattern | None = None
    lowering: str | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if not (isinstance(self.match, str | type) or callable(self.match)) or self.match == "":
            raise ConfigError(
                f"Rule: match={self.match!r} must be a glob on layer names, a module type "
                "or a predicate on a site"
            )
        if not isinstance(self.forward, Pattern):
            raise ConfigError(
                f"Rule: forward={self.forward!r} must be Dense(), NM, Sampled or Masked()"
            )
        for key in ("grad_input", "grad_weight"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, Dense | NM | Sampled):
                raise ConfigError(
                    f"Rule: {key}={value!r} must be None, Dense(), NM or Sampled"
                    + (": None follows the forward's mask" if value == Masked() else "")
                )
        if isinstance(self.grad_weight, NM):
            raise ConfigError(
                f"Rule: grad_weight={self.grad_weight!r}: neither operand of that product is a "
                "weight; use None, Dense() or Sampled (NM(weight_grad='masked') masks the result)"
            )
        if isinstance(self.grad_input, NM) and (
            self.grad_input.decay or self.grad_input.weight_grad != "dense"
        ):
            raise ConfigError(
                f"Rule: grad_input={self.grad_input!r}: weight_grad and decay belong to the "
                "forward's pattern"
            )
        if self.lowering is not None:
            checks.one_of("Rule", "lowering", self.lowering, LOWERINGS)

    def sampled(self) -> Iterator[tuple[str, Sampled]]:
        """Yield the sampled ones of the three products, by key."""
        for key in ("forward", "grad_input", "grad_weight"):
            pattern = getattr(self, key)
            if isinstance(pattern, Sampled):
                yield key, pattern

    def with_ratios(self, ratios: Mapping[int, float]) -> Rule:
        """Return this rule with numbers in place of schedules, by the schedules' ids."""
        changed: dict[str, Any] = {
            key: dataclasses.replace(pattern, ratio=ratios[id(pattern.ratio)])
            for key, pattern in self.sampled()
            if isinstance(pattern.ratio, RatioSchedule)
        }
        return dataclasses.replace(self, **changed)

    def matches(self, site: Site) -> bool:
        """Return whether this rule speaks about the layer of ``site``."""
        if isinstance(self.match, str):
            return fnmatch.fnmatchcase(site.layer, self.match)
        if isinstance(self.match, type):
            return any(_is_type(found, self.match) for found in site.module_types)
        return bool(self.match(site))


def _is_type(found: type | str, wanted: type) -> bool:
    """Whether a class of the module stack is ``wanted`` or derives from it."""
    if isinstance(found, type):
        return issubclass(found, wanted)
    return found == f"{wanted.__module__}.{wanted.__qualname__}"


GraphPass = Callable[..., Any]


@dataclass(frozen=True)
class SparseConfig:
    """Everything the compiler is told.

    Args:
        rules: first match wins; ``None`` is ``NM(2, 4, transposable=True)`` on every legal layer,
            an empty sequence leaves everything dense.
        keep_output_dense: the last product on the way to an output of the graph stays dense.
        select: ``"all"`` legal sites, or ``"profitable"``: only those that the cost model expects
            to run faster on this device (the one option whose meaning depends on the machine).
        strict: a failing pass raises :class:`PassError` instead of leaving its site dense.
        codegen: ``"inductor"`` or ``"aot_eager"``, the same rewriting without Inductor.
        verify: check the graph between passes.
        passes: your own passes, run after sparsefx's rewrites, before ``cleanup``.
        freeze: in graphs without a backward, pack the weights of linear N:M layers apart from their
            products. Inductor's freezing then packs them once, as it compiles; it has to be on when
            the model is first called (``torch._inductor.config.freezing``, or the variable
            TORCHINDUCTOR_FREEZING=1; Dynamo asks before it sees any ``options``). Without it each
            call packs anew: right, and slow.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """

    rules: tuple[Rule, ...] | None = None
    keep_output_dense: bool = True
    select: str = "all"
    strict: bool = False
    codegen: str = "inductor"
    verify: bool = False
    passes: tuple[GraphPass, ...] = ()
    freeze: bool = False

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        if self.rules is not None:
            if isinstance(self.rules, Rule) or not isinstance(self.rules, list | tuple):
                raise ConfigError(
                    f"SparseConfig: rules={self.rules!r} must be None or a list of Rule"
                )
            for rule in self.rules:
                if not isinstance(rule, Rule):
                    raise ConfigError(f"SparseConfig: rules holds {rule!r}, which is not a Rule")
            object.__setattr__(self, "rules", tuple(self.rules))
        for key in ("keep_output_dense", "strict", "verify", "freeze"):
            checks.flag("SparseConfig", key, getattr(self, key))
        checks.one_of("SparseConfig", "select", self.select, ("all", "profitable"))
        checks.one_of("SparseConfig", "codegen", self.codegen, ("inductor", "aot_eager"))
        if not isinstance(self.passes, list | tuple) or not all(map(callable, self.passes)):
            raise ConfigError(f"SparseConfig: passes={self.passes!r} must be a list of functions")
        object.__setattr__(self, "passes", tuple(self.passes))

    def effective_rules(self) -> tuple[Rule, ...]:
        """Return the rules, the default ones where none were given."""
        return _DEFAULT_RULES if self.rules is None else self.rules

    @property
    def schedules(self) -> tuple[RatioSchedule, ...]:
        """The schedules that ratios follow, each object once, in the order of the rules."""
        patterns = [pattern for rule in self.effective_rules() for _, pattern in rule.sampled()]
        found = [p.ratio for p in patterns if isinstance(p.ratio, RatioSchedule)]
        return tuple({id(schedule): schedule for schedule in found}.values())

    def resolved(self, ratios: Sequence[float] | None = None) -> SparseConfig:
        """Return this config with a number in place of every schedule.

        Args:
            ratios: one for each of ``schedules``; None takes those that they stand at.
        """
        schedules = self.schedules
        if not schedules:
            return self
        now = [s.ratio for s in schedules] if ratios is None else ratios
        known = dict(zip(map(id, schedules), now, strict=True))
        rules = tuple(rule.with_ratios(known) for rule in self.effective_rules())
        return dataclasses.replace(self, rules=rules)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: strings, numbers, booleans, lists, dicts.

        Raises:
            ConfigError: for a predicate or a pass that has no importable name.
        """
        out: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("rules", "passes")
        }
        out["rules"] = None if self.rules is None else [_rule_to_dict(rule) for rule in self.rules]
        out["passes"] = [_name_of(function, "passes") for function in self.passes]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparseConfig:
        """Build a config from plain data.

        A schedule in it is built anew, at step 0; equal ones become one object, which is stepped
        once. :func:`sparsefx.ratio_schedules` returns them.

        Args:
            data: as :meth:`to_dict` returns it; missing keys take their defaults.

        Raises:
            ConfigError: naming the unknown key or the bad value.
        """
        values = _known_keys(cls, data)
        if values.get("rules") is not None:
            rules = values["rules"]
            if not isinstance(rules, list | tuple):
                raise ConfigError(f"SparseConfig: rules={rules!r} must be None or a list of rules")
            made: _Schedules = {}
            with _within("rules"):
                values["rules"] = tuple(
                    _rule_from_dict(rule, made, place) for place, rule in enumerate(rules)
                )
        passes = values.get("passes", ())
        if not isinstance(passes, list | tuple):
            raise ConfigError(f"SparseConfig: passes={passes!r} must be a list of functions")
        with _within("passes"):
            values["passes"] = tuple(_import(p) if isinstance(p, str) else p for p in passes)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SparseConfig:
        """Build a config from a YAML or JSON file, which holds what :meth:`from_dict` takes.

        Args:
            path: it ends in .yaml, .yml or .json. YAML needs the extra ``sparsefx[yaml]``.

        Raises:
            ConfigError: as :meth:`from_dict` raises it, behind the file's name, the line (YAML)
                and the path in the file: ``cfg.yaml:4: rules[0].forward.n: NM: n=9 ...``; and for
                a file that can't be read, with the reason.
        """
        document = config_files.read(path)
        try:
            return cls.from_dict(document.data)
        except ConfigError as error:
            named = _KEY.match(str(error))
            steps = error.steps if named is None else (*error.steps, named[1] or named[2])
            raise ConfigError(f"{document.where(steps)}: {error}") from error

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write this config as YAML or JSON; :meth:`from_file` builds an equal one from it.

        Args:
            path: it ends in .yaml, .yml or .json; a file that is there is replaced.

        Raises:
            ConfigError: as :meth:`to_dict` raises it, and for a file that can't be written.
        """
        config_files.write(path, self.to_dict())


# Every refusal names its key so: "NM: n=9 ...", "Rule: unknown key 'forwrad' ...".
_KEY = re.compile(r"\w+: (?:unknown key '([^']+)'|(\w+)=)")


@contextmanager
def _within(*steps: str | int) -> Iterator[None]:
    """Note on a refusal where in the plain data the refused value stands."""
    try:
        yield
    except ConfigError as error:
        error.steps = (*steps, *error.steps)
        raise


def _known_keys(cls: type, data: object) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{cls.__name__}: {data!r} must be a dict")
    allowed = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in allowed:
            raise ConfigError(
                f"{cls.__name__}: unknown key {key!r} (value {data[key]!r}); "
                f"allowed: {', '.join(allowed) or 'none'}"
            )
    return dict(data)


def _pattern_to_dict(pattern: Pattern | None) -> dict[str, Any] | None:
    if pattern is None:
        return None
    kind = next(name for name, cls in _PATTERNS.items() if type(pattern) is cls)
    return {"kind": kind, **dataclasses.asdict(pattern)}


_Schedules = dict[RatioSchedule, RatioSchedule]


def _pattern_from_dict(key: str, data: object, made: _Schedules) -> Pattern | None:
    if data is None or isinstance(data, Pattern):
        return data
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(kind, str) or kind not in _PATTERNS:
        none = "" if key == "forward" else "None, "
        raise ConfigError(
            f"Rule: {key}={data!r} must be {none}a pattern, or a dict whose 'kind' is one of "
            f"{', '.join(map(repr, _PATTERNS))}"
        )
    with _within(key):
        return _pattern_of(_PATTERNS[kind], {k: v for k, v in data.items() if k != "kind"}, made)


def _pattern_of(cls: type[Pattern], data: Mapping[str, Any], made: _Schedules) -> Pattern:
    values = _known_keys(cls, data)
    if cls is Sampled and isinstance(ratio := values.get("ratio"), Mapping):
        with _within("ratio"):
            schedule = _build(RatioSchedule, _known_keys(RatioSchedule, ratio))
        values["ratio"] = made.setdefault(schedule, schedule)
    return _build(cls, values)


def _build(cls: type[_T], values: dict[str, Any]) -> _T:
    """Call ``cls(**values)``, turning a missing required key into a ConfigError."""
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]  # every caller passes a dataclass
        if f.default is dataclasses.MISSING is f.default_factory and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{cls.__name__}: missing key {missing[0]!r} in {values!r}")
    return cls(**values)


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    match: Any = rule.match
    if not isinstance(match, str):
        kind = "type" if isinstance(match, type) else "predicate"
        match = {kind: _name_of(match, "match")}
    return {
        "match": match,
        **{k: _pattern_to_dict(getattr(rule, k)) for k in ("forward", "grad_input", "grad_weight")},
        "lowering": rule.lowering,
    }


def _rule_from_dict(data: object, made: _Schedules, place: int) -> Rule:
    if isinstance(data, Rule):
        return data
    with _within(place):
        return _rule_of(_known_keys(Rule, data), made)


def _rule_of(values: dict[str, Any], made: _Schedules) -> Rule:
    match = values.get("match")
    if isinstance(match, Mapping):
        if len(match) != 1 or next(iter(match)) not in ("type", "predicate"):
            raise ConfigError(f"Rule: match={match!r} must hold one key, 'type' or 'predicate'")
        with _within("match"):
            values["match"] = found = _import(next(iter(match.values())))
        if isinstance(found, type) != ("type" in match):
            kind = "a type" if "type" in match else "a predicate"
            raise ConfigError(f"Rule: match={match!r} is not {kind}")
    for key in ("forward", "grad_input", "grad_weight"):
        if key in values:
            values[key] = _pattern_from_dict(key, values[key], made)
    return _build(Rule, values)


def _name_of(thing: Any, key: str) -> str:
    name = f"{getattr(thing, '__module__', '?')}:{getattr(thing, '__qualname__', '?')}"
    try:
        found = _import(name)
    except ConfigError:
        found = None
    if found is not thing:
        raise ConfigError(
            f"{key}={thing!r} can't be written as plain data: it is not importable as {name!r}; "
            "define it at the top level of a module"
        )
    return name


def _import(name: object) -> Any:
    """Return the object called ``"module:qualified.name"``."""
    if not isinstance(name, str) or name.count(":") != 1:
        raise ConfigError(f"{name!r} must be a name of the form 'module:qualified.name'")
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name!r} can't be imported: {error}") from error
    return found


_DEFAULT_RULES = (Rule("*", forward=NM(2, 4, transposable=True)),)


def reads_input(site: Site) -> bool:
    """Match the layers that read the model's input, whatever their names: a rule's predicate.

    Their left operand depends on no parameter, so an embedding or a norm in front hides the input.
    """
    return site.is_input


def is_convolution(site: Site) -> bool:
    """Match convolutions of any rank: a rule's predicate."""
    return site.kind == "conv"


# A gradient wants an unbiased estimate. By the input alone, rows are chosen in the forward.
_UNBIASED = Sampled(0.3, estimator="systematic")
_BY_INPUT = Sampled(0.3, estimator="systematic", scores="input")
_PUBLISHED = Sampled(0.5, min_k=10)  # top-k; stems of 1 or 3 channels stay exact

PRESETS: dict[str, SparseConfig] = {
    "2:4": SparseConfig(rules=(Rule("*", forward=NM(2, 4)),)),
    "2:4-transposable": SparseConfig(),
    "4:8-transposable": SparseConfig(rules=(Rule("*", forward=NM(4, 8, transposable=True)),)),
    "sampled-0.3": SparseConfig(rules=(Rule("*", forward=Sampled(0.3)),)),
    "sampled-backward-0.3": SparseConfig(
        rules=(Rule("*", grad_input=_UNBIASED, grad_weight=_UNBIASED),)
    ),
    "sampled-memory-0.3": SparseConfig(rules=(Rule("*", grad_weight=_BY_INPUT),)),
    "black-box-0.3": SparseConfig(
        rules=(Rule("*", forward=Sampled(0.3), grad_input=Dense(), grad_weight=Dense()),)
    ),
    "all-three": SparseConfig(
        rules=(Rule("*", forward=NM(2, 4, transposable=True), grad_weight=_UNBIASED),)
    ),
    "adelman-mlp": SparseConfig(rules=(Rule(reads_input), Rule("*", forward=_PUBLISHED))),
    "adelman-cnn": SparseConfig(rules=(Rule("*", forward=_PUBLISHED),)),
    "adelman-resnet": SparseConfig(
        rules=(Rule(reads_input), Rule(is_convolution, forward=_PUBLISHED))
    ),
}


def preset(name: str) -> SparseConfig:
    """Return the config called ``name``; each call gives it schedules of its own.

    Raises:
        ConfigError: listing the presets there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"{name!r} is not a preset; there are: {', '.join(PRESETS)}")
    config = PRESETS[name]
    return SparseConfig.from_dict(config.to_dict()) if config.schedules else config


def as_config(value: object) -> SparseConfig:
    """Turn a config, a preset's name, a plain dict or ``None`` into a config.

    Raises:
        ConfigError: for anything else, and for bad values inside a dict.
    """
    if value is None:
        return SparseConfig()
    if isinstance(value, SparseConfig):
        return value
    if isinstance(value, str):
        return preset(value)
    if isinstance(value, Mapping):
        return SparseConfig.from_dict(value)
    raise ConfigError(
        f"config={value!r} must be a SparseConfig, a preset's name ({', '.join(PRESETS)}) or a dict"
    )
