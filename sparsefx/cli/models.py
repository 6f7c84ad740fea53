"""A model, a config and a device from the words that name them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sparsefx import config_files
from sparsefx.cli.results import UsageError
from sparsefx.config import PRESETS, SparseConfig, preset
from sparsefx.errors import ConfigError


def load_model(name: str, seed: int) -> nn.Module:
    """Return the model that ``MODULE:NAME`` or ``FILE.py:NAME`` names.

    Args:
        name: of a module, or of what returns one when it is called without arguments.
        seed: torch's seed while it is built.

    Raises:
        UsageError: there is no such thing, or it isn't and doesn't return a module.
    """
    source, colon, path = name.rpartition(":")
    if not colon or not source or not path:
        raise UsageError(
            f"model {name!r} must be MODULE:NAME or FILE.py:NAME, such as net.py:build or "
            "my.models:Net"
        )
    torch.manual_seed(seed)
    with _importing_from(Path(source).parent if source.endswith(".py") else Path()):
        found: Any = _module_of(name, source)
        for part in path.split("."):
            found = _part(name, found, part)
        return _built(name, found)


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Find modules in a folder: a script's own folder is on the path, that of a command isn't."""
    place = str(folder.resolve())
    added = place not in (entry and str(Path(entry).resolve()) for entry in sys.path)
    if added:
        sys.path.insert(0, place)
    try:
        yield
    finally:
        if added and place in sys.path:
            sys.path.remove(place)


def _module_of(name: str, source: str) -> ModuleType:
    if source.endswith(".py"):
        return _file(name, Path(source))
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise  # what it imports is missing, not the module itself
        raise UsageError(
            f"model {name!r}: there is no module {error.name!r} in {os.getcwd()} or among the "
            "installed packages; a file is named FILE.py:NAME"
        ) from error
    except (TypeError, ValueError) as error:  # "a..b", ".a"
        raise UsageError(f"model {name!r}: {source!r} is no module's name: {error}") from error


def _file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"model {name!r}: there is no file {str(path)!r}")
    known = path.stem if path.stem not in sys.modules else f"sparsefx_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None, path  # a file that ends in .py always has a loader
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # classes and Dynamo look for their module by its name
    spec.loader.exec_module(module)
    return module


def _part(name: str, holder: Any, part: str) -> Any:
    try:
        return getattr(holder, part)
    except AttributeError as error:
        shown = [k for k, v in vars(holder).items() if callable(v) and not k.startswith("_")]
        there = f"; there are: {', '.join(shown[:12])}" if shown else ""
        raise UsageError(f"model {name!r}: {error}{there}") from error


def _built(name: str, found: Any) -> nn.Module:
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(
            f"model {name!r} is {type(found).__name__!r}; name a torch.nn.Module, or what returns "
            "one when it is called without arguments"
        )
    model = found()
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name!r}: it returned a {type(model).__name__}, no nn.Module")
    return model


def load_config(name: str | None) -> SparseConfig:
    """Return the config of a preset's name or a file; the default one for None.

    Raises:
        UsageError: there is no such preset or file, or the file holds no config.
    """
    if name is None:
        return SparseConfig()
    if name in PRESETS:
        return preset(name)
    if not name.lower().endswith(config_files.SUFFIXES):
        raise UsageError(
            f"--config {name!r} is neither a preset ({', '.join(PRESETS)}) nor a file that ends "
            f"in {', '.join(config_files.SUFFIXES)}"
        )
    with _importing_from(Path()):  # predicates and passes of one's own
        try:
            return SparseConfig.from_file(name)
        except ConfigError as error:
            raise UsageError(f"--config {error}") from error


def load_device(name: str) -> torch.device:
    """Return a device that is there.

    Raises:
        UsageError: torch knows no such device, or has none here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise UsageError(f"--device {name!r} can't be used here: {first}") from error
    return device
