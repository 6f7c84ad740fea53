"""The file against the eager model: same inputs, other numbers, a tolerance that is derived."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefx import compat
from sparsefx.errors import ExportError

_SAFETY = 16  # normalisations and nonlinearities may enlarge what the products round


@dataclass(frozen=True)
class Comparison:
    """The worst error that was found, what it was held against, and where it was found."""

    error: float
    tolerance: float
    where: str = ""


def eager_outputs(model: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
    """Run the model on copies of its inputs; returns its output tensors in the file's order."""
    copies = compat.map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, tuple(args))
    with torch.no_grad():
        outputs = model(*copies)
    return [x.detach().cpu() for x in compat.leaves(outputs) if isinstance(x, Tensor)]


def fresh_inputs(args: Sequence[Any]) -> tuple[Any, ...]:
    """Draw other inputs of the same shapes and kind, the same ones every time.

    Floating tensors get the mean and spread of what was given; all others, and those with infinite
    entries (attention masks), draw from the entries that were given, which are legal ones.
    """
    generator = torch.Generator().manual_seed(0)
    return compat.map_leaves(  # type: ignore[no-any-return]
        lambda x: _redraw(x, generator) if isinstance(x, Tensor) else x, tuple(args)
    )


def _redraw(given: Tensor, generator: torch.Generator) -> Tensor:
    if given.numel() == 0:
        return given
    if given.is_floating_point() and bool(given.isfinite().all()):
        wide = given.double()
        spread = wide.std(correction=0) if given.numel() > 1 else wide.abs().mean()
        noise = torch.randn(given.shape, generator=generator, dtype=torch.float64)
        return (wide.mean() + spread * noise.to(given.device)).to(given.dtype)
    picks = torch.randint(given.numel(), given.shape, generator=generator)
    return given.flatten()[picks.to(given.device)]


def tolerance(outputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], depth: int) -> float:
    """Return the error, relative to an output's largest magnitude, that rounding explains.

    A sum of K terms that each round by eps errs like sqrt(K) * eps (random walk), and errors of
    products that follow each other add in squares, so ``depth`` is the sum of all K.
    """
    floats = [d for d in (*dtypes, *(x.dtype for x in outputs)) if d.is_floating_point]
    eps = max((torch.finfo(d).eps for d in floats), default=0.0)
    return _SAFETY * eps * math.sqrt(max(depth, 1))


class OnnxRuntime:
    """The file, loaded by onnxruntime on the CPU."""

    def __init__(self, path: str) -> None:
        """Load the file.

        Raises:
            ExportError: when the runtime refuses it.
        """
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        # its errors share no base; numpy, which has no bfloat16, raises a TypeError
        kinds = [c for c in vars(state).values() if isinstance(c, type)]
        errors: list[Any] = [c for c in kinds if issubclass(c, Exception)]
        self._errors: tuple[type[Exception], ...] = (TypeError, ValueError, *errors)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; warnings about unused initializers are no news
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except self._errors as error:
            raise _refused(error) from error
        self.name = f"onnxruntime {onnxruntime.__version__}"

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        """Run the file on ``args``.

        Raises:
            ExportError: when it doesn't take them, or the runtime fails.
        """
        names = [entry.name for entry in self._session.get_inputs()]
        tensors = [x for x in compat.leaves(tuple(args)) if isinstance(x, Tensor)]
        if len(names) != len(tensors):
            raise ExportError(
                f"the file takes {len(names)} inputs ({', '.join(names)}), the model was given "
                f"{len(tensors)} tensors"
            )
        try:
            feed = {n: x.detach().cpu().numpy() for n, x in zip(names, tensors, strict=True)}
            outputs = self._session.run(None, feed)
        except self._errors as error:
            raise _refused(error) from error
        return [torch.from_numpy(x) for x in outputs]


def _refused(error: Exception) -> ExportError:
    return ExportError(
        f"onnxruntime can't run the file: {error}; verify=False writes it without this comparison"
    )


def compare(expected: Sequence[Tensor], got: Sequence[Tensor], allowed: float) -> Comparison:
    """Return the worst error over all outputs, relative to each output's largest magnitude.

    Args:
        expected: the eager model's outputs.
        got: the runtime's, in the same order.
        allowed: tolerance of the floating outputs; integers and booleans must be equal.

    Raises:
        ExportError: when number, shapes or dtypes differ.
    """
    kinds = [[(str(x.dtype), tuple(x.shape)) for x in side] for side in (expected, got)]
    if kinds[0] != kinds[1]:
        raise ExportError(f"the file returns {kinds[1]}, the eager model returns {kinds[0]}")
    worst = Comparison(0.0, allowed)
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        error = _relative_error(a, b)
        if error > (allowed if a.is_floating_point() else 0.0) or error > worst.error:
            limit = allowed if a.is_floating_point() else 0.0
            worst = max(worst, Comparison(error, limit, f"output {i}"), key=_severity)
    return worst


def _severity(found: Comparison) -> tuple[bool, float]:
    return found.error > found.tolerance, found.error


def _relative_error(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| / max |a|; NaN equals NaN, infinity equals itself."""
    same = (a == b) | ((a != a) & (b != b))
    if bool(same.all()):
        return 0.0
    a, b = a.double(), b.double()
    apart = torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf))
    scale = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
    return float(apart.max()) / (scale or 1.0)
