"""The paces in use: the table's, which files of measured ones correct where there are any."""

from __future__ import annotations

import functools
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from sparsefx.cost.measured import KINDS, Calibration
from sparsefx.cost.paces import PACES, Pace
from sparsefx.cost.products import BYTES
from sparsefx.errors import ConfigError, SparsefxWarning

VARIABLE = "SPARSEFX_CALIBRATION"
_unused: ContextVar[bool] = ContextVar("unused", default=False)


@contextmanager
def unused() -> Iterator[None]:
    """Use no calibration, so that one can be made: the file may not be there yet."""
    token = _unused.set(True)
    try:
        yield
    finally:
        _unused.reset(token)


def device_name(device: str) -> str:
    """What a calibration holds for: the card, or the processor's kind and how many threads."""
    if device == "cuda" and torch.cuda.is_available():
        return f"cuda {torch.cuda.get_device_name()}"
    if device != "cpu":
        return device
    simd = torch.backends.cpu.get_cpu_capability()
    return f"cpu {platform.machine()} {simd}, {torch.get_num_threads()} threads"


def default_path(device: str) -> Path:
    """Where the calibration of a device is, unless the environment names a file."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return Path(cache) / "sparsefx" / f"calibration-{name}.json"


def current(device: str) -> Calibration | None:
    """Return the calibration in use: the file that SPARSEFX_CALIBRATION names, else the device's.

    An empty SPARSEFX_CALIBRATION uses none. A file that can't be used is told of by a
    SparsefxWarning, once, and is ignored.
    """
    named = os.environ.get(VARIABLE)
    if named == "" or _unused.get():
        return None
    path = default_path(device) if named is None else Path(named)
    try:
        state = path.stat()
    except OSError as error:
        if named is not None:
            _warn_once(f"{path}: {error.strerror or error} ({VARIABLE} names it)")
        return None
    found = _read(path, state.st_mtime_ns, state.st_size)
    if found is None or found.device != device:
        return None  # one file is of one device; the others take the table's paces
    if found.name != device_name(device):
        _warn_once(f"{path} is of {found.name!r}, this is {device_name(device)!r}")
        return None
    return found


@functools.lru_cache(16)
def _read(path: Path, _changed: int, _size: int) -> Calibration | None:
    try:
        return Calibration.load(path)
    except ConfigError as error:
        _warn_once(str(error))
        return None


@functools.lru_cache(64)
def _warn_once(what: str) -> None:
    warnings.warn(
        f"sparsefx: calibration ignored: {what}; the built-in paces are used "
        "(sparsefx.calibrate() measures this device)",
        SparsefxWarning,
        stacklevel=3,
    )


def digest() -> str:
    """Hash of the calibrations in use: a cached graph of another one must not be taken."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = [current(device) for device in devices]
    return " ".join("" if one is None else one.digest for one in found)


# --- the table


def pace_of(kind: str, device: str, dtype: str = "float32") -> Pace:
    """Return the pace of a kind of product on a device: measured, else built in.

    What was measured in float32 holds for dtypes that were not; a device without paces is judged
    as a cpu.
    """
    group = "conv" if kind == "conv" else "mm"
    measured = current(device)
    if measured is not None:
        for key in ((group, dtype), (group, "float32")):
            if key in measured.fits:
                return measured.fits[key].pace
    return PACES.get((group, device)) or PACES[group, "cpu"]


def table(device: str) -> dict[tuple[str, str, str], Pace]:
    """Return the paces in use on a device, by (kind of product, device, dtype)."""
    return {
        (kind, device, dtype): pace_of(kind, device, dtype) for kind in KINDS for dtype in BYTES
    }
