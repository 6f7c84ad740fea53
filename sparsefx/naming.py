"""What things are called: inputs of a graph, layers, operators, lines of the user's code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx import masks
from sparsefx.compat import OpOverload
from sparsefx.rewriting import INPUT

_PREFIX = re.compile(r"^[LG]\['[^']*'\]")
_PARTS = re.compile(r"\._modules|\._parameters|\._buffers")
_KEYS = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_PARAMETRIZED = re.compile(r"\.?parametrizations\..*$")
_THROUGH = {
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.view.default,
    torch.ops.aten.expand.default,  # as matmul does to a batch of weights
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
}


@dataclass(frozen=True)
class Input:
    """What a placeholder holds.

    Attributes:
        name: qualified, of a parameter or a buffer.
        kind: "parameter", "buffer" or "input".
        density: share of its elements that aren't zero; None where nobody looked.
        holds: N:M pattern of its zeros along axis 0 and along axis 1, as text; "" if none.
    """

    name: str
    kind: str
    density: float | None = None
    holds: tuple[str, str] = ("", "")


def zeros_of(tensor: Tensor) -> tuple[float, tuple[str, str]]:
    """Return (density, N:M pattern of the zeros along axis 0 and along axis 1).

    Args:
        tensor: rank 2 or more, with values.
    """
    tensor = tensor.detach()
    density = masks.density(tensor)
    if not 0 < density < 1:
        return density, ("", "")
    found = (masks.find_pattern(tensor, dim) for dim in (0, 1))
    # scattered zeros hold some pattern as well, such as 28:32 where half of all are zero
    along_0, along_1 = (
        str(pattern) if pattern is not None and density > 0.95 * pattern.n / pattern.m else ""
        for pattern in found
    )
    return density, (along_0, along_1)


def depending(nodes: Iterable[Node], kinds: Set[str]) -> set[Node]:
    """Return the nodes that depend on a placeholder of one of these kinds, themselves included.

    What has no name, such as a tangent, is an input.
    """
    found: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            known = node.meta.get(INPUT)
            if (known.kind if known is not None else "input") in kinds:
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def module_path(text: str) -> str:
    """Turn a module-stack entry such as ``L['self'].blocks[0].fc`` into ``blocks.0.fc``."""
    path = _PARTS.sub("", _PREFIX.sub("", text))
    return _KEYS.sub(lambda m: "." + (m[1] or m[2] or m[3]), path).strip(".")


def _stack(node: Node) -> list[tuple[str, Any]]:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return [(str(path), cls) for path, cls, *_ in stack.values()]


def module_types(node: Node) -> tuple[type | str, ...]:
    """Return the classes on the module stack, innermost first; names where only these are known."""
    return tuple(cls for _, cls in reversed(_stack(node)))


def weight_of(operand: Node) -> str | None:
    """Return the name of the parameter behind ``operand``, if it is one, cast or transposed."""
    while operand.op == "call_function" and operand.target in _THROUGH:
        source = operand.args[0]
        if not isinstance(source, Node):
            return None
        operand = source
    known = operand.meta.get(INPUT)
    return known.name if known is not None and known.kind != "input" else None


def layer_of(node: Node, weight: str | None) -> str:
    """Name the layer that a product belongs to.

    The parameter's owner where it lies inside the innermost module (a functional call such as
    multi-head attention's out_proj), else the innermost module (a tied weight belongs elsewhere),
    else the node itself.
    """
    stack = _stack(node)
    innermost = module_path(stack[-1][0]) if stack else ""
    owner = _PARAMETRIZED.sub("", weight.rpartition(".")[0]) if weight else ""
    if owner and (not innermost or owner == innermost or owner.startswith(innermost + ".")):
        return owner
    return innermost or owner or node.name


def op_name(target: Callable[..., Any] | str) -> str:
    """Return the bare name of an operator: ``mm`` for ``aten.mm.default``."""
    if isinstance(target, OpOverload):
        name = str(target.name())  # type: ignore[no-untyped-call]
        return name.partition(".")[0].rpartition("::")[2]
    return "convolution_backward" if not isinstance(target, str) else target


def source_line(node: Node) -> str:
    """Return ``file.py:12`` of the innermost frame of the user's code, where it is known."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace)
    return f"{found[-1][0].rpartition('/')[2]}:{found[-1][1]}" if found else ""
