"""What was measured on one device, and the paces that fit it: a versioned, readable file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sparsefx.cost.fitting import Fit
from sparsefx.cost.paces import Pace
from sparsefx.cost.products import BYTES
from sparsefx.errors import ConfigError

VERSION = 1
KINDS = ("mm", "conv")
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
    if kind not in KINDS or dtype not in BYTES:
        raise ConfigError(
            f"calibration: paces of kind={kind!r}, dtype={dtype!r}: a kind is one of "
            f"{', '.join(KINDS)}, a dtype one of {', '.join(BYTES)}"
        )
    pace = Pace(**{field.name: _amount(data, field.name) for field in fields(Pace)})
    return (str(kind), str(dtype)), Fit(pace, _amount(data, "overhead"))


def _measured(data: Mapping[str, Any]) -> Measured:
    readers: dict[Any, Any] = {"str": _text, "float": _amount}
    return Measured(**{f.name: readers[f.type](data, f.name) for f in fields(Measured)})
