"""What the tests of passes share: a joint graph that runs on the model's own tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from sparsefx import passes
from sparsefx.compat import size_hint
from sparsefx.config import Pattern, Rule, SparseConfig
from sparsefx.rewriting import INPUT, copy_graph_module
from sparsefx.testing import PassRun, capture, format_graph, run_pass


class Recorder(Interpreter):
    """Runs a graph and remembers what each op returned."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[Any, list[Any]] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        self.seen.setdefault(target, []).append(result)
        return result


@dataclass
class Joint:
    """A model's forward and backward in one graph, and the tensors that it is run on."""

    model: nn.Module
    args: Sequence[Any]
    gm: GraphModule
    tangents: list[Tensor] = field(default_factory=list)
    seen: dict[Any, list[Any]] = field(default_factory=dict)  # what each op returned, in order

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for node in self.gm.graph.nodes:
            if node.op == "placeholder" and node.name.startswith("tangents"):
                like = node.meta["val"]
                shape = [size_hint(size) for size in like.shape]
                self.tangents.append(torch.randn(shape, generator=generator).to(like.dtype))

    def again(self) -> Joint:
        """The same, on a copy of the graph."""
        return Joint(self.model, self.args, copy_graph_module(self.gm))

    def find(self, config: SparseConfig) -> Joint:
        """Run what comes before the rewrites."""
        run_pass(passes.canonicalize, self.gm)
        run_pass(passes.find_sites, self.gm)
        run_pass(partial(passes.select_sites, config=config), self.gm)
        return self

    def run(self, function: Callable[[GraphModule], Any]) -> PassRun:
        """Run one pass, and see to it that a second run changes nothing."""
        first = run_pass(function, self.gm)
        second = run_pass(function, self.gm)
        assert not second.modified, second.diff
        assert second.text == first.text == format_graph(self.gm)
        assert first.modified or first.text == first.before
        return first

    def values(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the graph: (first result, gradient by the name of an input)."""
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        # Dynamo orders inputs by their first use, and names them after the argument
        arguments = inspect.signature(self.model.forward).parameters
        inputs = dict(zip((f"l_{name}_" for name in arguments), self.args, strict=False))
        inputs.update((f"l_args_{i}_", value) for i, value in enumerate(self.args))
        tangents, names, values = iter(self.tangents), [], []
        for node in self.gm.graph.nodes:
            if node.op != "placeholder":
                continue
            known = node.meta.get(INPUT)
            names.append(known.name if known is not None else "")
            if known is None:
                values.append(next(tangents))
            elif known.kind != "input":
                values.append(named[known.name].detach())
            elif isinstance(node.meta["val"], Tensor):
                values.append(inputs[known.name].detach())
            else:
                values.append(size_hint(node.meta["val"]))
        count = len(values) - len(self.tangents)
        recorder = Recorder(self.gm)
        results = recorder.run(*values, enable_io_processing=False)
        self.seen = recorder.seen
        gradients = dict(zip(names, results[-count:], strict=False))
        order = [*named, *inputs]
        return results[0], {n: gradients[n] for n in order if gradients.get(n) is not None}


@pytest.fixture(scope="session")
def joint() -> Callable[..., Joint]:
    """Capture a model's joint graph: ``joint(model, x, ..., dynamic=None)``."""

    def capture_joint(model: nn.Module, *args: Any, dynamic: bool | None = None) -> Joint:
        return Joint(model, args, capture(model, *args, dynamic=dynamic))

    return capture_joint


@pytest.fixture
def every() -> Callable[..., SparseConfig]:
    """One rule for every layer, outputs included: ``every(NM(2, 4), grad_weight=...)``."""

    def config(forward: Pattern, **gradients: Pattern | None) -> SparseConfig:
        rules = [Rule("*", forward=forward, **gradients)]
        return SparseConfig(rules=rules, keep_output_dense=False)

    return config
