"""``gradient_error``: gradients of a whole model under a config, against exact ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefx import compat
from sparsefx.config import Sampled, SparseConfig, as_config
from sparsefx.diagnostics import printing
from sparsefx.diagnostics.running import Loss, gradients, parameters_of, undisturbed
from sparsefx.errors import DiagnosticsError


@dataclass(frozen=True)
class GradientError:
    """How far one parameter's gradient g is from the exact one, e.

    Attributes:
        parameter: qualified name.
        norm: |e| (2-norm), the scale of the others.
        mean: of the entries of g - e, over all draws.
        std: of these entries.
        max: largest |g - e| of an entry.
        relative: root mean square over draws of |g - e| / |e|.
        cosine: mean over draws of the cosine between g and e.
        bias: |mean over draws of g, less e| / |e|; for an unbiased estimator it is about
            noise / sqrt(draws).
        noise: root mean square over draws of |g - mean g| / |e|; 0 where nothing is random.
    """

    parameter: str
    norm: float
    mean: float
    std: float
    max: float
    relative: float
    cosine: float
    bias: float
    noise: float


@dataclass(frozen=True)
class GradientErrors:
    """What :func:`gradient_error` found: rows by parameter, their total, a table, a picture."""

    rows: tuple[GradientError, ...]
    draws: int
    total: GradientError

    def __getitem__(self, parameter: str) -> GradientError:
        """Return the row of a parameter.

        Raises:
            DiagnosticsError: listing the parameters there are.
        """
        for row in self.rows:
            if row.parameter == parameter:
                return row
        names = ", ".join(row.parameter for row in self.rows)
        raise DiagnosticsError(f"no parameter {parameter!r}; there are: {names}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        rows = [asdict(row) for row in self.rows]
        return {"draws": self.draws, "total": asdict(self.total), "rows": rows}

    def __str__(self) -> str:
        """Return a table."""
        shown = ("norm", "relative", "cosine", "bias", "noise", "mean", "std", "max")
        return printing.table(
            ("parameter", *shown),
            [[r.parameter, *(getattr(r, key) for key in shown)] for r in (*self.rows, self.total)],
            "gradients against exact ones, "
            + ("one draw" if self.draws == 1 else f"{self.draws} draws"),
        )

    def plot(self, path: str) -> None:
        """Draw relative error, bias and noise by parameter into a picture (png, svg, pdf).

        Raises:
            DiagnosticsError: when matplotlib isn't installed.
        """
        keys = ("relative", "bias", "noise")
        series = {key: [getattr(row, key) for row in self.rows] for key in keys}
        names = [row.parameter for row in self.rows]
        printing.bars(path, names, series, "|error| / |exact gradient|")


def gradient_error(
    model: Any, batch: Any, config: object, *, loss: Loss | None = None, draws: int = 8,
    seed: int = 0,
) -> GradientErrors:  # fmt: skip
    """Compare a model's gradients under a config with exact ones, parameter by parameter.

    Every layer is as the config says at once, so errors of deeper layers are in it. Dropout is
    switched off meanwhile. Parameters, their ``.grad``, buffers, modes and random state stay as
    they were, whatever happens.

    Args:
        model: a module, compiled or not.
        batch: one input, a tuple of them, or a dict by name.
        config: as for the backend; its ``codegen`` is not used, nothing is generated.
        loss: function of (model, batch) to one number; by default the model's own output, or the
            ``loss`` of that.
        draws: how often random estimators draw; a config without them runs once.
        seed: draws take seed, seed + 1, ...

    Raises:
        DiagnosticsError: for a model without gradients, a loss that is no number, a model that is
            random in itself, bad counts.
        ConfigError: for a bad config.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise DiagnosticsError(f"draws={draws!r} must be an int, at least 1")
    asked = dataclasses.replace(as_config(config), codegen="aot_eager")
    with compat.as_written(model) as plain:
        parameters_of(plain)
        with undisturbed(plain), compat.many_recompiles():
            exact = gradients(plain, plain, batch, loss, seed)
            _refuse_randomness(exact, gradients(plain, plain, batch, loss, seed + 1), plain)
            options: Any = {"config": asked}
            run = torch.compile(plain, backend="sparsefx", options=options)
            count = draws if _is_random(asked) else 1
            found = [gradients(plain, run, batch, loss, seed + i) for i in range(count)]
    rows = [_row(name, exact[name], [g[name] for g in found]) for name in exact]
    return GradientErrors(tuple(rows), count, _total(exact, found))


def _is_random(config: SparseConfig) -> bool:
    patterns = [
        pattern
        for rule in config.effective_rules()
        for pattern in (rule.forward, rule.grad_input, rule.grad_weight)
    ]
    return any(isinstance(pattern, Sampled) and pattern.random for pattern in patterns)


def _refuse_randomness(one: Mapping[str, Tensor], other: Mapping[str, Tensor], model: Any) -> None:
    for name in one:
        if not torch.equal(one[name], other[name]):
            raise DiagnosticsError(
                f"the gradient of {name!r} differs between two seeds: {type(model).__name__} draws "
                "random numbers itself (dropout that is no module?); call model.eval(), or set its "
                "dropout to 0"
            )


def _row(name: str, exact: Tensor, found: list[Tensor]) -> GradientError:
    e = exact.double().flatten()
    g = torch.stack([each.double().flatten() for each in found])
    norm, off, middle = e.norm(), g - e, g.mean(0)
    scale = norm if norm > 0 else torch.ones_like(norm)
    cosines = torch.nn.functional.cosine_similarity(g, e.expand_as(g), dim=1, eps=1e-300)
    same = (off == 0).all()  # two zero gradients agree
    return GradientError(
        parameter=name,
        norm=float(norm),
        mean=float(off.mean()) if off.numel() else 0.0,
        std=float(off.std(correction=0)) if off.numel() else 0.0,
        max=float(off.abs().max()) if off.numel() else 0.0,
        relative=float(off.norm(dim=1).square().mean().sqrt() / scale),
        cosine=1.0 if same else float(cosines.mean()),
        bias=float((middle - e).norm() / scale),
        noise=float((g - middle).norm(dim=1).square().mean().sqrt() / scale),
    )


def _total(exact: Mapping[str, Tensor], found: list[dict[str, Tensor]]) -> GradientError:
    def joined(by_name: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([by_name[name].double().flatten() for name in exact])

    return _row("all", joined(exact), [joined(each) for each in found])
