"""C++ of a kernel, built when it is first called; without a compiler the reference serves."""

import ctypes
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from sparsefx.compat import build_cpp
from sparsefx.errors import KernelError, SparsefxWarning

_PER_THREAD = 1 << 15  # elements that are worth another thread
_built: dict[Path, ctypes.CDLL | None] = {}


def library(source: Path, declare: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL | None:
    """Build ``source`` once in a process; None, after one warning, where that isn't possible.

    Args:
        source: the C++ file.
        declare: gives the functions their argument types.
    """
    if source not in _built:
        _built[source] = None
        try:
            found = build_cpp(self_contained(source))
        except KernelError as error:
            warnings.warn(
                f"CPU kernels of {source.stem} run as torch operators, to the same values but more "
                f"slowly: {error}",
                SparsefxWarning,
                stacklevel=2,
            )
        else:
            declare(found)
            _built[source] = found
    return _built[source]


def self_contained(source: Path) -> str:
    """The C++ with headers of ours in the places where it includes them, by relative path."""

    def header(include: re.Match[str]) -> str:
        return (source.parent / include[1]).read_text(encoding="utf-8")

    return re.sub(
        r'^#include "([./\w]+\.h)"$', header, source.read_text(encoding="utf-8"), flags=re.M
    )


def threads(elements: int) -> int:
    """How many threads moving so many elements is worth."""
    return min(torch.get_num_threads(), 1 + elements // _PER_THREAD)
