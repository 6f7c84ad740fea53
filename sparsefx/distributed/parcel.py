"""What of a bucket travels: slices and whole tensors in one flat tensor, and a header behind them.

    payload = [piece of parameter 0, piece of parameter 1, ..., header]

The header asks what only all ranks together can answer. Each entry is 0 or 1 and added up: a sum is
0 exactly when no rank said 1, in any dtype and for any number of ranks.

    missing   for each parameter and level: this rank's gradient is not zero outside the slices
    indices   the bits of a hash of all slices, and their complements: where both sums of a bit are
              non-zero, ranks have chosen different slices
    stale     this rank has compiled more since the plan was made
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefx.distributed.entries import Sliced

_BITS = 32


@dataclass(frozen=True)
class Whole:
    """A parameter's gradient that always travels whole; a view into the bucket's buffer."""

    grad: Tensor

    def piece(self) -> Tensor:
        """Return what travels of it."""
        return self.grad

    def put(self, piece: Tensor) -> None:
        """Write back what came."""
        self.grad.copy_(piece)


@dataclass(frozen=True)
class Part:
    """A parameter's gradient of which slices travel.

    Attributes:
        grad: a view into the bucket's buffer.
        entry: how it is sliced.
        levels: positions of each level's slices in [groups * depth].
    """

    grad: Tensor
    entry: Sliced
    levels: tuple[Tensor, ...]

    def piece(self) -> Tensor:
        """Return what travels of it."""
        if self.entry.whole:
            return self.grad
        chosen = self.levels[self.entry.level]
        if self.entry.groups == 1:
            return self.grad.index_select(self.entry.axis, chosen)
        return self._by_channel()[chosen // self.entry.depth, chosen % self.entry.depth]

    def put(self, piece: Tensor) -> None:
        """Write back what came."""
        if self.entry.whole:
            self.grad.copy_(piece)
            return
        chosen = self.levels[self.entry.level]
        if self.entry.groups == 1:
            self.grad.index_copy_(self.entry.axis, chosen, piece)
        else:
            self._by_channel()[chosen // self.entry.depth, chosen % self.entry.depth] = piece

    def missing(self) -> list[Tensor]:
        """Say of each level whether the gradient holds anything but zeros outside its slices."""
        held = torch.unflatten(self.grad.ne(0), 0, (self.entry.groups, -1))
        others = [d for d in range(1, held.dim()) if d != self.entry.axis + 1]
        used = held.any(others).flatten()  # [groups * depth]
        return [used.index_fill(0, chosen, False).any() for chosen in self.levels]

    def _by_channel(self) -> Tensor:
        """View [groups * out, in, *taps] as [groups, in, out, *taps]."""
        return torch.unflatten(self.grad, 0, (self.entry.groups, -1)).transpose(1, 2)


def parts_of(bucket: Any, sliced: Mapping[int, Sliced]) -> list[Whole | Part]:
    """Return the gradients of a bucket in their order, with the slices of this step.

    Args:
        bucket: a ``torch.distributed.GradBucket``.
        sliced: by the parameter's id.
    """
    buffer = bucket.buffer()
    parts: list[Whole | Part] = []
    for flat, param in zip(bucket.gradients(), bucket.parameters(), strict=True):
        grad, entry = _as_laid_out(buffer, flat, param), sliced.get(id(param))
        if entry is None:
            parts.append(Whole(grad))
        else:
            levels = tuple(entry.indices(level) for level in range(len(entry.levels)))
            parts.append(Part(grad, entry, levels))
    return parts


def _as_laid_out(buffer: Tensor, flat: Tensor, param: Tensor) -> Tensor:
    """A gradient lies in the bucket in its parameter's own layout, as in channels_last.

    ``GradBucket.gradients()`` views it as contiguous, whatever it is.
    """
    if param.is_contiguous() or not _fills_its_memory(param):
        return flat
    return buffer.as_strided(param.shape, param.stride(), flat.storage_offset())


def _fills_its_memory(tensor: Tensor) -> bool:
    expected = 1
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((s, n) for s, n in pairs if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


# --- the header


def header_of(parts: Sequence[Whole | Part], stale: bool, like: Tensor) -> Tensor:
    """Return this rank's entries, in the dtype and on the device of ``like``."""
    sliced = [part for part in parts if isinstance(part, Part)]
    entries = [found.reshape(1) for part in sliced for found in part.missing()]
    if sliced:
        entries.append(_bits([found for part in sliced for found in part.levels]))
    entries.append(torch.tensor([stale], device=like.device))
    return torch.cat([entry.to(like.dtype) for entry in entries])


def _bits(indices: Sequence[Tensor]) -> Tensor:
    """[2 * 32]: the bits of a hash, and their complements."""
    flat = torch.cat(list(indices))
    mixed = (flat + 1) * 0x9E3779B1 + torch.arange(len(flat), device=flat.device) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    total = (mixed ^ (mixed >> 13)).sum()
    bits = (total >> torch.arange(_BITS, device=flat.device)) & 1
    return torch.cat([bits, 1 - bits])


@dataclass(frozen=True)
class Answer:
    """What all ranks say of a bucket.

    Attributes:
        needed: for each part that is sliced the first level that holds all ranks' gradients.
        short: for each, whether what was sent of it holds less than that.
        differ: ranks have chosen different slices.
        stale: some rank has compiled more since the plan was made.
    """

    needed: list[int]
    short: list[bool]
    differ: bool
    stale: bool


def read_header(header: Tensor, parts: Sequence[Whole | Part]) -> Answer:
    """Read the sums of all ranks' headers."""
    said: Iterator[bool] = iter(header.ne(0).tolist())
    sliced = [part.entry for part in parts if isinstance(part, Part)]
    missing = [[next(said) for _ in entry.levels] for entry in sliced]
    needed = [(*found, False).index(False) for found in missing]
    short = [(*found, False)[e.level] for found, e in zip(missing, sliced, strict=True)]
    differ = False
    if sliced:
        bits = [next(said) for _ in range(2 * _BITS)]
        differ = any(a and b for a, b in zip(bits[:_BITS], bits[_BITS:], strict=True))
    if differ:
        needed = [len(entry.levels) for entry in sliced]
        short = [not entry.whole for entry in sliced]
    return Answer(needed, short, differ, next(said))
