"""Where a device has kernels for transposable masks, who makes them there.

The masks know no kernel: whoever has one gives it here. It has to make the same mask as the
operators of this room do, or say None. What is traced, and tensors of other kinds, never get there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefx.compat import holds_values

Kernel = Callable[[Tensor, int, int, str], Tensor | None]
_KERNELS: dict[str, Kernel] = {}


def accelerate(device_type: str, kernel: Kernel) -> None:
    """Let ``transposable_mask`` ask a kernel first, on tensors of a device.

    Args:
        device_type: such as "cuda"; a second kernel for it replaces the first.
        kernel: from (w, n, m, solver), w [rows, cols, *taps] floating and checked, to the mask,
            bool and of w's shape, or None for what it doesn't serve. For "exact" the mask must be
            the one that the operators find, ties included.
    """
    _KERNELS[device_type] = kernel


def solve(w: Tensor, n: int, m: int, solver: str) -> Tensor | None:
    """Return the mask that the device's kernel makes, None where none serves."""
    kernel = _KERNELS.get(w.device.type)
    plain = type(w) is Tensor and not torch.compiler.is_compiling() and holds_values(w)
    return kernel(w, n, m, solver) if kernel is not None and plain else None
