"""Try smaller models: their outputs must be those of the masked one; what fails stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import compat
from sparsefx.compact.shrink import Shrinker
from sparsefx.errors import CompactError
from sparsefx.permutation.axes import Axis

TOLERANCE = 1e-5
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Reference:
    """The masked model in float64, where it runs in that, and its outputs."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run a copy of ``model`` in eval mode.

        Raises:
            CompactError: it returns no tensors, or others the second time.
        """
        self.args, self.kwargs, self.dtype = tuple(args), dict(kwargs), "float64"
        self.model = copy.deepcopy(model).eval().double()
        try:
            self.outputs = self.run(self.model)
        except FAILURES:  # it insists on its own precision
            self.dtype, self.model = "its own precision", copy.deepcopy(model).eval()
            self.outputs = self.run(self.model)
        if not self.outputs:
            raise CompactError(
                f"{type(model).__name__} returns no tensor (in containers that torch knows) that "
                "could be compared before and after; wrap it in a module that returns its tensors"
            )
        error, worst = self.error(self.run(self.model))
        if not error <= TOLERANCE:
            raise CompactError(
                f"{worst} of {type(model).__name__} differs by {error:.1e} between two runs on the "
                "same inputs in eval mode; give args that make it finite and deterministic"
            )

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs in the precision of the copy."""
        cast = _double if self.dtype == "float64" else (lambda value: value)
        found: tuple[tuple[Any, ...], dict[str, Any]] = compat.map_leaves(
            cast, (self.args, self.kwargs)
        )
        return found

    def run(self, model: nn.Module) -> list[Tensor]:
        """Return the outputs of a model; seeds and buffers stay."""
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        args, kwargs = self.inputs()
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
            found = [v for v in compat.leaves(model(*args, **kwargs)) if isinstance(v, Tensor)]
            found = [value.clone() for value in found]
            for buffer, was in saved:
                buffer.copy_(was)
        return found

    def error(self, outputs: Sequence[Tensor]) -> tuple[float, str]:
        """Return the largest difference, relative to its output's largest value, and where."""
        if [v.shape for v in outputs] != [v.shape for v in self.outputs]:
            return float("inf"), "the shape of an output"
        worst, where = 0.0, "no output"
        for i, (was, now) in enumerate(zip(self.outputs, outputs, strict=True)):
            error = _relative(was, now)
            if not error <= worst:
                worst, where = error, f"output {i} {list(was.shape)}"
        return worst, where


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _relative(was: Tensor, now: Tensor) -> float:
    if not was.numel():
        return 0.0
    if not was.is_complex():
        was, now = was.double(), now.double()
    gap = (was - now).abs_().masked_fill_(was == now, 0.0).max()  # infinities may be equal
    sizes = was.abs()
    scale = float(sizes.masked_fill_(~torch.isfinite(sizes), 0.0).max())
    return float(gap) / (scale or 1.0) if float(gap) == float(gap) else float("inf")


Removed = dict[Axis, Tensor]


@dataclass
class Trial:
    """Finds the most that can be removed.

    Attributes:
        reference: the masked model.
        shrinker: builds smaller ones.
        round_to: keep a multiple of so many channels.
        refused: axes that must stay whole after all, with the reason.
        keep: which numbers the model that passed kept, see :meth:`Shrinker.build`.
        error: of the model that passed.
    """

    reference: Reference
    shrinker: Shrinker
    round_to: int
    refused: dict[Axis, str] = field(default_factory=dict)
    keep: bool = False
    error: float = 0.0

    def settle(self) -> Removed:
        """Return the channels that go; the axes that break the model are found by halving.

        Raises:
            CompactError: nothing passes.
        """
        axes = sorted(self._removed(self.shrinker.search.axes), key=self._kind)
        if self._passes(axes):
            return self._removed(axes)
        good = self._passing(axes)
        if not self._passes(good):  # each half alone did
            good = self._one_by_one(good)
        if not self._passes(good):
            raise CompactError(
                f"a copy without {self._names(good)} differs by {self.error:.1e} from the masked "
                f"model ({TOLERANCE:.0e} is allowed); nothing was changed. Check that the model "
                "is deterministic in eval mode, or report it"
            )
        return self._removed(good)

    def _removed(self, axes: Iterable[Axis]) -> Removed:
        return self.shrinker.search.removable(set(axes), self.round_to)

    def _kind(self, axis: Axis) -> tuple[str, int]:
        """Sort like axes of different blocks next to one another: they fail together."""
        names = self._members(axis)
        return ".".join(p for p in names[0].split(".") if not p.isdigit()), axis.size

    def _members(self, axis: Axis) -> list[str]:
        states = self.shrinker.known.states.values()
        layout = self.shrinker.layout
        return [
            s.name for s in states
            if s.read and any(p.axis is axis for d in s.dims for p in layout.places(d))
        ]  # fmt: skip

    def _names(self, axes: Iterable[Axis]) -> str:
        return ", ".join(dict.fromkeys(n for axis in axes for n in self._members(axis))) or "masks"

    def _passing(self, axes: Sequence[Axis]) -> list[Axis]:
        if len(axes) == 1:
            return list(axes) if self._passes(axes) else []
        half = len(axes) // 2
        parts = [axes[:half], axes[half:]]
        return [a for part in parts for a in (part if self._passes(part) else self._passing(part))]

    def _one_by_one(self, axes: Sequence[Axis]) -> list[Axis]:
        good: list[Axis] = []
        for axis in axes:
            if self._passes([*good, axis], axis):
                good.append(axis)
        return good

    def _passes(self, axes: Sequence[Axis], blamed: Axis | None = None) -> bool:
        """Whether the model without these channels computes the same; else note why not."""
        removed = self._removed(axes)
        reasons = []
        for self.keep in (False, True):
            try:
                small = self.shrinker.build(self.reference.model, removed, self.keep)
                self.error, where = self.reference.error(self.reference.run(small))
            except (CompactError, *FAILURES) as error:
                reasons.append(f"the model doesn't run without: {_first_line(error)}")
                continue
            if self.error <= TOLERANCE:
                return True
            reasons.append(f"without, {where} differs by {self.error:.1e}: sizes in its code?")
        blamed = blamed if blamed is not None else axes[0] if len(axes) == 1 else None
        if blamed is not None:
            self.refused[blamed] = reasons[0]
        return False


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:160]
