"""MNIST's files (IDX), and archives: what is read is checked before it is believed."""

from __future__ import annotations

import gzip
import math
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


# --- archives


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
