"""How a stored weight is seen as the matrix that is packed, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.ops.packed import code_bytes

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Packing:
    """What a packed layer remembers of the weight that it had.

    Attributes:
        layer: qualified name of the layer when it was packed.
        n: weights kept of a group.
        m: size of a group.
        kind: "linear" [out, in], "conv" [out, in/groups, *taps] or "conv1d" [in, out] (that of
            transformers).
        shape: of the stored weight.
        channels_last: whether the stored weight was laid out so.
        requires_grad: of the parameter.
        tied: names of all weights that were this one parameter; empty where it wasn't tied.
    """

    layer: str
    n: int
    m: int
    kind: str
    shape: tuple[int, ...]
    channels_last: bool
    requires_grad: bool
    tied: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return "2:4"."""
        return f"{self.n}:{self.m}"


def to_matrix(w: Tensor, kind: str) -> Tensor:
    """See a stored weight as [out, K], whose groups of m follow each other along K.

    A convolution's K is [*taps, in/groups]: groups run along input channels, for each tap.
    """
    if kind == "conv":
        return w.movedim(1, -1).reshape(w.shape[0], -1)
    return w.t() if kind == "conv1d" else w


def unpacked(values: Tensor, codes: Tensor, packing: Packing) -> Tensor:
    """Return the stored weight again, in its own layout; zeros where nothing was kept."""
    depth = values.shape[1] // packing.n * packing.m
    w: Tensor = ops.nm_unpack(values, codes, packing.n, packing.m, depth)
    if packing.kind == "conv1d":
        return w.t().contiguous()
    if packing.kind == "conv":
        out, channels, *taps = packing.shape
        w = w.view(out, *taps, channels).movedim(-1, 1)
        form = _FORMATS[w.dim()] if packing.channels_last else torch.contiguous_format
        return w.contiguous(memory_format=form)
    return w


def is_channels_last(w: Tensor) -> bool:
    """Whether a weight is laid out with its channels last, and not contiguous as well."""
    form = _FORMATS.get(w.dim())
    return form is not None and w.is_contiguous(memory_format=form) and not w.is_contiguous()


def dense_bytes(w: Tensor) -> int:
    """Bytes of a weight."""
    return w.numel() * w.element_size()


def packed_bytes(w: Tensor, n: int, m: int) -> int:
    """Bytes of values and codes of a weight of this shape."""
    rows, depth = w.shape[0], w[0].numel()
    kept = depth // m * n
    return int(rows * (kept * w.element_size() + code_bytes(kept, m)))
