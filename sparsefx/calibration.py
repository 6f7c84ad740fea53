"""``calibrate``: times a small sweep of layers on this device, and writes the paces that fit it."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsefx import compat, cost
from sparsefx.config import Rule, Sampled, SparseConfig
from sparsefx.cost.calibrated import VARIABLE, default_path, device_name, unused
from sparsefx.errors import ConfigError, SparsefxWarning
from sparsefx.plan import Role, Site

_DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
_MOST_SPREAD = 1.5  # 80th percentile / 20th, of the typical step
_MOST_OFF = 1.0  # of the worst step, as a share of its time; an idle machine has 0.8
_WARM_UP = 3  # rounds: the first ones compile and fill the allocator
_Step = Callable[[], object]
_Asked = tuple[Role, float]


@dataclass(frozen=True)
class Layer:
    """A linear layer over ``rows``, or a convolution of ``rows`` square images."""

    rows: int
    outputs: int
    inputs: int
    image: int = 0
    taps: int = 1

    def __str__(self) -> str:
        """Name its sizes."""
        if not self.image:
            return f"linear {self.rows}x{self.outputs}x{self.inputs}"
        size = f"{self.inputs}-{self.outputs}, {self.image}x{self.image}, batch {self.rows}"
        return f"conv {self.taps}x{self.taps} {size}"

    @property
    def kind(self) -> str:
        """Which paces it tells of."""
        return "conv" if self.image else "mm"

    def make(self) -> tuple[nn.Module, Tensor]:
        """Return the layer and an input."""
        if not self.image:
            return nn.Linear(self.inputs, self.outputs), torch.randn(self.rows, self.inputs)
        layer = nn.Conv2d(self.inputs, self.outputs, self.taps, padding=self.taps // 2)
        return layer, torch.randn(self.rows, self.inputs, self.image, self.image)

    def sites(self, dtype: str, device: str) -> dict[Role, Site]:
        """Its products, as the compiler finds them."""
        m, n, k = self.rows, self.outputs, self.inputs
        channels = None
        if self.image:
            channels = (k, n, 1, self.rows)
            m, k = m * self.image**2, k * self.taps**2
        shapes: dict[Role, tuple[int, int, int]] = {
            "forward": (m, n, k), "grad_input": (m, k, n), "grad_weight": (k, n, m),
        }  # fmt: skip
        kind = "conv" if self.image else "mm"
        return {
            role: Site("", role, kind, kind, shape, dtype, device, 0, channels=channels)  # type: ignore[arg-type]
            for role, shape in shapes.items()
        }


SWEEP = (
    Layer(256, 256, 256), Layer(1024, 256, 256), Layer(4096, 128, 128), Layer(1024, 64, 512),
    Layer(64, 1024, 1024), Layer(1024, 1024, 1024),
    Layer(16, 32, 32, 16, 3), Layer(8, 64, 64, 28, 3), Layer(8, 256, 64, 28), Layer(8, 64, 256, 28),
    Layer(8, 128, 128, 14, 3),
)  # fmt: skip
QUICK = (
    Layer(256, 256, 256), Layer(2048, 128, 128), Layer(512, 512, 512),
    Layer(8, 32, 32, 16, 3), Layer(4, 64, 64, 28, 3), Layer(4, 128, 64, 14),
)  # fmt: skip
_ASKED: tuple[_Asked, ...] = (
    ("forward", 0.1), ("forward", 0.5), ("grad_input", 0.3), ("grad_weight", 0.3),
)  # fmt: skip


def calibrate(
    device: str = "cpu", quick: bool = False, path: str | os.PathLike[str] | None = None
) -> cost.Calibration:
    """Measure this device, and write what ``select="profitable"`` and reports go by from then on.

    Layers run forward and backward, dense and sampled, in turns. Run it on a machine that does
    nothing else: some minutes, with ``quick`` some seconds.

    Args:
        device: "cpu" or "cuda".
        quick: fewer and smaller layers, without Inductor's code generation.
        path: where to write; None is the file that the environment variable SPARSEFX_CALIBRATION
            names, else one for the device in the user's cache folder. Only these two are read
            again by later compilations.

    Returns:
        The calibration; printed, it shows predicted beside measured times and the worst error.

    Raises:
        ConfigError: for a device that isn't one of these two, or isn't here.

    Warns:
        SparsefxWarning: where times spread so much, or are fitted so badly, that something else
            must have been running; nothing is written then.
    """
    if device not in _DTYPES or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"calibrate: device={device!r} must be 'cpu', or 'cuda' on such a machine"
        )
    codegen = "aot_eager" if quick else "inductor"
    known = device_name(device)  # of the threads that are measured
    fits: dict[tuple[str, str], cost.Fit] = {}
    measured: list[cost.Measured] = []
    spreads: list[float] = []
    with torch.random.fork_rng(), torch.enable_grad(), compat.many_recompiles(), unused():
        torch.manual_seed(0)
        for dtype in _DTYPES[device]:
            for kind in ("mm", "conv"):
                layers = [one for one in (QUICK if quick else SWEEP) if one.kind == kind]
                samples = []
                for one in layers:
                    steps = list(_steps(one, dtype, device, codegen))
                    dense, *sparse = _race(steps, 7 if quick else 15, device)
                    spreads += [times.high / times.low for times in (dense, *sparse)]
                    samples += [
                        (one, asked, _sample(one, asked, dtype, device, dense.low, times.low))
                        for asked, times in zip(_ASKED, sparse, strict=True)
                    ]
                fits[kind, dtype] = cost.fit([sample for *_, sample in samples])
                measured += [_measured(*one, dtype, fits[kind, dtype]) for one in samples]
    found = cost.Calibration(device, known, fits, tuple(measured), torch.__version__, codegen)
    if not _disturbed(spreads, found):
        found.save(path or os.environ.get(VARIABLE) or default_path(device))
    return found


def _disturbed(spreads: Sequence[float], found: cost.Calibration) -> bool:
    """Warn, where times spread or can't be fitted, that something else must have been running."""
    spread, worst = statistics.median(spreads), found.worst
    off = 0.0 if worst is None else worst.error
    if spread <= _MOST_SPREAD and off <= _MOST_OFF:
        return False
    warnings.warn(
        f"sparsefx.calibrate: a typical step took {spread:.1f} times as long at times, and the "
        f"paces that fit best are off by up to {100 * off:.0f}%: something else was running. "
        "Nothing was written; calibrate again on an idle machine (or save what was returned)",
        SparsefxWarning,
        stacklevel=3,
    )
    return True


# --- measuring


class _Spread(NamedTuple):
    """20th and 80th percentile; what is disturbed only grows, so the lower one is a step's time."""

    low: float
    high: float


def _steps(layer: Layer, dtype: str, device: str, codegen: str) -> Iterator[_Step]:
    """A forward and backward: dense, then everything that is asked."""
    for asked in (None, *_ASKED):
        module, x = layer.make()
        where = torch.device(device), getattr(torch, dtype)
        module, x = module.to(*where), x.to(*where).requires_grad_()
        compiled = compat.compile_apart(module, codegen)
        if asked is not None:
            sampled: dict[str, Any] = {asked[0]: Sampled(asked[1])}
            config = SparseConfig(
                (Rule("*", **sampled),), keep_output_dense=False, strict=True, codegen=codegen
            )
            compiled = compat.compile_apart(module, "sparsefx", options={"config": config})
        grad = torch.randn_like(module(x)).detach()
        yield partial(_step, compiled, [x, *module.parameters()], grad)


def _step(compiled: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> object:
    return torch.autograd.grad(compiled(inputs[0]), inputs, grad)


def _race(steps: Sequence[_Step], rounds: int, device: str) -> list[_Spread]:
    """Microseconds of each, in turns; the first of a round changes with the round."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times: list[list[float]] = [[] for _ in steps]
    for turn in range(_WARM_UP + rounds):
        for i in range(len(steps)):
            at = (turn + i) % len(steps)
            wait()
            before = time.perf_counter()
            steps[at]()
            wait()
            if turn >= _WARM_UP:
                times[at].append((time.perf_counter() - before) * 1e6)
    return [_Spread(*statistics.quantiles(own, n=5, method="inclusive")[::3]) for own in times]


# --- fitting


def _sample(
    layer: Layer, asked: _Asked, dtype: str, device: str, dense: float, sparse: float
) -> cost.Sample:
    role, ratio = asked
    sites = layer.sites(dtype, device)
    # gradients follow a sampled forward
    sampled = list(sites.values()) if role == "forward" else [sites[role]]
    full = [site for site in sites.values() if site not in sampled]
    work = cost.total(map(cost.dense_work, full)).plus(cost.sampled_work(sampled, Sampled(ratio)))
    return cost.Sample(cost.total(map(cost.dense_work, sites.values())), work, dense, sparse)


def _measured(
    layer: Layer, asked: _Asked, sample: cost.Sample, dtype: str, fit: cost.Fit
) -> cost.Measured:
    return cost.Measured(
        kind=layer.kind,
        dtype=dtype,
        layer=str(layer),
        role=asked[0],
        ratio=asked[1],
        dense_us=round(sample.dense_us, 2),
        sparse_us=round(sample.sparse_us, 2),
        predicted_dense_us=round(fit.time(sample.dense), 2),
        predicted_us=round(fit.time(sample.sparse), 2),
    )
