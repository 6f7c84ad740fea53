"""Paces measured on a device: files that correct the table, read when there are any."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sparsefx.cost.fitting import Fit
from sparsefx.cost.paces import PACES, Pace
from sparsefx.cost.products import BYTES
from sparsefx.errors import ConfigError, SparsefxWarning

VERSION = 1
VARIABLE = "SPARSEFX_CALIBRATION"
_KINDS = ("mm", "conv")
Key = tuple[str, str]  # kind of product, dtype


@dataclass(frozen=True)
class Measured:
    """One layer's forward and backward, dense and with some products sampled.

    Attributes:
        kind: "mm" or "conv".
        dtype: of the operands.
        layer: its sizes in words.
        role: of the products that were sampled; a forward takes its gradients along.
        ratio: share of the pairs.
        dense_us: microseconds of the dense one.
        sparse_us: microseconds of the sampled one.
        predicted_dense_us: what the fitted pace says.
        predicted_us: likewise.
    """

    kind: str
    dtype: str
    layer: str
    role: str
    ratio: float
    dense_us: float
    sparse_us: float
    predicted_dense_us: float
    predicted_us: float

    @property
    def error(self) -> float:
        """The larger of the two errors, as a share of what was measured."""
        pairs = (self.predicted_dense_us, self.dense_us), (self.predicted_us, self.sparse_us)
        return max(abs(guess / true - 1) for guess, true in pairs)


@dataclass(frozen=True)
class Calibration:
    """What was measured on one device, and the paces that fit it; ``print`` shows both.

    Attributes:
        device: its type.
        name: its full name; a file is used on the device of that name alone.
        fits: a pace by (kind of product, dtype).
        measured: what they were fitted to.
        torch: the version that ran.
        codegen: of the compiled layers.
    """

    device: str
    name: str
    fits: Mapping[Key, Fit]
    measured: tuple[Measured, ...] = ()
    torch: str = ""
    codegen: str = ""

    @property
    def worst(self) -> Measured | None:
        """Where the fit is off most."""
        return max(self.measured, key=lambda one: one.error, default=None)

    @property
    def digest(self) -> str:
        """Hash of what decisions depend on, which is part of the compile cache's key."""
        plain = {"device": self.device, "name": self.name, "paces": self._paces()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def _paces(self) -> list[dict[str, Any]]:
        return [
            {"kind": kind, "dtype": dtype, "overhead": fit.overhead, **fit.pace.to_dict()}
            for (kind, dtype), fit in sorted(self.fits.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "version": VERSION,
            "device": self.device,
            "name": self.name,
            "torch": self.torch,
            "codegen": self.codegen,
            "paces": self._paces(),
            "measured": [asdict(one) for one in self.measured],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Calibration:
        """Build one from plain data.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else data
            raise ConfigError(
                f"calibration: version={found!r}, this sparsefx reads {VERSION}; run "
                "sparsefx.calibrate() anew"
            )
        texts = {key: _text(data, key) for key in ("device", "name", "torch", "codegen")}
        fits = dict(map(_fit, _list(data, "paces")))
        measured = tuple(_measured(one) for one in _list(data, "measured"))
        return cls(fits=fits, measured=measured, **texts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, whole or not at all, and return where it is."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that :meth:`save` wrote.

        Raises:
            ConfigError: naming the file, and what is wrong in it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text("utf-8")))
        except (OSError, ValueError) as error:  # ConfigError is a ValueError
            raise ConfigError(f"{path}: {error}") from error

    def __str__(self) -> str:
        """Return predicted beside measured times, and the worst error."""
        lines = [f"calibration of {self.name}, torch {self.torch}, {self.codegen}"]
        for (kind, dtype), fit in sorted(self.fits.items()):
            pace = ", ".join(f"{key} {value:.3g}" for key, value in fit.pace.to_dict().items())
            lines.append(f"  {kind} {dtype}: us {pace}; {fit.overhead:.3g} us a step")
        heads = ("layer", "sampled", "ratio", "dense us", "predicted", "sparse us", "predicted")
        lines.append("{:<34} {:<12} {:>5} {:>10} {:>10} {:>10} {:>10}".format(*heads))
        for one in self.measured:
            times = one.dense_us, one.predicted_dense_us, one.sparse_us, one.predicted_us
            told = " ".join(f"{time:>10.1f}" for time in times)
            lines.append(f"{one.layer:<34} {one.role:<12} {one.ratio:>5g} {told}")
        if self.worst is not None:
            worst = self.worst
            lines.append(
                f"worst error {100 * worst.error:.0f}%: {worst.layer}, {worst.role} {worst.ratio:g}"
            )
        return "\n".join(lines)


# --- reading


def _text(data: Mapping[str, Any], key: str) -> str:
    if not isinstance(data.get(key), str):
        raise ConfigError(f"calibration: {key}={data.get(key)!r} must be a string")
    return str(data[key])


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    found = data.get(key)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ConfigError(f"calibration: {key}={found!r} must be a list of dicts")
    return found


def _amount(data: Mapping[str, Any], key: str) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise ConfigError(f"calibration: {key}={value!r} must be a number of at least 0")
    return float(value)


def _fit(data: Mapping[str, Any]) -> tuple[Key, Fit]:
    kind, dtype = data.get("kind"), data.get("dtype")
    if kind not in _KINDS or dtype not in BYTES:
        raise ConfigError(
            f"calibration: paces of kind={kind!r}, dtype={dtype!r}: a kind is one of "
            f"{', '.join(_KINDS)}, a dtype one of {', '.join(BYTES)}"
        )
    pace = Pace(**{field.name: _amount(data, field.name) for field in fields(Pace)})
    return (str(kind), str(dtype)), Fit(pace, _amount(data, "overhead"))


def _measured(data: Mapping[str, Any]) -> Measured:
    readers: dict[Any, Any] = {"str": _text, "float": _amount}
    return Measured(**{f.name: readers[f.type](data, f.name) for f in fields(Measured)})


# --- the one in use

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
        (kind, device, dtype): pace_of(kind, device, dtype) for kind in _KINDS for dtype in BYTES
    }
