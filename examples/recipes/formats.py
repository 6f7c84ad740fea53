"""The two file formats: IDX (MNIST) and CIFAR's pickled batches. A file is checked, then believed.

Pickles can name any function to be called while they are read. Those of CIFAR need an array and
bytes, so nothing else is let in, and even these are read by the few lines here, not by numpy.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import sparsefx as sfx

CHUNK = 1 << 20
AGAIN = "get the file anew from where it came"


class DataError(sfx.SparsefxError, ValueError):
    """Files that are missing or broken: the message names the path, what was expected and found."""


# --- IDX: big-endian 0, 0, type, rank, then the sizes, then the bytes


def read_idx(path: Path, rank: int) -> Tensor:
    """Read an IDX file of bytes, gz or not.

    Args:
        path: the file.
        rank: 3 for images [count, height, width], 1 for labels [count].

    Returns:
        uint8 of the shape that the file states.

    Raises:
        DataError: for another magic number, or more or fewer bytes than stated.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) != b"\x1f\x8b":
                file.seek(0)
                return _parse_idx(file, path, rank)
        with gzip.open(path) as unpacked:
            return _parse_idx(unpacked, path, rank)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: can't be unzipped ({error}); {AGAIN}") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


def _parse_idx(file: Any, path: Path, rank: int) -> Tensor:
    wanted, magic = 0x800 + rank, _exactly(file, 4, path, "the magic number")
    if int.from_bytes(magic) != wanted:
        raise DataError(
            f"{path}: magic number {int.from_bytes(magic):#010x}, expected {wanted:#010x} (IDX, "
            f"unsigned bytes, {rank} dimension{'s' * (rank > 1)}); is it another file?"
        )
    sizes = _exactly(file, 4 * rank, path, "its list of sizes")
    shape = [int.from_bytes(sizes[i : i + 4]) for i in range(0, 4 * rank, 4)]
    if 0 in shape:
        raise DataError(f"{path}: states the shape {shape}, which is empty")
    content = _exactly(file, math.prod(shape), path, f"the shape {shape}")
    if file.read(1):
        raise DataError(f"{path}: longer than its stated shape {shape} needs; {AGAIN}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


def _exactly(file: BinaryIO, count: int, path: Path, what: str) -> bytes:
    """Read in pieces: a broken file may state sizes that no memory holds."""
    out = bytearray()
    while len(out) < count and (piece := file.read(min(CHUNK, count - len(out)))):
        out += piece
    if len(out) < count:
        raise DataError(
            f"{path}: truncated: {what} needs {count} bytes, {len(out)} are there; {AGAIN}"
        )
    return bytes(out)


# --- CIFAR: a pickled dict of an array [count, 3072] uint8 and a list of labels


class _Array:
    """What a pickled numpy array turns into: its bytes."""

    content, shape = b"", ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, columns_first, content = state
        self._fill(content, kind, shape, columns_first)

    def _fill(self, content: Any, kind: Any, shape: Any, columns_first: Any) -> None:
        if not isinstance(kind, _Kind) or kind.name not in ("u1", "uint8") or columns_first:
            raise pickle.UnpicklingError("an array of something other than bytes, row by row")
        self.content, self.shape = bytes(content), tuple(shape)


class _Kind:
    """What a pickled numpy dtype turns into: its name."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment: a byte has neither."""


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """Protocol 5 stores an array so."""
    array = _Array()
    array._fill(content, kind, shape, order != "C")
    return array


def _encode(text: str, how: str) -> bytes:
    """Python 3 writes bytes in protocol 2 so."""
    if how != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {how!r}")
    return text.encode("latin1")


_ALLOWED = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # and empty bytes so
} | {
    (f"numpy.{core}.{module}" if module else "numpy", name): stand_in
    for core in ("core", "_core")
    for module, name, stand_in in (
        ("multiarray", "_reconstruct", lambda *_: _Array()),
        ("numeric", "_frombuffer", _from_buffer),
        ("", "ndarray", _Array),
        ("", "dtype", _Kind),
    )
}


class _Unpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, bytes and arrays of bytes; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch needs")
        return _ALLOWED[module, name]


def read_batch(content: bytes, where: str, labels: str, classes: int) -> tuple[Tensor, Tensor]:
    """Read one of CIFAR's batches.

    Args:
        content: the pickle.
        where: its path, for messages.
        labels: key of the labels.
        classes: labels are below this.

    Returns:
        Images [count, 3, 32, 32] uint8 and labels [count] int64.

    Raises:
        DataError: for anything that is not such a batch.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError) as error:
        raise DataError(f"{where}: not a CIFAR batch: {error}; {AGAIN}") from error
    except (AttributeError, ImportError, OverflowError, MemoryError) as error:
        raise DataError(f"{where}: not a CIFAR batch: {error!r}; {AGAIN}") from error
    if not isinstance(batch, dict):
        raise DataError(f"{where}: not a CIFAR batch: a {type(batch).__name__}, expected a dict")
    fields = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    x, y = fields.get("data"), fields.get(labels)
    if not isinstance(x, _Array) or not isinstance(y, list):
        raise DataError(
            f"{where}: not a CIFAR batch: expected 'data', an array, and {labels!r}, a list; "
            f"it holds {', '.join(map(repr, fields)) or 'nothing'}"
        )
    if x.shape != (len(y), 3072) or len(x.content) != 3072 * len(y) or not y:
        raise DataError(
            f"{where}: 'data' is {list(x.shape)} in {len(x.content)} bytes, expected "
            f"[{len(y)}, 3072] for its {len(y)} labels, at least one"
        )
    for label in y:
        if type(label) is not int or not 0 <= label < classes:
            raise DataError(f"{where}: label {label!r}, expected 0 to {classes - 1}")
    images = torch.frombuffer(bytearray(x.content), dtype=torch.uint8)
    return images.view(-1, 3, 32, 32), torch.tensor(y)


def read_members(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read files of a tar archive, zipped or not, in one go and without unpacking it to disk.

    Args:
        archive: the file.
        names: of the files, without their folders.

    Raises:
        DataError: for a broken archive, or one that lacks a file.
    """
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in names:
                    file = tar.extractfile(member)
                    assert file is not None  # a plain file has content
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{archive}: can't be unpacked ({error}); {AGAIN}") from error
    except OSError as error:
        raise DataError(f"{archive}: can't be read ({error})") from error
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{archive}: holds no {', '.join(missing)}; {AGAIN}")
    return found
