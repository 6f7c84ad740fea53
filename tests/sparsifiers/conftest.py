"""Helpers for every sparsifier test: a small model, a training loop, a snapshot."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def make_mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + i)
    x = torch.randn(32, 16, generator=generator)
    return x, torch.randn(32, 8, generator=generator)


def train(
    model: Callable[[Tensor], Tensor],
    sparsifier: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    first: int = 0,
) -> None:
    """Regression on fixed random batches, numbered from ``first``."""
    for i in range(first, first + steps):
        x, y = batch(i)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        sparsifier.step()


class Snapshot:
    """What a failed construction must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = copy.deepcopy(model.state_dict())
        self.types = [type(module) for module in model.modules()]
        self.ids = [id(parameter) for parameter in model.parameters()]
        self.hooks = self._hooks()

    def _hooks(self) -> int:
        return sum(
            len(m._load_state_dict_pre_hooks) + len(m._load_state_dict_post_hooks)
            for m in self.model.modules()
        ) + sum(len(p._backward_hooks or ()) for p in self.model.parameters())

    def assert_same(self) -> None:
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for key, value in self.state.items():
            same = torch.equal(state[key], value) or value.isnan().any()
            assert same, key
        assert [type(module) for module in self.model.modules()] == self.types
        assert [id(parameter) for parameter in self.model.parameters()] == self.ids
        assert self._hooks() == self.hooks


@pytest.fixture
def mlp() -> Callable[..., nn.Sequential]:
    return make_mlp


@pytest.fixture
def data() -> Callable[[int], tuple[Tensor, Tensor]]:
    return batch


@pytest.fixture
def fit() -> Callable[..., None]:
    return train


@pytest.fixture
def snapshot() -> type[Snapshot]:
    return Snapshot
