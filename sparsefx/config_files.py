"""Plain data in YAML and JSON files, with the line where each value stands.

Files are read more strictly than the formats ask for: a key that stands twice is refused, since one
of the two would be dropped silently. In YAML ``1e-4`` is a number, as in YAML 1.2 and in Python;
PyYAML alone reads it as a string.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsefx.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json")
Step = str | int  # a key of a mapping, or a place in a list
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


@dataclass(frozen=True)
class Document:
    """What a file holds.

    Attributes:
        name: of the file, as it was given.
        data: plain data.
        lines: the line of each value, counted from 1, by the steps that lead to it; none in JSON.
    """

    name: str
    data: Any
    lines: dict[tuple[Step, ...], int] = field(default_factory=dict)

    def where(self, steps: Sequence[Step]) -> str:
        """Say where a value stands: ``cfg.yaml:7: rules[0].forward``; its parent if it is none."""
        known = tuple(steps)
        while known and not _leads(self.data, known):
            known = known[:-1]
        line = self.lines.get(known)
        place = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in known).lstrip(".")
        return ": ".join(filter(None, [self.name + (f":{line}" if line else ""), place]))


def _leads(data: Any, steps: Sequence[Step]) -> bool:
    for step in steps:
        inside = isinstance(data, dict) if isinstance(step, str) else isinstance(data, list | tuple)
        if not inside or not (step in data if isinstance(step, str) else step < len(data)):
            return False
        data = data[step]
    return True


def read(path: str | os.PathLike[str]) -> Document:
    """Read a file that ends in .yaml, .yml or .json.

    Raises:
        ConfigError: another ending; the file can't be read; its text is no YAML or JSON, or has a
            key twice, with the line; PyYAML is missing.
    """
    name, is_json = os.fspath(path), _is_json(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name}: can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text: {error}") from error
    try:
        return _read_json(name, text) if is_json else _read_yaml(name, text)
    except RecursionError as error:
        raise ConfigError(f"{name}: is nested too deeply for a config") from error


def write(path: str | os.PathLike[str], data: Any) -> None:
    """Write plain data, in the format that the file's ending names.

    Raises:
        ConfigError: another ending; the file can't be written; PyYAML is missing.
    """
    if _is_json(path):
        text = json.dumps(data, indent=2) + "\n"
    else:
        text = _yaml(os.fspath(path)).safe_dump(data, sort_keys=False)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{os.fspath(path)}: can't be written: {error.strerror or error}"
        ) from error


def _is_json(path: str | os.PathLike[str]) -> bool:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{os.fspath(path)}: a config's file ends in {', '.join(SUFFIXES)}")
    return suffix == ".json"


# --- JSON


def _read_json(name: str, text: str) -> Document:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f"{name}: the key {key!r} stands twice in one object")
            found[key] = value
        return found

    try:
        return Document(name, json.loads(text, object_pairs_hook=once))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name}:{error.lineno}: is no JSON: {error.msg} (column {error.colno})"
        ) from error


# --- YAML


def _yaml(name: str) -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise ConfigError(
            f"{name}: YAML needs PyYAML, which is not installed: "
            'pip install "sparsefx[yaml]", or write the config as JSON'
        ) from error


def _read_yaml(name: str, text: str) -> Document:
    yaml = _yaml(name)
    lines: dict[tuple[Step, ...], int] = {}
    try:
        loader = _loader_type(yaml)(text)
        node = loader.get_single_node()
        if node is None:
            return Document(name, None)
        _note_lines(name, node, (), lines)
        return Document(name, loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{name}{line}: is no YAML that can be read: {problem}") from error
    except ConfigError:
        raise
    except ValueError as error:  # such as a date that isn't one
        raise ConfigError(f"{name}: holds a value that YAML can't read: {error}") from error


def _loader_type(yaml: Any) -> Any:
    loader: Any = type("ConfigLoader", (yaml.SafeLoader,), {})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    return loader


def _note_lines(
    name: str, node: Any, steps: tuple[Step, ...], lines: dict[tuple[Step, ...], int]
) -> None:
    """Write down where the values of a node's tree begin; refuse keys that stand twice."""
    lines.setdefault(steps, node.start_mark.line + 1)
    if node.id == "sequence":
        for i, child in enumerate(node.value):
            _note_lines(name, child, (*steps, i), lines)
    if node.id != "mapping":
        return
    seen = set()
    for key, child in node.value:
        line, word = key.start_mark.line + 1, key.value
        if key.id == "scalar" and word in seen and key.tag != "tag:yaml.org,2002:merge":
            raise ConfigError(f"{name}:{line}: the key {word!r} stands twice in one mapping")
        if key.id == "scalar":
            seen.add(word)
            lines[(*steps, word)] = line
        _note_lines(name, child, (*steps, str(word)), lines)
