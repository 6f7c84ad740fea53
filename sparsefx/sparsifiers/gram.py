"""What calibration keeps of a layer's inputs: their Gram matrix, whatever the number of batches.

A layer's output is linear in its weight, so its squared error on any inputs depends on them through
X X^T alone. Sums are float64: a Gram matrix has the square of its inputs' condition number, and in
float32 it would lose directions below 1/3000 of the largest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.targets import Target

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHUNK = 1 << 21  # elements of unfolded input that exist at once: 16 MiB of float64

# (groups, rows): rows [G, T, K] of the layer's groups that the slice names.
Part = tuple[slice, Tensor]


class Gram:
    """Sums of products of a layer's inputs X [K, T], one per group of the layer.

    Attributes:
        sum: X X^T, float64 [G, K, K].
        cross: X_dense X^T, float64 [G, K, K], where the targets are made from other inputs.
        dense: X_dense X_dense^T, float64 [G, K, K], along with cross.
        count: how many columns of X there were.
    """

    def __init__(self, groups: int, size: int, device: torch.device, paired: bool = False) -> None:
        """Start at zero; ``paired`` when each input comes with the dense net's input."""
        shape = (groups, size, size)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.sum) if paired else None
        self.dense = torch.zeros_like(self.sum) if paired else None
        self.count = 0

    def add(self, rows: Tensor, groups: slice = slice(None), dense: Tensor | None = None) -> None:
        """Add inputs.

        Args:
            rows: floating [G, T, K], the inputs of ``groups``.
            groups: which groups of the layer they enter.
            dense: the dense net's inputs of the same shape; with ``paired`` only.

        Raises:
            SparsifierError: an input is NaN or infinite, K is another than the weight's, or the
                two shapes differ.
        """
        size = self.sum.shape[1]
        if rows.shape[2] != size:
            raise SparsifierError(
                f"its input has {rows.shape[2]} values for each output, and its weight takes {size}"
            )
        rows = _finite(rows)
        self.sum[groups].baddbmm_(rows.mT, rows)
        self.count += rows.shape[1]
        if self.cross is not None and self.dense is not None:
            if dense is None or dense.shape != rows.shape:
                got = None if dense is None else list(dense.shape)
                raise SparsifierError(f"rows are {list(rows.shape)} and dense {got}: pass pairs")
            dense = _finite(dense)
            self.cross[groups].baddbmm_(dense.mT, rows)
            self.dense[groups].baddbmm_(dense.mT, dense)


def _finite(rows: Tensor) -> Tensor:
    if not bool(rows.isfinite().all()):
        raise SparsifierError("its input holds NaN or infinity; clean the calibration data")
    return rows.to(torch.float64)


def empty_gram(target: Target, paired: bool = False) -> Gram:
    """Return the Gram of a layer before its first input: G groups of K inputs per output."""
    weight = target.weight
    groups, size = target.groups, target.matrix(weight)[:1].numel()
    if target.tensor_name == "in_proj_weight":
        groups = 3  # rows for query, key and value, each with an input of its own
    return Gram(groups, size, weight.device, paired)


def input_rows(target: Target, inputs: tuple[Tensor, ...]) -> Iterator[Part]:
    """Cut a layer's input into rows [G, T, K], in the order of its weight's elements, by chunks.

    Args:
        target: the layer; a convolution's rows are the windows that its taps see.
        inputs: [*, K] for linear layers, [B, C, *sizes] or [C, *sizes] for convolutions; query,
            key and value for attention's in_proj_weight.
    """
    if target.kind == "conv":
        yield from ((slice(None), rows) for rows in _unfolded(target.module, inputs[0]))
        return
    for i, x in enumerate(inputs):
        yield from ((slice(i, i + 1), rows) for rows in _flat(x))


def _flat(x: Tensor) -> Iterator[Tensor]:
    rows = x.reshape(1, -1, x.shape[-1])
    yield from torch.split(rows, max(1, CHUNK // max(1, x.shape[-1])), dim=1)


def _unfolded(conv: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Windows of a convolution's input, some at a time: [G, T, C/G * taps]."""
    assert isinstance(conv, CONVS)
    dims = len(conv.kernel_size)
    batch = x if x.dim() == dims + 2 else x.unsqueeze(0)
    windows = _pad(conv, batch)
    for d, (taps, step, gap) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    ):
        windows = windows.unfold(d + 2, gap * (taps - 1) + 1, step)[..., ::gap]
    # [B, C, *places, *taps] -> [G, B, *places, C/G, *taps]; a view until it is copied in chunks
    windows = torch.unflatten(windows, 1, (conv.groups, -1)).movedim(1, 0).movedim(2, 2 + dims)
    example, line = max(1, windows[:, :1].numel()), max(1, windows[:, :1, :1].numel())
    size = windows.shape[-dims - 1 :].numel()
    for examples in torch.split(windows, max(1, CHUNK // example), dim=1):
        for part in torch.split(examples, max(1, CHUNK // line), dim=2):
            yield part.reshape(conv.groups, -1, size)


def _pad(conv: nn.Module, x: Tensor) -> Tensor:
    """Pad as the layer does; F.pad counts sizes from the last dimension."""
    assert isinstance(conv, CONVS)
    sides: list[int] = []
    for d in reversed(range(len(conv.kernel_size))):
        if isinstance(conv.padding, str):
            whole = conv.dilation[d] * (conv.kernel_size[d] - 1) if conv.padding == "same" else 0
            sides += [whole // 2, whole - whole // 2]
        else:
            sides += [conv.padding[d], conv.padding[d]]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, sides, mode=mode) if any(sides) else x
