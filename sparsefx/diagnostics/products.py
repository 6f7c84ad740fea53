"""``product_error``: each sampled product on its own, from exact operands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx import compat, cost, ops
from sparsefx.config import Sampled, SparseConfig, as_config
from sparsefx.diagnostics import printing
from sparsefx.diagnostics.replay import Step, record_step, visit_products
from sparsefx.diagnostics.running import Loss, parameters_of, undisturbed
from sparsefx.errors import DiagnosticsError
from sparsefx.passes.drawing import SIDES, side_of
from sparsefx.plan import Plan, Site

aten = torch.ops.aten
Draw = tuple[Tensor, Tensor | None, bool]  # indices, scale, whether a pair stands for the rest


@dataclass(frozen=True)
class ProductError:
    """How far one sampled product is from the exact one, given exact operands.

    Attributes:
        layer: qualified name.
        role: "forward", "grad_input" or "grad_weight".
        pattern: what it is sampled by, in words.
        derived: it uses the forward's draw.
        norm: of the exact product (Frobenius).
        relative: root mean square over draws of |error| / norm.
        flops_dense: operations of the full product.
        flops_sparse: operations that are left.
    """

    layer: str
    role: str
    pattern: str
    derived: bool
    norm: float
    relative: float
    flops_dense: int
    flops_sparse: int


@dataclass(frozen=True)
class ProductErrors:
    """What :func:`product_error` found: rows in the graph's order, ``str()``, ``to_dict()``."""

    rows: tuple[ProductError, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        """Return a table."""
        return printing.table(
            ("layer", "role", "sampled", "relative", "norm", "FLOPs left"),
            [
                (r.layer, r.role, r.pattern + (" (fwd)" if r.derived else ""), r.relative, r.norm,
                 f"{100 * r.flops_sparse / max(r.flops_dense, 1):.0f}%")
                for r in self.rows
            ],
            "sampled products against exact ones, operands exact",
        )  # fmt: skip

    def plot(self, path: str) -> None:
        """Draw relative errors by product into a picture (png, svg, pdf).

        Raises:
            DiagnosticsError: when matplotlib isn't installed.
        """
        names = [f"{row.layer} {row.role}" for row in self.rows]
        series = {"relative": [row.relative for row in self.rows]}
        printing.bars(path, names, series, "|error| / |exact product|")


def product_error(
    model: Any, batch: Any, config: object, *, loss: Loss | None = None, draws: int = 8,
    seed: int = 0,
) -> ProductErrors:  # fmt: skip
    """Measure every product that a config samples, given what an exact step feeds it.

    Nothing is compiled: one exact forward and backward, and its products again from their operands.
    Like :func:`gradient_error` it leaves the model as it was.

    Args:
        model: a module, compiled or not.
        batch: one input, a tuple of them, or a dict by name.
        config: as for the backend.
        loss: function of (model, batch) to one number; by default the model's own.
        draws: how often random estimators draw.
        seed: of the draws.

    Raises:
        DiagnosticsError: for a model without gradients, a loss that is no number, bad counts.
        ConfigError: for a bad config.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise DiagnosticsError(f"draws={draws!r} must be an int, at least 1")
    asked = as_config(config)
    rows: list[ProductError] = []
    with compat.as_written(model) as plain:
        parameters_of(plain)
        with undisturbed(plain), compat.many_recompiles():
            torch.manual_seed(seed)
            for step in record_step(plain, batch, asked, loss).steps:
                rows += _rows_of(step, asked, draws)
    return ProductErrors(tuple(rows))


def _rows_of(step: Step, asked: SparseConfig, draws: int) -> list[ProductError]:
    rows: list[ProductError] = []
    forwards: Forwards = {}

    def visit(plan: Plan, node: Node, args: tuple[Any, ...], result: Tensor) -> None:
        pattern = plan.decision.pattern if plan.decision else None
        if isinstance(pattern, Sampled):
            rows.append(_measure(plan, pattern, node, args, result, draws, forwards))

    visit_products(step, asked, visit)
    return rows


Forwards = dict[int, tuple[Site, list[Draw]]]  # by group


def _measure(
    plan: Plan, pattern: Sampled, node: Node, args: tuple[Any, ...], result: Tensor, draws: int,
    forwards: Forwards,
) -> ProductError:  # fmt: skip
    site, derived = plan.site, bool(plan.decision and plan.decision.derived)
    exact = product_of(node.target, args, result).double()
    follows: Site | None = None
    if derived:
        follows, drawn = forwards[site.group]
    else:
        scores = scores_of(plan, pattern, node.target, args)
        drawn = [draw(scores, pattern) for _ in range(draws if pattern.random else 1)]
        if site.role == "forward":
            forwards[site.group] = site, drawn
    total = 0.0
    for one in drawn:
        if derived:
            found = derivative(plan, node.target, exact, one)
        else:
            found = approximate(node.target, args, one).double()
        total += float((found - exact).square().sum())
    norm = float(exact.norm())
    return ProductError(
        layer=site.layer,
        role=site.role,
        pattern=str(pattern),
        derived=derived,
        norm=norm,
        relative=(total / len(drawn)) ** 0.5 / norm if norm else 0.0,
        flops_dense=cost.dense_flops(site),
        flops_sparse=cost.sparse_flops(site, pattern, follows),
    )


# --- a product again, from its operands: the ops' own references


def product_of(target: Any, args: tuple[Any, ...], result: Tensor) -> Any:
    """The product alone: without its bias."""
    if target is aten.addmm.default:
        return args[1] @ args[2]
    if target is aten.convolution.default and args[2] is not None:
        return result - args[2].view(1, -1, *[1] * (result.dim() - 2))
    return result


def scores_of(plan: Plan, pattern: Sampled, target: Any, args: tuple[Any, ...]) -> Any:
    """Scores [*, K] of the product's pairs, as the compiled graph computes them."""
    centred = pattern.estimator == "topk_mean"
    side = SIDES.get(pattern.scores, pattern.scores)
    if target is aten.convolution.default:
        return ops.conv_scores(args[0], args[1], "in", args[8], side, centred)
    if target is ops.conv_grad_input:
        return ops.conv_scores(args[0], args[1], "out", args[6], side, centred)
    if target is ops.conv_grad_weight:
        return ops.conv_scores(args[1], args[0], "batch", 1, side, centred)
    left, right = args[-2:] if target is aten.addmm.default else args[:2]
    return ops.mm_scores(left, right, side_of(plan, pattern), centred, pattern.shared)


def draw(scores: Tensor, pattern: Sampled) -> Draw:
    """Draw once by a pattern: (indices, scale, whether one pair stands for the rest)."""
    batch, depth = scores.shape[:-1], scores.shape[-1]
    k = pattern.k(depth)
    if pattern.mass is not None:
        return *ops.mass_indices(scores, k, pattern.min_k, pattern.mass), False
    if not pattern.random:
        return ops.topk_indices(scores, k), None, pattern.estimator == "topk_mean"
    numbers = {"systematic": 1, "bernoulli": depth, "with_replacement": k}[pattern.estimator]
    noise = torch.rand((*batch, numbers), device=scores.device)
    if pattern.estimator == "systematic":
        return *ops.systematic_indices(scores, noise, k), False
    if pattern.estimator == "bernoulli":
        return *ops.bernoulli_indices(scores, noise, k, pattern.size(depth)), False
    return *ops.with_replacement_indices(scores, noise, k), False


def approximate(target: Any, args: tuple[Any, ...], drawn: Draw) -> Any:
    """The sampled product, without a bias."""
    s, scale, rest = drawn
    if target is aten.bmm.default:
        return ops.sampled_bmm(args[0], args[1], s, scale, rest)
    if target is aten.convolution.default:
        x, w, _, stride, padding, dilation, _, _, groups = args
        return ops.sampled_conv(x, w, s, None, stride, padding, dilation, groups, scale, rest)
    if target is ops.conv_grad_input:
        return ops.sampled_conv_input(args[0], args[1], s, *args[2:], scale, rest)
    if target is ops.conv_grad_weight:
        return ops.sampled_conv_weight(args[0], args[1], s, *args[2:], scale, rest)
    left, right = args[-2:] if target is aten.addmm.default else args[:2]
    return ops.sampled_mm(left, right, s, None, scale, rest)


def derivative(plan: Plan, target: Any, exact: Tensor, drawn: Draw) -> Tensor:
    """The gradient through a forward's sample: features of the exact one, scaled or averaged.

    Given the same operands, dL/dx[:, i] is scale_i times the exact column, 0 outside S; with a
    stand-in for the rest, columns outside share their mean. dL/dw's rows likewise.
    """
    s, scale, rest = drawn
    shape, groups = exact.shape, s.shape[0] if target in _CONV_GRADIENTS else 1
    if target is ops.conv_grad_input:  # [batch, groups * K, ..] -> [batch, groups, K, ..]
        exact, axis = torch.unflatten(exact, 1, (groups, -1)), 2
    elif target is ops.conv_grad_weight:  # [groups * out, K, ..] -> [out, groups, K, ..]
        exact, axis = torch.unflatten(exact, 0, (groups, -1)).transpose(0, 1), 2
    else:
        last = (plan.site.role == "grad_input") != plan.flipped
        axis = exact.dim() - 1 if last else exact.dim() - 2
    depth = exact.shape[axis]
    factor = torch.zeros((*s.shape[:-1], depth), dtype=exact.dtype, device=s.device)
    values = torch.ones_like(s, dtype=exact.dtype) if scale is None else scale.to(exact.dtype)
    rows = 1 if target in _CONV_GRADIENTS else 0
    factor = _along(factor.scatter(-1, s, values), exact, axis, rows)
    found = exact * factor
    if rest:
        outside = (factor == 0).to(exact.dtype)
        mean = (exact * outside).sum(axis, keepdim=True) / max(depth - s.shape[-1], 1)
        found = found + mean * outside
    if target is ops.conv_grad_weight:
        found = found.transpose(0, 1)
    return found.reshape(shape)


_CONV_GRADIENTS = (ops.conv_grad_input, ops.conv_grad_weight)


def _along(factor: Tensor, like: Tensor, axis: int, rows: int) -> Tensor:
    """[K] along ``axis`` of ``like``, or [B, K] with B along ``rows``."""
    shape = [1] * like.dim()
    shape[axis] = factor.shape[-1]
    if factor.dim() == 2:
        shape[rows] = factor.shape[0]
    return factor.view(shape)
