"""Graphs as short, stable text, which a torch upgrade can't rename, and the diff of two."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsefx.compat import OpOverload
from sparsefx.naming import op_name
from sparsefx.rewriting import INPUT


def format_graph(gm: GraphModule) -> str:
    """Print a graph, one node a line: ``%2 = nm_mm(%0, %1, 2, 4) : float32[3, 5]``.

    Args:
        gm: whose nodes carry fake values in ``meta["val"]``.
    """
    names: dict[Node, str] = {}
    lines = []
    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0], names)}")
            continue
        names[node] = f"%{len(names)}"
        known = node.meta.get(INPUT)
        if node.op == "placeholder":
            call = f"input({known.name if known is not None else ''})"
        elif node.op == "get_attr":
            call = f"constant({node.target})"
        else:
            args = [_argument(arg, names) for arg in node.args]
            args += [f"{key}={_argument(arg, names)}" for key, arg in node.kwargs.items()]
            call = f"{_target(node.target)}({', '.join(args)})"
        lines.append(f"{names[node]} = {call} : {_value(node.meta.get('val'))}")
    return "\n".join(lines)


def diff(before: str, after: str, names: tuple[str, str] = ("before", "after")) -> str:
    """Return the unified diff of two printed graphs, numbers of values left out of the match."""
    old, new = before.splitlines(), after.splitlines()
    return _unified(old, new, _matched(map(_numberless, old), map(_numberless, new)), names)


def diff_graphs(
    before: GraphModule, after: GraphModule, names: tuple[str, str] = ("before", "after")
) -> str:
    """Return the unified diff of a graph and what a pass made of a copy of it.

    Nodes are matched by their names, which copies keep.
    """
    old, new = (format_graph(gm).splitlines() for gm in (before, after))
    keys = ([node.name for node in gm.graph.nodes] for gm in (before, after))
    return _unified(old, new, _matched(*keys), names)


_NUMBER = re.compile(r"%(\d+)")
_CONTEXT = 2


def _numberless(line: str) -> str:
    return _NUMBER.sub("%", line)


def _matched(old: Iterable[str], new: Iterable[str]) -> dict[int, int]:
    blocks = difflib.SequenceMatcher(None, list(old), list(new), autojunk=False)
    return {a + i: b + i for a, b, size in blocks.get_matching_blocks() for i in range(size)}


def _unified(
    old: Sequence[str], new: Sequence[str], matched: Mapping[int, int], names: tuple[str, str]
) -> str:
    """Write the diff; the value of line i is %i, so ``matched`` tells which values are the same."""
    steps: list[tuple[str, int, int]] = []  # sign, lines passed in old and new
    partners = set(matched.values())
    i = j = 0
    for a, b in [*matched.items(), (len(old), len(new))]:
        if a < len(old) and not _same(old[a], new[b], matched, partners):
            continue
        steps += [("-", line, j) for line in range(i, a)]
        steps += [("+", a, line) for line in range(j, b)]
        steps += [(" ", a, b)] * (a < len(old))
        i, j = a + 1, b + 1
    changed = [at for at, (sign, _, _) in enumerate(steps) if sign != " "]
    shown = sorted(
        {at for c in changed for at in range(c - _CONTEXT, c + _CONTEXT + 1)} & {*range(len(steps))}
    )
    lines = [f"--- {names[0]}", f"+++ {names[1]}"] if shown else []
    for place, at in enumerate(shown):
        sign, a, b = steps[at]
        if not place or shown[place - 1] != at - 1:
            lines.append(f"@@ -{a + 1} +{b + 1} @@")
        lines.append(sign + (old[a] if sign == "-" else new[b]))
    return "\n".join(lines)


def _same(old: str, new: str, matched: Mapping[int, int], partners: Set[int]) -> bool:
    """Whether two lines say the same of the same values; a replaced value has no partner."""
    if _numberless(old) != _numberless(new):
        return False
    uses = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    return all(
        matched[int(a)] == int(b) if int(a) in matched else int(b) not in partners for a, b in uses
    )


def _target(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    name = op_name(target) if isinstance(target, OpOverload) else ""
    return name or str(getattr(target, "__name__", target))


def _argument(arg: Any, names: dict[Node, str]) -> str:
    if isinstance(arg, Node):
        return names[arg]
    if isinstance(arg, list | tuple):
        return "[" + ", ".join(_argument(part, names) for part in arg) + "]"
    return str(arg).removeprefix("torch.") if isinstance(arg, torch.dtype) else str(arg)


def _value(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
    if isinstance(found, list | tuple):
        return "(" + ", ".join(map(_value, found)) + ")"
    return type(found).__name__ if not isinstance(found, torch.SymInt) else f"int({found})"
