"""The parametrization that masks a weight; all that a resume needs is in its buffers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.unstructured import MaskPattern, numbers_of, written


class _StraightThrough(torch.autograd.Function):
    """where(mask, w, 0), with the gradient passed on as it is (Bengio et al., 2013)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, w, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is saved: the gradient depends on neither."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Mask(nn.Module):
    """``where(mask, w, 0)``, registered with ``torch.nn.utils.parametrize``.

    Buffers, all persistent: ``mask`` (bool, the stored weight's shape and layout), ``pattern``
    (int64 [3]: n, m, transposable, or what :func:`numbers_of` makes of another pattern), ``step``
    (int64 scalar, number of step() calls seen) and ``flips`` (int64 [2]: mask entries that the last
    refresh turned, and all refreshes together). Their values change in place, so a compiled model
    runs on.

    Args:
        mask: bool, of the weight's shape.
        pattern: what the mask is meant to hold; a checkpoint of another one is refused.
        straight_through: whether the gradient reaches entries outside the mask.
    """

    mask: Tensor
    pattern: Tensor
    step: Tensor
    flips: Tensor

    def __init__(self, mask: Tensor, pattern: MaskPattern, *, straight_through: bool) -> None:
        """Register the buffers."""
        super().__init__()
        self.straight_through = straight_through
        numbers = numbers_of(pattern)
        self.register_buffer("mask", mask)
        self.register_buffer("pattern", torch.tensor(numbers, device=mask.device).long())
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=mask.device))
        self.register_buffer("flips", torch.zeros(2, dtype=torch.int64, device=mask.device))

    def forward(self, w: Tensor) -> Tensor:
        """Zero what lies outside the mask."""
        if self.straight_through:
            return _StraightThrough.apply(w, self.mask)  # type: ignore[no-untyped-call,no-any-return]
        return torch.where(self.mask, w, 0)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Let ``layer.weight = value`` store the value; the mask goes on top of it."""
        return w

    @torch.no_grad()
    def replace(self, mask: Tensor) -> None:
        """Take other values, and count the entries that turn."""
        turned = (self.mask != mask).sum()
        self.mask.copy_(mask)
        self.flips[0] = turned
        self.flips[1] += turned

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        pattern = written(self.pattern.tolist())
        return f"{pattern}, straight_through={self.straight_through}"


def is_sharded(w: Tensor) -> bool:
    """Whether a tensor is a DTensor; importing that class only to ask would take a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(w, module.DTensor)


def full(w: Tensor) -> Tensor:
    """Return the whole of a weight; for a DTensor every rank of its mesh must call this."""
    return w.full_tensor() if is_sharded(w) else w  # type: ignore[attr-defined]


def local(w: Tensor) -> Tensor:
    """Return the part of a weight that lives here, sharing its memory."""
    return w.to_local() if is_sharded(w) else w  # type: ignore[attr-defined]


def shard_like(t: Tensor, w: Tensor) -> Tensor:
    """Return the part of a whole ``t`` that matches the local part of ``w``; no communication."""
    if not is_sharded(w):
        return t
    from torch.distributed.tensor import distribute_tensor

    parts = distribute_tensor(t, w.device_mesh, w.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return parts.to_local()


def check_checkpoint(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any
) -> None:
    """Refuse a checkpoint of another pattern: a load_state_dict pre-hook, before any write.

    It holds no reference to a sparsifier, so copies of the model may carry it along.

    Raises:
        SparsifierError: a layer's pattern differs, or the checkpoint holds dense weights.
    """
    for path, part in module.named_modules():
        if isinstance(part, Mask):
            key = f"{prefix}{path}.pattern"
            if key in state_dict:
                _check_pattern(part, path, state_dict[key])
            elif (plain := prefix + plain_key(path)) in state_dict:
                raise SparsifierError(
                    f"the checkpoint holds a dense {plain!r} where this model carries a mask: load "
                    "it before constructing the sparsifier"
                )


def plain_key(path: str) -> str:
    """Turn a Mask's qualified name into its weight's: fc.parametrizations.weight.0 -> fc.weight."""
    layer, _, rest = path.rpartition("parametrizations.")
    return layer + rest.split(".")[0]


def _check_pattern(part: Mask, path: str, saved: Tensor) -> None:
    theirs, ours = saved.tolist(), part.pattern.tolist()
    if theirs != ours:
        raise SparsifierError(
            f"the checkpoint's mask of {plain_key(path)!r} is {written(theirs)}, this "
            f"sparsifier's is {written(ours)}: construct it with the checkpoint's pattern"
        )
