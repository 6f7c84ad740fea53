"""Try a plan on a copy of the model first: its outputs must stay the same within rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefx import compat
from sparsefx.errors import PermutationError
from sparsefx.permutation.axes import Axis
from sparsefx.permutation.places import Order, permuted
from sparsefx.permutation.state import State

_NOISE = 0.1


@dataclass(frozen=True)
class Checked:
    """What the check compared.

    Attributes:
        dtype: the precision in which the copy ran, "float64" where the model allows it.
        error: largest difference of an output, relative to the largest output.
        tolerance: what was allowed: eps ** (2 / 3) of the lowest precision met on the way.
    """

    dtype: str
    error: float
    tolerance: float

    def __bool__(self) -> bool:
        """Whether the outputs are the same within rounding; NaN is not."""
        return self.error <= self.tolerance


class _LowestPrecision(TorchFunctionMode):
    """Notes the coarsest floating type that any call returned."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = torch.finfo(torch.float64).eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.eps = max(self.eps, torch.finfo(out.dtype).eps)
        return out


class Trial:
    """A copy of the model in float64 whose parameters got noise, with its outputs.

    Noise tells apart what is equal in a fresh model: scales that are all 1, biases that are all 0.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Copy and run ``model``; the model itself is only read."""
        self.args, self.kwargs, self.dtype = tuple(args), kwargs, "float64"
        self.model = copy.deepcopy(model).eval().double()
        if not self._runs():  # it insists on its own precision
            self.dtype = "its own precision"
            self.model = copy.deepcopy(model).eval()
        plain, self.eps = self._run()
        if not plain:
            raise PermutationError(
                f"{type(model).__name__} returns no tensor (in containers that torch knows) that "
                "could be compared before and after; wrap it in a module that returns its tensors"
            )
        saved = {name: tensor.clone() for name, tensor in self._named()}
        self._add_noise()
        self.outputs, _ = self._run()
        if not _finite(self.outputs) and _finite(plain):
            self.outputs = plain
            with torch.no_grad():
                for name, tensor in self._named():
                    tensor.copy_(saved[name])

    def check(self, states: Sequence[State], orders: Mapping[Axis, Order]) -> Checked:
        """Permute the copy, run it, and put it back."""
        named = dict(self._named())
        saved = {state.name: named[state.name].clone() for state in states}
        try:
            apply(states, orders, lambda state: named[state.name])
            outputs, _ = self._run()
        finally:
            with torch.no_grad():
                for name, tensor in saved.items():
                    named[name].copy_(tensor)
        error = _difference(self.outputs, outputs)
        return Checked(self.dtype, error, self.eps ** (2 / 3))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def _runs(self) -> bool:
        try:
            self._run()
        except (RuntimeError, TypeError, NotImplementedError):
            return False
        return True

    def _run(self) -> tuple[list[Tensor], float]:
        lowest = _LowestPrecision()
        cast = _cast if self.dtype == "float64" else (lambda value: value)
        args, kwargs = compat.map_leaves(cast, (self.args, self.kwargs))
        with _same_noise(), torch.no_grad():
            buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
            with lowest:
                out = self.model(*args, **kwargs)
            outputs = [value for value in compat.leaves(out) if isinstance(value, Tensor)]
            outputs = [value.clone() for value in outputs]  # one may be a buffer
            for buffer, was in buffers:
                buffer.copy_(was)
        return outputs, lowest.eps

    def _add_noise(self) -> None:
        generator = torch.Generator().manual_seed(0)
        saved = set(self.model.state_dict())
        parameters = {name for name, _ in self.model.named_parameters()}
        with torch.no_grad():
            for name, tensor in self._named():
                if tensor.is_floating_point() and name in saved:
                    noise = torch.rand(tensor.shape, generator=generator).to(tensor)
                    scale = tensor.abs().mean() if name in parameters else tensor.new_tensor(0.0)
                    scale = torch.where(scale > 0, scale, 1.0) * _NOISE  # variances stay positive
                    tensor.mul_(1 + _NOISE * noise).add_(noise.flip(0) * scale)


def apply(
    states: Sequence[State], orders: Mapping[Axis, Order], target: Callable[[State], Tensor]
) -> None:
    """Write the permuted values into ``target`` of every parameter and buffer, in place."""
    with torch.no_grad():
        for state in states:
            tensor = target(state)
            tensor.copy_(permuted(tensor, state.dims, orders))
            if tensor.grad is not None:
                tensor.grad.copy_(permuted(tensor.grad, state.dims, orders))


def _cast(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


@contextmanager
def _same_noise() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in outputs)


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest difference relative to each output's largest value; infinite for other shapes."""
    worst = 0.0
    if [value.shape for value in before] != [value.shape for value in after]:
        return float("inf")
    for one, two in zip(before, after, strict=True):
        if not one.numel():
            continue
        one, two = one.to(torch.complex128), two.to(torch.complex128)
        same = (one == two) | (one.isnan() & two.isnan())
        gap = torch.where(same, 0, (one - two).abs())
        finite = one.abs()[torch.isfinite(one.abs())]
        scale = float(finite.max()) if finite.numel() else 1.0
        relative = float(gap.max()) / (scale or 1.0)
        worst = max(worst, relative) if relative == relative else float("inf")
    return worst


def culprits(trial: Trial, states: Sequence[State], orders: Mapping[Axis, Order]) -> list[Axis]:
    """Return the axes whose permutation alone changes the outputs."""
    return [axis for axis, order in orders.items() if not trial.check(states, {axis: order})]
