"""Inputs from words: ``float32[4,16]``, ``int64[2,32]:0..255``, ``input_ids=int64[2,32]``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.cli.results import UsageError

_SPEC = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d\s,]*)\]"
    r"(?::(?P<low>\S+?)\.\.(?P<high>\S+))?"
)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: of the argument; "" for one that is passed by its place.
        dtype: of the tensor.
        shape: of the tensor; () is a scalar.
        limits: lowest and highest value; None draws floats from a normal distribution, and 0 or 1.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    limits: tuple[float, float] | None = None

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return a tensor on the CPU: ``shape``, ``dtype``; whole numbers include both limits."""
        if self.dtype.is_floating_point:
            if self.limits is None:
                return torch.randn(self.shape, generator=generator).to(self.dtype)
            low, high = self.limits
            return (low + (high - low) * torch.rand(self.shape, generator=generator)).to(self.dtype)
        low, high = map(int, self.limits or (0, 1))
        return torch.randint(low, high + 1, self.shape, generator=generator).to(self.dtype)


def parse_input(text: str) -> InputSpec:
    """Read one input's words.

    Raises:
        UsageError: naming the words and what is allowed.
    """
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"--input {text!r} must be [NAME=]DTYPE[SIZES][:LOW..HIGH], such as float32[4,16] or "
            "input_ids=int64[2,32]:0..255"
        )
    if found["dtype"] not in _DTYPES:
        raise UsageError(f"--input {text!r}: {found['dtype']!r} is not one of {', '.join(_DTYPES)}")
    dtype, words = _DTYPES[found["dtype"]], found["sizes"].split(",")
    if words != [""] and not all(word.strip().isdigit() for word in words):
        raise UsageError(f"--input {text!r}: sizes are whole numbers with commas between: [4,16]")
    shape = tuple(int(word) for word in words if word.strip())
    return InputSpec(found["name"] or "", dtype, shape, _limits(text, found, dtype))


def _limits(text: str, found: re.Match[str], dtype: torch.dtype) -> tuple[float, float] | None:
    if found["low"] is None:
        return None
    read = float if dtype.is_floating_point else int
    try:
        low, high = read(found["low"]), read(found["high"])
    except ValueError as error:
        kind = "numbers" if dtype.is_floating_point else "whole numbers"
        raise UsageError(f"--input {text!r}: limits of {dtype} are {kind}: {error}") from error
    least, most = _range_of(dtype)
    if not (math.isfinite(low) and math.isfinite(high) and least <= low <= high <= most):
        raise UsageError(
            f"--input {text!r}: {low}..{high} must rise, within {least}..{most} of {dtype}"
        )
    return low, high


def _range_of(dtype: torch.dtype) -> tuple[float, float]:
    if dtype == torch.bool:
        return 0, 1
    if dtype.is_floating_point:
        return torch.finfo(dtype).min, torch.finfo(dtype).max
    info = torch.iinfo(dtype)
    return info.min, info.max - (dtype == torch.int64)  # one above the highest has to fit, too


def draw_inputs(
    texts: Sequence[str], seed: int, device: torch.device
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Draw every input that was asked for.

    Args:
        texts: as :func:`parse_input` reads them.
        seed: the same one gives the same values.
        device: where they go.

    Returns:
        Those without a name, in order, and those with one.

    Raises:
        UsageError: bad words, a name that stands twice, or no input at all.
    """
    if not texts:
        raise UsageError("the model's inputs are missing: --input float32[4,16], once for each")
    specs = [parse_input(text) for text in texts]
    names = [spec.name for spec in specs if spec.name]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--input {name}=... stands twice: give each argument once")
    generator = torch.Generator().manual_seed(seed)
    drawn = [(spec.name, spec.draw(generator).to(device)) for spec in specs]
    return tuple(t for name, t in drawn if not name), {name: t for name, t in drawn if name}
