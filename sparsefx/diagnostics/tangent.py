"""``tangent_report``: a trained network against regression with the kernel that it has learned.

At any stationary point of the squared loss, the residual r = y - f has J^T r = 0: f is the
projection of y onto what the features of the end of training span, which is ridgeless regression
with their kernel. How far a network is from that, and its kernel from the one it began with, is
what is reported here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import compat
from sparsefx.diagnostics import printing
from sparsefx.diagnostics.features import Network, features, network, one_number, plain
from sparsefx.diagnostics.ridgeless import Span, drift, relative, span
from sparsefx.errors import DiagnosticsError

GIB = 2.0**30


@dataclass(frozen=True)
class TangentRow:
    """One parameter's part in the final kernel.

    Attributes:
        parameter: qualified name.
        active: entries inside its mask.
        size: entries in all.
        share: of the trace of the final kernel.
    """

    parameter: str
    active: int
    size: int
    share: float


@dataclass(frozen=True)
class TangentReport:
    """What :func:`tangent_report` found; ``print`` it. None stands for what wasn't asked.

    Attributes:
        rows: one a parameter.
        samples: n.
        rank: of the final kernel K_T, n at most.
        initial_rank: of the initial kernel K_0.
        residual: |y - f| / |y|.
        stationarity: |J^T r| / (|J| |r|), Frobenius norm of J: 0 at a stationary point of the
            squared loss; 0 as well where r is exactly 0.
        distance: |f - K_T K_T^+ y| / |f|: 0 where the network does what ridgeless regression with
            its final kernel does. (It is 0, too, where K_T has rank n and f meets every y: then
            nothing is shown, and more samples are needed.)
        initial_distance: the same with K_0.
        drift: |K_T/|K_T| - K_0/|K_0||, in [0, sqrt 2].
        kernel: K_T, float64 [n, n].
        initial_kernel: K_0.
    """

    rows: tuple[TangentRow, ...]
    samples: int
    rank: int
    initial_rank: int | None
    residual: float | None
    stationarity: float | None
    distance: float | None
    initial_distance: float | None
    drift: float | None
    kernel: Tensor = field(repr=False, compare=False)
    initial_kernel: Tensor | None = field(repr=False, compare=False)

    @property
    def active(self) -> int:
        """Features: entries inside masks, of all chosen parameters."""
        return sum(row.active for row in self.rows)

    def drift_from(self, other: TangentReport) -> float:
        """Return the drift between two networks' final kernels, such as a dense and a sparse one's.

        Raises:
            DiagnosticsError: when the reports are about different numbers of samples.
        """
        if self.samples != other.samples:
            raise DiagnosticsError(
                f"reports of {self.samples} and {other.samples} samples: make both with the same x"
            )
        return drift(self.kernel, other.kernel.to(self.kernel.device))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json.dumps`` takes, without the kernels."""
        names = [name for name in self.__dataclass_fields__ if "kernel" not in name]
        facts = printing.plain({name: getattr(self, name) for name in names})
        rows = [printing.plain(asdict(row)) for row in self.rows]
        return facts | {"active": self.active, "rows": rows}

    def __str__(self) -> str:
        """Return a table by kernel, and one by parameter."""
        kernels: list[tuple[object, ...]] = [("final K_T", self.rank, _shown(self.distance))]
        if self.initial_rank is not None:
            first = "initial K_0", self.initial_rank, _shown(self.initial_distance)
            kernels.append(first)
        title = f"the network against regression with its kernels, {self.samples} samples"
        rows = [(r.parameter, r.active, r.size, r.share) for r in self.rows]
        heads = ("parameter", "active", "of", "share of the trace")
        facts = {"|y - f| / |y|": self.residual, "stationarity": self.stationarity}
        facts |= {"drift of the kernel": self.drift}
        lines = [f"{name}: {printing.number(v)}" for name, v in facts.items() if v is not None]
        parts = [printing.table(("kernel", "rank", "|f - K K^+ y| / |f|"), kernels, title)]
        parts += ["\n".join(lines)] * bool(lines)
        return "\n\n".join([*parts, printing.table(heads, rows, "the final kernel's features")])


