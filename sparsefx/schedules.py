"""``RatioSchedule``: a sampled ratio that changes during training, among a few compiled values."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsefx import checks
from sparsefx.errors import ConfigError

MAX_LEVELS = 64


@dataclass(frozen=True)
class RatioSchedule:
    """A ratio by optimizer step: ``Sampled(RatioSchedule(0.5, 0.1, steps=1000, tail=100))``.

    A compiled program has one fixed ratio, so the curve is rounded to ``levels`` values, spaced
    evenly from ``start`` to ``end`` (both are levels; rounded to 6 digits). Each is compiled
    when it is first used: a switch costs one compilation, and never more than ``len(values)``.

    ====================================  ====================================================
    step ``t``                            ratio
    ====================================  ====================================================
    ``t < delay``                         ``start``
    ``delay <= t < delay + steps``        the level of ``shape`` at ``(t - delay) / steps``
    ``t >= delay + steps``                ``end``
    ``t >= delay + steps - tail``         1.0, whatever the shape says, if ``tail > 0``
    ====================================  ====================================================

    ``"linear"`` and ``"cosine"`` (half a wave: slow, fast, slow) take the level nearest to their
    curve, of two equally near the earlier: never off by more than half a gap between levels, and at
    ``end`` half a gap before ``delay + steps``. ``"step"`` holds every level for
    ``steps / levels`` steps, ``end`` too. ``switches`` lists what that comes to.

    ``steps`` is meant to be the training's length (less ``delay``); a tail then makes its last
    ``tail`` steps, and all that follow, exact products: k = K, no sampling. It changes nothing
    before it: the curve is cut off, not squeezed, so a long tail may leave ``end`` unused.

    Like a learning rate's scheduler: call :meth:`step` after ``optimizer.step()``, once for a
    schedule, however many rules share it; keep :meth:`state_dict` in the checkpoint. Under DDP
    every rank steps its own. What was given compares and hashes by value; the steps taken don't.

    Args:
        start: the ratio at first, ``0 < start <= 1``.
        end: the ratio in the end, ``0 < end <= 1``; above ``start`` it ramps up.
        steps: optimizer steps from ``start`` to ``end``, at least 1.
        shape: ``"cosine"``, ``"linear"`` or ``"step"``.
        levels: how many values the ratio takes, ``2 <= levels <= 64``.
        delay: steps at ``start`` before that.
        tail: exact steps at the end, ``0 <= tail <= steps``; 0: no exact products at all.

    Raises:
        ConfigError: for values outside these ranges, naming the key.
    """

    start: float
    end: float
    steps: int
    shape: str = "cosine"
    levels: int = 4
    delay: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        """Check every value; ratios become floats."""
        for key in ("start", "end"):
            value = getattr(self, key)
            if not 0 < checks.number("RatioSchedule", key, value) <= 1:
                raise ConfigError(f"RatioSchedule: {key}={value!r} must be in (0, 1]")
            object.__setattr__(self, key, float(value))
        checks.one_of("RatioSchedule", "shape", self.shape, ("cosine", "linear", "step"))
        self._whole("steps", 1, None)
        self._whole("levels", 2, MAX_LEVELS)
        self._whole("delay", 0, None)
        self._whole("tail", 0, self.steps)
        self._move_to(0)

    def _whole(self, key: str, least: int, most: int | None) -> None:
        value = getattr(self, key)
        checks.integer("RatioSchedule", key, value)
        if value < least or (most is not None and value > most):
            limit = f"at least {least}" if most is None else f"between {least} and {most}"
            raise ConfigError(
                f"RatioSchedule: {key}={value} must be {limit}"
                + (" (the number of steps)" if key == "tail" else "")
            )

    # --- what the curve says

    def at(self, step: int) -> float:
        """Return the ratio at an optimizer step, wherever the schedule stands.

        Raises:
            ConfigError: for a step that is no int, or negative.
        """
        checks.integer("RatioSchedule", "step", step)
        if step < 0:
            raise ConfigError(f"RatioSchedule: step={step} must be at least 0")
        if self.tail and step >= self._tail_from:
            return 1.0
        return self._value(self._level(step))

    @property
    def switches(self) -> tuple[tuple[int, float], ...]:
        """(step, ratio) wherever a training that starts at step 0 takes a new ratio."""
        last = self.delay + self.steps
        steps = range(self._tail_from if self.tail else last + 1)
        found = dict.fromkeys(
            bisect_left(steps, level, key=self._level) for level in range(self.levels)
        )
        starts = [step for step in found if step < len(steps)]
        ratios = [(step, self.at(step)) for step in (*starts, *([len(steps)] * bool(self.tail)))]
        return tuple(pair for i, pair in enumerate(ratios) if i == 0 or pair[1] != ratios[i - 1][1])

    @property
    def values(self) -> tuple[float, ...]:
        """The ratios that are ever taken, each once: what will be compiled, at most."""
        return tuple(dict.fromkeys(ratio for _, ratio in self.switches))

    @property
    def _tail_from(self) -> int:
        return self.delay + self.steps - self.tail

    def _level(self, step: int) -> int:
        """Number of the level at a step, without the tail; never falls."""
        done, gaps = min(max(step - self.delay, 0), self.steps), self.levels - 1
        if self.shape == "step":
            return min(done * self.levels // self.steps, gaps)
        if self.shape == "linear":  # in ints: the nearest, of two the earlier
            return -((self.steps - 2 * done * gaps) // (2 * self.steps))
        curve = (1 - math.cos(math.pi * done / self.steps)) / 2
        return math.ceil(round(curve * gaps - 0.5, 9))

    def _value(self, level: int) -> float:
        if level in (0, self.levels - 1):
            return self.end if level else self.start
        value = self.start + (self.end - self.start) * level / (self.levels - 1)
        short = float(f"{value:.6g}")  # 0.7, not 0.7000000000000001
        return min(max(short, min(self.start, self.end)), max(self.start, self.end))

    # --- where a training stands

    def step(self) -> None:
        """Go on by one: call it after ``optimizer.step()``."""
        self._move_to(self.last_step + 1)

    @property
    def last_step(self) -> int:
        """How often :meth:`step` was called: the number of optimizer steps behind us."""
        taken: int = vars(self)["_taken"]
        return taken

    @property
    def ratio(self) -> float:
        """The ratio now."""
        ratio: float = vars(self)["_ratio"]  # kept: every call of a compiled model reads it
        return ratio

    def _move_to(self, step: int) -> None:
        ratio = self.at(step)  # no dataclass fields: neither compared nor written to dicts
        vars(self).update(_taken=step, _ratio=ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: the step, and the schedule's arguments to check against."""
        return {"step": self.last_step, **dataclasses.asdict(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another schedule stood; its arguments must be the same, as far as given.

        Raises:
            ConfigError: for a missing or bad step, or another argument; nothing is changed then.
        """
        if not isinstance(state, Mapping) or "step" not in state:
            raise ConfigError(
                f"RatioSchedule: state {state!r} must be a dict with a 'step', as state_dict() "
                "returns it"
            )
        own = dataclasses.asdict(self)
        for key, value in state.items():
            if key != "step" and (key not in own or own[key] != value):
                here = own.get(key, "no such key")
                raise ConfigError(
                    f"RatioSchedule: state has {key}={value!r}, this schedule {here!r}; build it "
                    "as it was, or load {'step': n} alone to go on under this one"
                )
        self._move_to(state["step"])
