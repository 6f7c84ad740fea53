"""C++ of a kernel, built when it is first called; without a compiler the reference serves."""

import ctypes
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsefx import kernels
from sparsefx.compat import build_cpp
from sparsefx.errors import KernelError, SparsefxWarning
from sparsefx.ops import NAMESPACE, REFERENCES

_PER_THREAD = 1 << 15  # elements that are worth another thread
_built: dict[Path, ctypes.CDLL | None] = {}
_entered: dict[Any, Any] = {}  # op -> the kernel that called for C++, which may still be running
_entering = threading.RLock()
_references = torch.library.Library(f"{NAMESPACE}_reference", "DEF")
# dispatch.h tells them by their place, from 1: the first that fits
_REFUSALS = (IndexError, ValueError, TypeError, NotImplementedError, RuntimeError)


def library(source: Path, declare: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL | None:
    """Build ``source`` once in a process; None, after one warning, where that isn't possible.

    Args:
        source: the C++ file.
        declare: gives the functions their argument types.
    """
    if source not in _built:
        _built[source] = None
        try:
            # the version: torch's headers are compiled in, and those of another differ
            found = build_cpp(f"// torch {torch.__version__}\n{self_contained(source)}")
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


# --- C++ in the dispatcher


def declare(library: ctypes.CDLL) -> None:
    """Give the functions of dispatch.h their argument types."""
    library.sparsefx_enter.argtypes = [ctypes.c_char_p]
    library.sparsefx_refused.argtypes = [ctypes.c_int, ctypes.c_char_p]
    library.sparsefx_refused.restype = None


def handed_over(
    source: Path,
    op: Any,
    *args: Any,
    types: Callable[[ctypes.CDLL], None] = declare,
    left: Callable[..., Any] | None = None,
) -> Any:
    """Let C++ take an op's calls on CPU from now on, and call it; the reference without a compiler.

    Args:
        source: the C++ file, whose ``sparsefx_enter`` registers the op's kernel.
        op: the overload that was called.
        args: with what.
        types: gives the library's functions their argument types, those of this module as well.
        left: what serves the calls that C++ declines; None is the op's reference.

    Raises:
        KernelError: the dispatcher refuses the kernel.
    """
    with _entering:  # of two first calls one finds the op entered
        found = library(source, types)
        if found is not None and op not in _entered:
            _enter(source, op, found, left or (lambda *rest: REFERENCES[op](*rest)))
    return REFERENCES[op](*args) if found is None else op(*args)


def _enter(source: Path, op: Any, found: ctypes.CDLL, left: Callable[..., Any]) -> None:
    _offer(op, found, left)
    _entered[op] = torch.library.get_kernel(op, "CPU")
    name = op._schema.name.partition("::")[2]
    kernels.release(name, "CPU")
    if found.sparsefx_enter(name.encode()):
        raise KernelError(
            f"torch {torch.__version__} refuses the CPU kernel of {op.name()}, which "
            f"{source.name} registers; from now on its reference runs"
        )


def _offer(op: Any, library: ctypes.CDLL, left: Callable[..., Any]) -> None:
    """Define what C++ calls for what it doesn't serve; it is told of errors, and raises them."""

    def run(*args: Any) -> Any:
        try:
            return left(*args)
        except BaseException as error:  # raised by C++, since the stable ABI would lose what it is
            kinds = [place for place, one in enumerate(_REFUSALS, 1) if isinstance(error, one)]
            said = str(error) if kinds else f"{type(error).__name__}: {error}"
            library.sparsefx_refused(*kinds[:1] or [len(_REFUSALS)], said.encode(errors="replace"))
            if kinds:
                return torch.empty(0)
            raise

    name = _references.define(str(op._schema).partition("::")[2])
    _references.impl(name, run, "CompositeExplicitAutograd")
