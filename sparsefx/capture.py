"""Graphs as Dynamo gives them, kept so that their joint graph can be traced again at any time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sparsefx import compat
from sparsefx.config import SparseConfig
from sparsefx.naming import Input, module_path, zeros_of
from sparsefx.rewriting import INPUT, copy_graph_module

if TYPE_CHECKING:
    from sparsefx.pipeline import Outcome


@dataclass
class Compilation:
    """One graph that was compiled, kept so that a report can be made of it later.

    Attributes:
        gm: the graph as Dynamo gave it; its metadata holds fake inputs.
        inputs: what each of its placeholders is.
        config: what was asked for.
        outcome: what the pipeline did; None where a compile cache answered without it.
        grad: whether gradients were recorded.
        inference: whether inference mode was on.
        autocast: (device type, dtype) pairs that were active.
        held: what the graph holds itself, by the attribute's name: all parameters, where Inductor's
            freezing is on.
    """

    gm: GraphModule
    inputs: list[Input]
    config: SparseConfig
    outcome: Outcome | None = None
    grad: bool = True
    inference: bool = False
    autocast: list[tuple[str, torch.dtype]] = field(default_factory=list)
    held: dict[str, Input] = field(default_factory=dict)


def remember(gm: GraphModule, example_inputs: Sequence[Any], config: SparseConfig) -> Compilation:
    """Keep what a later report needs: a copy of the graph and the surrounding modes."""
    active = [
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    return Compilation(
        gm=copy_graph_module(gm),
        inputs=describe_inputs(gm, example_inputs),
        config=config,
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        autocast=active,
        held=describe_held(gm),
    )


def describe_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> list[Input]:
    """Say of each placeholder whether it is a parameter, a buffer or an input, and its name.

    Of parameters, and of what may be the mask of one, also how many zeros they hold, and where.
    """
    described = []
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, example in zip(nodes, example_inputs, strict=True):
        source = compat.input_source(node)
        kind = "input"
        if isinstance(example, nn.Parameter) or "._parameters[" in source:
            kind = "parameter"
        elif "._buffers[" in source:
            kind = "buffer"
        name = node.name if kind == "input" else module_path(source)
        described.append(Input(name or node.name, kind))
    sizes = {_size(x) for i, x in zip(described, example_inputs, strict=True) if _is_weight(i, x)}
    return [
        replace(known, **_zeros(example)) if _may_mask(known, example, sizes) else known
        for known, example in zip(described, example_inputs, strict=True)
    ]


def describe_held(gm: GraphModule) -> dict[str, Input]:
    """Say the same of the parameters and buffers that the graph holds, by the attribute's name."""
    described = {}
    parameters, buffers = dict(gm.named_parameters()), dict(gm.named_buffers())
    for name, source in compat.held_sources(gm).items():
        example = parameters.get(name, buffers.get(name))
        if example is None:
            continue
        known = Input(module_path(source), "parameter" if name in parameters else "buffer")
        looked_at = example.dim() > 1 and _may_mask(known, example, {_size(example)})
        described[name] = replace(known, **_zeros(example)) if looked_at else known
    return described


def _size(tensor: Tensor) -> tuple[int, ...]:
    return tuple(sorted(tensor.shape))  # a transposed mask has them, too


def _is_weight(known: Input, example: object) -> bool:
    return known.kind == "parameter" and isinstance(example, Tensor) and example.dim() > 1


def _may_mask(known: Input, example: Any, sizes: Container[tuple[int, ...]]) -> bool:
    """Whether to look at the values: of weights, of buffers of their size, of bools of it."""
    if type(example) not in (Tensor, nn.Parameter) or example.device.type == "meta":
        return False  # fake, distributed or packed: its values are not at hand
    right_kind = known.kind != "input" or example.dtype == torch.bool
    return right_kind and example.dim() > 1 and _size(example) in sizes


def _zeros(example: Tensor) -> dict[str, Any]:
    density, holds = zeros_of(example)
    return {"density": density, "holds": holds}


def name_inputs(
    joint: GraphModule, inputs: Sequence[Input], held: Mapping[str, Input] | None = None
) -> None:
    """Write onto the placeholders of a joint graph what they are.

    Args:
        joint: the graph.
        inputs: of Dynamo's graph.
        held: what that graph holds itself, by the attribute's name.
    """
    placeholders: list[Node] = [n for n in joint.graph.nodes if n.op == "placeholder"]
    for order, node in enumerate(placeholders):
        position = compat.input_position(node, order)
        is_tangent = node.name.startswith("tangents")
        if known := (held or {}).get(compat.held_name(node)):
            node.meta[INPUT] = known
        elif not is_tangent and position < len(inputs):
            node.meta[INPUT] = inputs[position]


def record_graphs(
    model: Any,
    config: SparseConfig,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    dynamic: bool | None = None,
    seen: Callable[[Compilation, Sequence[Any]], None] | None = None,
) -> list[Compilation]:
    """Run ``model`` once through Dynamo and return its graphs; buffers and seeds are put back.

    Args:
        model: a module or a function; it runs in eager mode under the current grad mode.
        config: kept with each graph.
        args: inputs.
        kwargs: inputs by name.
        dynamic: whether sizes are symbolic, as for ``torch.compile``.
        seen: told of each graph with the tensors that it was called with: behind a graph break
            Dynamo's names no longer say which parameter is which.
    """
    records: list[Compilation] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        record = remember(gm, example_inputs, config)
        records.append(record)
        if seen is not None:
            seen(record, example_inputs)
        return gm.forward

    buffers = dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
    saved = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), compat.many_recompiles():
        try:
            compiled = compat.compile_apart(model, keep, dynamic)
            compiled(*args, **kwargs)
        finally:
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(saved[name])
    return records


def trace_again(
    record: Compilation, rewrite: compat.Rewrite, observe: compat.Observe | None = None
) -> None:
    """Trace the joint (or inference) graph of ``record``; nothing is compiled or run.

    Args:
        record: the graph.
        rewrite: called with the joint graph, which it may edit.
        observe: see :func:`sparsefx.compat.compile_eagerly`.
    """

    def named(joint: GraphModule) -> None:
        name_inputs(joint, record.inputs, record.held)
        rewrite(joint)

    gm = copy_graph_module(record.gm)
    with compat.retrace(gm) as inputs, in_modes_of(record, inference=False):
        compat.compile_eagerly(gm, inputs, named, observe)


@contextmanager
def in_modes_of(record: Compilation, inference: bool | None = None) -> Iterator[None]:
    """Set the modes that a graph was captured under, not those around a later call.

    Args:
        record: the graph.
        inference: whether inference mode is on; None: as it was.
    """
    with ExitStack() as modes:
        modes.enter_context(
            torch.inference_mode(record.inference if inference is None else inference)
        )
        modes.enter_context(torch.set_grad_enabled(record.grad))
        dtypes = dict(record.autocast)
        for device in ("cpu", "cuda"):
            if device in dtypes or torch.is_autocast_enabled(device):
                on = device in dtypes
                modes.enter_context(torch.autocast(device, dtypes.get(device), enabled=on))
        yield


def joint_graph(record: Compilation) -> GraphModule:
    """Return a copy of the joint (or inference) graph, before any pass."""
    found: list[GraphModule] = []
    trace_again(record, lambda joint: found.append(copy_graph_module(joint)))
    return found[0]