def tangent_report(
    model: Any, x: Any, y: Tensor | None = None,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None, *, output: int | str | None = None,
    parameters: str | Sequence[str] = "*", cutoff: float | None = None, memory: float = 2.0,
) -> TangentReport:  # fmt: skip
    """Compare a network with ridgeless regression on its own tangent features.

    Dou & Liang, "Training neural networks as learning data-adaptive kernels: provable
    representation and approximation benefits" (JASA 116(535), 2021): at a stationary point of the
    squared loss, f is ridgeless regression with the kernel at the end of training, while the kernel
    at its start explains it badly. Features are the derivatives by the parameters that require a
    gradient, weights outside masks left out; masks that sparsifiers put on the model are seen.

    Copies of the model are measured, in evaluation mode; the model itself stays as it is.

    Args:
        model: a module, compiled or not.
        x: one input of n samples along dimension 0, a tuple of them, or a dict by name.
        y: what the squared loss wants, floating, [n] or of the output's shape. None: kernels alone.
        initial: the network at the start: a module, or a ``state_dict()`` of this one from then.
        masks: for a plain model: layer or parameter name -> bool mask in the weight's layout. They
            hold for ``initial``, too.
        output: which number a sample is the function: None where there is one; a column; "sum".
        parameters: globs on names. The last layer's alone give the kernel of its features.
        cutoff: share of the largest singular value below which one counts as 0; by default the
            larger side of J times the precision of the model's numbers.
        memory: GiB that features may take.

    Raises:
        DiagnosticsError: several outputs without ``output``; NaN or infinity in x, y, outputs or
            derivatives; too many samples for ``memory``; masks, names or shapes that don't fit.
    """
    globs = [parameters] if isinstance(parameters, str) else list(parameters)
    samples = _samples(x)
    final = network(model, masks, globs)
    first = None if initial is None else network(_start(model, initial), masks, globs)
    nets = [net for net in (final, first) if net is not None]
    _check_memory(nets, samples, memory)
    f, jacobian = features(final, x, output, samples)
    wanted = None if y is None else _wanted(y, output, samples).to(f)
    now = span(jacobian, _cutoff(final, jacobian, cutoff))
    then = None
    if first is not None:
        before = features(first, x, output, samples)[1]
        then = span(before, _cutoff(first, before, cutoff))
    return TangentReport(
        rows=_rows(final, jacobian),
        samples=samples,
        rank=now.rank,
        initial_rank=None if then is None else then.rank,
        **_compared(f, wanted, jacobian, now, then),
        drift=None if then is None else drift(now.kernel, then.kernel),
        kernel=now.kernel,
        initial_kernel=None if then is None else then.kernel,
    )


def _compared(
    f: Tensor, y: Tensor | None, jacobian: Tensor, now: Span, then: Span | None
) -> dict[str, float | None]:
    found: dict[str, float | None] = dict.fromkeys(
        ("residual", "stationarity", "distance", "initial_distance")
    )
    if y is None:
        return found
    r = y - f
    found["residual"] = relative(r, y)
    found["stationarity"] = relative(jacobian.T @ r, r) / now.norm if now.norm else 0.0
    found["distance"] = relative(f - now.fit(y), f)
    if then is not None:
        found["initial_distance"] = relative(f - then.fit(y), f)
    return found


def _rows(net: Network, jacobian: Tensor) -> tuple[TangentRow, ...]:
    active = net.active
    parts = torch.split(jacobian.square().sum(0), list(active.values()))
    total = sum(float(part.sum()) for part in parts) or 1.0
    return tuple(
        TangentRow(plain(name), active[name], w.numel(), float(part.sum()) / total)
        for (name, w), part in zip(net.weights.items(), parts, strict=True)
    )


def _cutoff(net: Network, jacobian: Tensor, cutoff: float | None) -> float:
    if cutoff is not None:
        return cutoff
    precision = max(torch.finfo(w.dtype).eps for w in net.weights.values())
    return max(jacobian.shape) * precision


def _shown(distance: float | None) -> object:
    return "-" if distance is None else distance


# --- what is passed in


def _samples(x: Any) -> int:
    tensors = compat.leaves(x)
    if not tensors or not all(isinstance(t, Tensor) and t.dim() for t in tensors):
        raise DiagnosticsError("x must be tensors with samples along dimension 0")
    sizes = {t.shape[0] for t in tensors}
    if len(sizes) > 1 or 0 in sizes:
        raise DiagnosticsError(
            f"x has {sorted(sizes)} samples: give every tensor as many, 1 or more"
        )
    for t in tensors:
        _check_finite(t, "x")
    return int(sizes.pop())


def _wanted(y: Tensor, output: int | str | None, samples: int) -> Tensor:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise DiagnosticsError(
            f"y is {kind}; pass floating targets of a squared loss, one a sample"
        )
    _check_finite(y, "y")
    return one_number(y.detach(), output, samples, "y")


def _check_finite(t: Tensor, what: str) -> None:
    if bad := int((~t.isfinite()).count_nonzero()):
        raise DiagnosticsError(f"{what} {list(t.shape)} holds {bad} NaN or infinite: drop these")


def _start(model: Any, initial: Any) -> nn.Module:
    """The network at the start, as a module."""
    if isinstance(initial, nn.Module):
        return initial
    if not isinstance(initial, Mapping):
        raise DiagnosticsError(
            f"initial is {type(initial).__name__}: pass a module or a state_dict"
        )
    copied: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model))
    try:
        copied.load_state_dict(initial)
    except RuntimeError as error:
        raise DiagnosticsError(
            f"initial doesn't fit the model: pass the state_dict of this very model from the start "
            f"of training, or a module. {error}"
        ) from error
    return copied


def _check_memory(nets: list[Network], samples: int, memory: float) -> None:
    """Three times in float64: as they come, joined, and as the SVD works on them."""
    counts = [sum(net.active.values()) for net in nets]
    if not min(counts):
        raise DiagnosticsError("every mask of the chosen parameters is empty: no features")
    active = max(counts)
    taken = samples * (active + samples * len(nets)) * 24.0 / GIB
    if taken > memory:
        raise DiagnosticsError(
            f"tangent features of {samples} samples and {active} active parameters take about "
            f"{taken:.3g} GiB, over memory={memory}: pass fewer samples, fewer parameters=, or "
            "more memory"
        )
