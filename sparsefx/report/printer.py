"""Graphs as short, stable text, which a torch upgrade can't rename, and the diff of two."""

from __future__ import annotations

import difflib
import operator
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
    return "\n".join(
        difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=2)
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
