"""Views of a parameter, evaluated on its values and on the numbers of its elements."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sparsefx.rewriting import CASTS, arguments


class View:
    """Evaluates views of a parameter: on its values, and on the numbers of its elements."""

    def __init__(self, source: Node, tensor: Tensor) -> None:
        """Take the parameter's placeholder and its values."""
        self._tensor = tensor.detach()
        self._source = source

    def value(self, node: Node) -> Tensor:
        """Return what the product would read, cast as autocast casts it."""
        return self._run(node, self._tensor, set())

    def index(self, node: Node) -> Tensor:
        """Return which elements of the parameter these are."""
        count = math.prod(self._tensor.shape)
        numbers = torch.arange(count, device=self._tensor.device).view(self._tensor.shape)
        return self._run(node, numbers, CASTS)

    def _run(self, node: Node, start: Tensor, skipped: set[Any]) -> Tensor:
        if node is self._source:
            return start
        if node.target in skipped:
            return self._run(arguments(node)[0], start, skipped)
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda other: self._run(other, start, skipped)
        )
        return node.target(*args, **kwargs)  # type: ignore[no-any-return,operator]
