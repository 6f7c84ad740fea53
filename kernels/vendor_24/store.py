"""Algorithms found so far: in memory, and in a file of the user's cache, one for each device."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from pathlib import Path

import torch

from sparsefx import compat
from sparsefx.errors import SparsefxWarning

_FORMAT = 1
_found: dict[str, dict[str, int]] = {}  # by device, by what is looked for: what files held
_known: dict[tuple[object, ...], int] = {}  # by key: asked for at every product


@functools.lru_cache(16)
def device_name(device: torch.device) -> str:
    """What an algorithm's speed holds for: the card's name and capability."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} {major}.{minor}"


def path_of(device: str) -> Path:
    """Where the file of a device is."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(cache) / "sparsefx" / f"vendor-24-{name}.json"


def get(key: tuple[object, ...]) -> int | None:
    """Return what was found for a key, -1 for "none is right", None where nothing was."""
    known = _known.get(key)
    if known is not None:
        return known
    device, text = _split(key)
    if device not in _found:
        _found[device] = _load(device)
    if text in _found[device]:
        _known[key] = _found[device][text]
    return _known.get(key)


def note(key: tuple[object, ...], algorithm: int) -> None:
    """Remember something for this process alone."""
    _known[key] = algorithm


def put(key: tuple[object, ...], algorithm: int) -> None:
    """Remember what was found, in the file too; other processes' entries in it stay."""
    note(key, algorithm)
    device, text = _split(key)
    known = {**_load(device), text: algorithm}
    path = path_of(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_head(device), "found": known}, file, indent=1)
        os.replace(file.name, path)  # whoever reads it finds the old file or the new one
    except OSError as error:
        _warn_once(f"{path} can't be written: {error.strerror or error}")


def forget() -> None:
    """Forget what is in memory; files stay."""
    _found.clear()
    _known.clear()


def _split(key: tuple[object, ...]) -> tuple[str, str]:
    library, device, *rest = key
    return str(device), " ".join(map(str, (library, *rest)))


def _head(device: str) -> dict[str, object]:
    return {"format": _FORMAT, "device": device, "version": compat.semi_structured_version()}


def _load(device: str) -> dict[str, int]:
    """Read a device's file: nothing where it is missing, of other versions or spoilt."""
    path = path_of(device)
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"{path} can't be read: {error}")
        return {}
    found = data.get("found") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not all(type(i) is int for i in found.values()):
        _warn_once(f"{path} holds no table of algorithms")
        return {}
    if any(data.get(key) != value for key, value in _head(device).items()):
        return {}  # numbers mean other algorithms in another version
    return found


@functools.lru_cache(64)
def _warn_once(what: str) -> None:
    warnings.warn(
        f"sparsefx: algorithms of 2:4 products are looked for anew: {what}; delete the file if it "
        "stays so",
        SparsefxWarning,
        stacklevel=4,
    )
