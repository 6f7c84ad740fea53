"""One compiled program for every ratio that a schedule takes, behind one graph of Dynamo's.

    schedule.step()  ->  the next call finds another ratio, and compiles for it once

Dynamo sees nothing of it: the graph is kept as it came and is compiled again, by the same
compiler, under the modes that its guards vouch for. A forward and its backward are one program, so
a step between them changes neither.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from sparsefx import compat
from sparsefx.capture import Compilation, in_modes_of
from sparsefx.config import SparseConfig, as_config
from sparsefx.errors import ConfigError, SparsefxError
from sparsefx.rewriting import copy_graph_module
from sparsefx.schedules import RatioSchedule

if TYPE_CHECKING:
    from sparsefx.pipeline import Outcome

Key = tuple[float, ...]
Program = Callable[..., Any]
Compile = Callable[[GraphModule, Sequence[Any], Compilation], Program]

MOST_AT_ONCE = 64
_BACKEND = "sparsefx.backend"  # which imports this


class Variants:
    """What Dynamo calls in place of one program: the one of the current ratios.

    Attributes:
        current: the record of the variant that ran last; its config holds numbers.
        programs: what was compiled so far, by the ratios of ``schedules``.
        schedules: those that can change what this graph computes.
    """

    def __init__(self, gm: GraphModule, record: Compilation, compiler: Compile) -> None:
        """Keep the graph; ``record`` holds the config as it was asked for."""
        self.schedules = _acting(record)
        self.programs: dict[Key, tuple[Program, Compilation]] = {}
        self.current = record
        self._asked, self._gm, self._compiler = record, gm, compiler
        self._last: tuple[Key | None, Program] = None, gm.forward
        self._lock = threading.RLock()
        self._shelf: list[Compilation] = []
        self._place = 0

    def put_on(self, shelf: list[Compilation]) -> None:
        """Add ``current`` to the records of a compiled model; it is replaced at every switch."""
        self._shelf, self._place = shelf, len(shelf)
        shelf.append(self.current)

    def start(self, inputs: Sequence[Any]) -> None:
        """Compile what the first call needs, inside the backend's own call.

        Sizes that are symbols get guards while compiling, which Dynamo takes over only now: of such
        a graph every variant is compiled at once.

        Raises:
            ConfigError: for more than 64 of these.
        """
        program, record = self._compile(self._now(), inputs)
        self.schedules = _matching(self._asked, record.outcome, self.schedules)
        self.programs[self._now()] = program, record
        self._take(self._now())
        if compat.has_symbols(self._gm):
            for key in self._every():
                if key not in self.programs:
                    self.programs[key] = self._compile(key, inputs)

    def _every(self) -> list[Key]:
        many = math.prod(len(schedule.values) for schedule in self.schedules)
        if many > MOST_AT_ONCE:
            raise ConfigError(
                f"SparseConfig: {len(self.schedules)} schedules have {many} combinations of "
                f"ratios, and dynamic shapes compile all of them (at most {MOST_AT_ONCE}): let "
                "rules share one RatioSchedule, give fewer levels, or compile with dynamic=False"
            )
        return [*itertools.product(*(schedule.values for schedule in self.schedules))]

    def __call__(self, *args: Any) -> Any:
        """Run the current variant; a new one is compiled for these very inputs."""
        key, program = self._last
        if key != (now := self._now()):
            program = self._switch(now, args)
        return program(*args)

    def _now(self) -> Key:
        return tuple([schedule.ratio for schedule in self.schedules])

    def _switch(self, key: Key, args: Sequence[Any]) -> Program:
        with self._lock:
            if key not in self.programs:
                with compat.compiling_later(args) as inputs, in_modes_of(self._asked):
                    self.programs[key] = self._compile(key, inputs)
            self._take(key)
            return self.programs[key][0]

    def _compile(self, key: Key, inputs: Sequence[Any]) -> tuple[Program, Compilation]:
        known = dict(zip(map(id, self.schedules), key, strict=True))
        ratios = [known.get(id(s), s.ratio) for s in self._asked.config.schedules]
        record = replace(self._asked, config=self._asked.config.resolved(ratios), outcome=None)
        gm = copy_graph_module(self._gm)
        compat.copy_sources(self._gm, gm)
        return self._compiler(gm, inputs, record), record

    def _take(self, key: Key) -> None:
        program, self.current = self.programs[key]
        self._last = key, program
        if self._shelf:
            self._shelf[self._place] = self.current


def _acting(record: Compilation) -> tuple[RatioSchedule, ...]:
    """The schedules of a graph: where no gradients are recorded, nothing else is sampled."""
    schedules = record.config.schedules
    if record.grad:
        return schedules
    rules = record.config.effective_rules()
    asked = [id(p.ratio) for rule in rules for _, p in rule.sampled() if p.inference]
    return tuple(schedule for schedule in schedules if id(schedule) in asked)


def _matching(
    asked: Compilation, outcome: Outcome | None, schedules: tuple[RatioSchedule, ...]
) -> tuple[RatioSchedule, ...]:
    """Those whose rule matches a layer of the graph; all, where a cache knew its program."""
    if outcome is None:
        return schedules
    rules = asked.config.effective_rules()
    found = {next((r for r in rules if r.matches(plan.site)), None) for plan in outcome.plans}
    acting = {id(p.ratio) for rule in found if rule is not None for _, p in rule.sampled()}
    return tuple(schedule for schedule in schedules if id(schedule) in acting)


# --- whose schedules


def config_of(wrapper: Any, asked: object) -> SparseConfig:
    """Return the config of one ``torch.compile`` call; a dict makes its schedules only once.

    Dynamo gives a graph to whatever was compiled alike. Two calls whose configs are equal, each
    with a schedule of its own, are not alike: their schedules stand elsewhere.

    Raises:
        ConfigError: a bad config, or schedules that nobody could step.
    """
    known = vars(wrapper).get("_sparsefx_config", ()) if wrapper is not None else ()
    if known and known[0] is asked:
        found: SparseConfig = known[1]
        return found
    config = as_config(asked)
    if not config.schedules:
        return config
    if wrapper is None:
        if not isinstance(asked, SparseConfig):
            raise ConfigError(
                f"config={asked!r} holds a schedule that nobody could step here: give a "
                "SparseConfig whose RatioSchedule you keep"
            )
        return config
    vars(wrapper)["_sparsefx_config"] = asked, config
    if compat.made_by(wrapper, _BACKEND):  # a backend of the user's may take no more arguments
        compat.tell_apart(wrapper, [id(schedule) for schedule in config.schedules])
    return config


def ratio_schedules(source: Any) -> tuple[RatioSchedule, ...]:
    """Return the schedules of a config, or those that a compiled model follows, to step them.

        for schedule in sfx.ratio_schedules(compiled):
            schedule.step()  # after optimizer.step()

    Args:
        source: a :class:`SparseConfig`, or what ``torch.compile(..., backend="sparsefx")``
            returned: a dict or a preset's name, given as config, makes schedules of its own.

    Returns:
        Each schedule once, in the order of the rules; none where ratios are numbers.

    Raises:
        ConfigError: for anything else; a dict makes new schedules whenever it becomes a config.
        SparsefxError: for a model that another backend compiled.
    """
    if isinstance(source, SparseConfig):
        return source.schedules
    if not compat.is_compiled(source):
        raise ConfigError(
            f"ratio_schedules: {type(source).__name__} is neither a SparseConfig nor compiled; of "
            "a dict take SparseConfig.from_dict first, and compile that"
        )
    wrapper: Any = compat.wrapper_of(source)
    if hasattr(wrapper, "_sparsefx_config"):
        known: SparseConfig = wrapper._sparsefx_config[1]
        return known.schedules
    if compat.made_by(wrapper, _BACKEND):
        return config_of(wrapper, compat.options_of(wrapper).get("config")).schedules
    if hasattr(wrapper, "_sparsefx"):  # by way of a backend of the user's
        return ()
    raise SparsefxError(
        f"this {type(source).__name__} was not compiled by sparsefx: torch.compile(model, "
        'backend="sparsefx")'
    )
