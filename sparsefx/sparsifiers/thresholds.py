"""A mask by trainable thresholds, and the gradient that reaches weights and thresholds.

Liu et al., "Dynamic sparse training: find efficient sparse network from scratch with trainable
masked layers" (ICLR 2020), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.sparsifiers.mask import Mask
from sparsefx.sparsifiers.unstructured import Unstructured


def long_tailed(x: Tensor) -> Tensor:
    """Return what stands for the derivative of a unit step at x, elementwise (eq. 5).

    It is 2 - 4|x| up to |x| = 0.4, 0.4 from there to |x| = 1, and 0 beyond.
    """
    size = x.abs()
    return (2 - 4 * size).clamp(min=0.4).masked_fill(size > 1, 0)


class _Threshold(torch.autograd.Function):
    """where(mask, w, 0), with the gradients of w * step(|w| - t)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, threshold: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, w, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs; the threshold has the weight's number of dimensions."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        w, threshold, mask = ctx.saved_tensors
        through = grad * w * long_tailed(w.abs() - threshold)  # in the threshold's dtype
        others = [dim for dim in range(w.dim()) if threshold.shape[dim] == 1]
        along = [dim for dim in others if w.shape[dim] != 1]
        onto_t = through.sum(along, keepdim=True) if along else through
        onto_w = grad.masked_fill(~mask, 0) + through * w.sign()
        return onto_w.to(w.dtype), -onto_t.to(threshold.dtype), None


class ThresholdMask(Mask):
    """A :class:`Mask` whose entries are |w| > t, t a trainable number per output unit.

    Over :class:`Mask` it has the parameter ``threshold`` ([out], the weight's dtype but at least
    float32, in which small steps of it don't vanish; starts at 0), and two int64 scalars as
    buffers: ``drive``, the weights kept in excess of the wish, summed over steps; and ``fault``,
    the first step at which the layer held or received what is no finite number, else 0.

    Args:
        weight: the stored weight.
        mask: bool, of its shape.
        pattern: what a checkpoint has to agree with.
        axis: the dimension of the stored weight that counts output units.
    """

    drive: Tensor
    fault: Tensor

    def __init__(self, weight: Tensor, mask: Tensor, pattern: Unstructured, axis: int) -> None:
        """Start with thresholds of 0."""
        super().__init__(mask, pattern, straight_through=True)
        self.axis = axis
        zero = torch.zeros((), dtype=torch.int64, device=mask.device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.threshold = nn.Parameter(weight.detach().new_zeros(weight.shape[axis], dtype=dtype))
        self.register_buffer("drive", zero)
        self.register_buffer("fault", zero.clone())

    def spread(self, threshold: Tensor, dims: int) -> Tensor:
        """View [out] so that it broadcasts over a weight of ``dims`` dimensions."""
        return threshold.view([-1 if dim == self.axis else 1 for dim in range(dims)])

    def forward(self, w: Tensor) -> Tensor:
        """Zero what lies outside the mask."""
        spread = self.spread(self.threshold, w.dim())
        return _Threshold.apply(w, spread, self.mask)  # type: ignore[no-untyped-call,no-any-return]

    def margins(self, w: Tensor, threshold: Tensor) -> Tensor:
        """Return |w| - t for a whole weight and threshold."""
        return w.abs() - self.spread(threshold, w.dim())

    def above(self, w: Tensor, threshold: Tensor) -> Tensor:
        """Return |w| > t for a whole weight and threshold: the mask."""
        return w.abs() > self.spread(threshold, w.dim())
