"""CIFAR's batches: a pickled dict of an array [count, 3072] uint8 and a list of labels.

Unpickling calls whatever a file names. Nothing is called here: the opcodes that such a dict takes
are read one by one, and any other is refused. An array is what numpy's pickles hold of it.
"""

from __future__ import annotations

import pickletools
import reprlib
from dataclasses import dataclass
from typing import Any

import torch
from formats import AGAIN, DataError
from torch import Tensor

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_PUT = {"BINPUT", "LONG_BINPUT", "PUT"}
_GET = {"BINGET", "LONG_BINGET", "GET"}
_CORES = ("numpy.core", "numpy._core")


@dataclass(frozen=True)
class _Name:
    """A function or class that the file names."""

    text: str


@dataclass
class _Call:
    """What the file wants called, and the state it wants set. Never done."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class _Refused(Exception):
    """An opcode, or a use of one, that no batch needs."""


def _plain(content: bytes) -> Any:
    """Run a pickle's opcodes, without its calls."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            break
        if name in _PUT:
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _GET:
            stack.append(memo[int(argument)])
        else:
            _step(name, argument, stack)
    return stack[-1]


def _step(name: str, argument: Any, stack: list[Any]) -> None:
    """Do one opcode on the stack."""
    if name in _VALUES:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name == "MARK":
        stack.append(_MARK)
    elif name in ("TUPLE", *_TUPLES):
        stack.append(tuple(_popped(stack, _TUPLES.get(name))))
    elif name in ("APPEND", "APPENDS"):
        items = _popped(stack, 1 if name == "APPEND" else None)
        _top(stack, list).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = _popped(stack, 2 if name == "SETITEM" else None)
        _top(stack, dict).update(zip(map(_text, items[::2]), items[1::2], strict=True))
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        found = argument.split(" ") if name == "GLOBAL" else _popped(stack, 2)
        stack.append(_Name(".".join(map(_text, found))))
    elif name == "REDUCE":
        function, arguments = _popped(stack, 2)
        stack.append(_call(function, arguments))
    elif name == "BUILD":
        (state,) = _popped(stack, 1)
        _top(stack, _Call).state = state
    else:
        raise _Refused(f"opcode {name}, which no batch needs")


def _popped(stack: list[Any], count: int | None) -> list[Any]:
    """Take ``count`` values off the stack; None is all down to the mark."""
    if count is None:
        count = stack[::-1].index(_MARK)
        out = stack[len(stack) - count :]
        del stack[len(stack) - count - 1 :]
        return out
    if count > len(stack):
        raise _Refused("a stack that runs empty")
    out = stack[-count:]
    del stack[-count:]
    return out


def _top(stack: list[Any], kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise _Refused(f"a {type(stack[-1]).__name__} in the place of a {kind.__name__}")
    return stack[-1]


def _text(value: Any) -> str:
    """Return a name or a key: Python 2 wrote str, Python 3 writes bytes for the same."""
    if isinstance(value, _Call) and value.name == "_codecs.encode":
        value = value.arguments[0]
    if isinstance(value, bytes):
        value = value.decode("latin1")
    if not isinstance(value, str):
        raise _Refused(f"a {type(value).__name__} as a name")
    return value


def _call(function: Any, arguments: Any) -> _Call:
    """Note a call that means an array, its kind, or bytes."""
    name = function.text if isinstance(function, _Name) else type(function).__name__
    known = {"numpy.dtype", "_codecs.encode", "__builtin__.bytes"}
    known |= {f"{core}.multiarray._reconstruct" for core in _CORES}
    known |= {f"{core}.numeric._frombuffer" for core in _CORES}
    if name not in known or not isinstance(arguments, tuple):
        raise _Refused(f"a call of {name}, which no batch needs")
    return _Call(name, arguments)


# --- from what a file holds to what it means


def _bytes(value: Any) -> bytes:
    """The bytes in any of the ways that Python wrote them."""
    if isinstance(value, _Call) and value.name == "__builtin__.bytes":
        return b""
    if isinstance(value, _Call) and value.name == "_codecs.encode":
        value, how = value.arguments
        if how != "latin1":
            raise _Refused(f"bytes written as {how!r}")
    if isinstance(value, str):  # Python 2's
        return value.encode("latin1")
    if not isinstance(value, bytes | bytearray):
        raise _Refused(f"a {type(value).__name__} in the place of bytes")
    return bytes(value)


def _array(value: Any) -> tuple[list[int], bytes]:
    """Shape and content of an array of bytes, row by row."""
    if not isinstance(value, _Call):
        raise _Refused(f"a {type(value).__name__} in the place of an array")
    if value.name.endswith("_frombuffer"):  # protocol 5
        content, kind, shape, order = value.arguments
        by_rows = order == "C"
    elif value.name.endswith("_reconstruct") and isinstance(value.state, tuple):
        _, shape, kind, by_columns, content = value.state
        by_rows = not by_columns
    else:
        raise _Refused(f"{value.name} in the place of an array")
    if not isinstance(kind, _Call) or kind.name != "numpy.dtype" or not by_rows:
        raise _Refused("an array whose kind or order is not that of a batch")
    if _text(kind.arguments[0]) not in ("u1", "uint8"):
        raise _Refused(f"an array of {kind.arguments[0]!r}, not of unsigned bytes (u1)")
    return list(shape), _bytes(content)


def read_batch(content: bytes, where: str, labels: str, classes: int) -> tuple[Tensor, Tensor]:
    """Read one of CIFAR's batches.

    Args:
        content: the pickle, of any protocol from 2 on.
        where: its path, for messages.
        labels: key of the labels.
        classes: labels are below this.

    Returns:
        Images [count, 3, 32, 32] uint8 and labels [count] int64.

    Raises:
        DataError: for anything that is not such a batch.
    """
    try:
        batch = _plain(content)
        if not isinstance(batch, dict):
            raise _Refused(f"a {type(batch).__name__} in the place of a dict")
        if missing := [key for key in ("data", labels) if key not in batch]:
            raise _Refused(f"no {missing[0]!r} among {', '.join(map(repr, batch)) or 'nothing'}")
        (shape, pixels), y = _array(batch["data"]), batch[labels]
    except (_Refused, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{where}: not a CIFAR batch: {error}; {AGAIN}") from error
    if not isinstance(y, list) or not y:
        raise DataError(f"{where}: {labels!r} is {reprlib.repr(y)}, expected a list of numbers")
    if shape != [len(y), 3072] or len(pixels) != 3072 * len(y):
        raise DataError(
            f"{where}: 'data' is {shape} in {len(pixels)} bytes, expected [{len(y)}, 3072] for "
            f"its {len(y)} labels"
        )
    for label in y:
        if type(label) is not int or not 0 <= label < classes:
            raise DataError(f"{where}: label {label!r}, expected 0 to {classes - 1}")
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    return images.view(-1, 3, 32, 32), torch.tensor(y)
