"""Random numbers apart from the model's own: what is sampled must not move dropout's draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.fx import Node

State = tuple[torch.Tensor, list[torch.Tensor]]


def _now() -> State:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda


def _set(state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


class Stream:
    """A second stream of torch's generators: draws within :meth:`playing` advance it alone."""

    def __init__(self, seed: int) -> None:
        """Start at a seed; the generators stay where they are."""
        outer = _now()
        torch.manual_seed(seed)
        self._state = _now()
        _set(outer)

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Let torch draw from this stream."""
        outer = _now()
        _set(self._state)
        try:
            yield
        finally:
            self._state = _now()
            _set(outer)


class Generators:
    """Where all generators that a model may use stand: torch's, Python's, NumPy's."""

    def __init__(self) -> None:
        """Note where they stand now."""
        self._torch, self._python, self._numpy = _now(), random.getstate(), np.random.get_state()

    def back(self) -> None:
        """Put them back there."""
        _set(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def draws_numbers(node: Node) -> bool:
    """Whether an operator draws from torch's generators."""
    tags: Any = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags
