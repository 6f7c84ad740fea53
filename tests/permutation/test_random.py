"""Random small graphs keep their function, whatever was permuted."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsefx as sfx

Permute = Callable[..., sfx.PermutationReport]

# Each takes [B, 16] to [B, 16]; a module is made anew for each place.
LINEAR: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "linear": lambda: nn.Linear(16, 16),
    "wide": lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
    "norm": lambda: nn.LayerNorm(16),
    "group norm": lambda: nn.GroupNorm(4, 16),
    "relu": nn.ReLU,
    "softmax": lambda: nn.Softmax(-1),
    "swap": lambda: lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
    "shuffle": lambda: lambda x: x.view(-1, 2, 8).transpose(1, 2).flatten(1),
    "mix": lambda: lambda x: x.view(-1, 8, 2).sum(2).repeat(1, 2),
    "cumsum": lambda: lambda x: x.cumsum(-1),
    "first": lambda: lambda x: x + x[:, :1],
    "groups": lambda: lambda x: (x.view(-1, 4, 4) - x.view(-1, 4, 4).mean(1, True)).flatten(1),
    "outer": lambda: lambda x: x * (x.view(-1, 4, 4) @ x.view(-1, 4, 4).mT).flatten(1),
    "odd": lambda: lambda x: nn.functional.pad(x[:, 1:], (0, 1)),
}
# Each takes [B, 8, 4, 4] to the same.
CONVOLUTIONAL: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "multiplied": lambda: nn.Sequential(nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(16, 8, 1)),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 1, groups=2),
    "batch norm": lambda: nn.BatchNorm2d(8),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "relu": nn.ReLU,
    "shuffle": lambda: nn.ChannelShuffle(2),
    "cat": lambda: lambda x: torch.cat([x[:, 4:].tanh(), x[:, :4]], 1),
    "gate": lambda: lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "pool": lambda: nn.MaxPool2d(3, 1, 1),
    "pixels": lambda: lambda x: nn.functional.pixel_unshuffle(nn.functional.pixel_shuffle(x, 2), 2),
    "spatial": lambda: (
        lambda x: x * x.mean(1, keepdim=True).flatten(2).softmax(2).view(-1, 1, 4, 4)
    ),
}


class Net(nn.Module):
    """A chain of steps, some with a residual connection around them."""

    def __init__(self, steps: list[tuple[str, bool]], made: dict[str, Any], convolve: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1) if convolve else nn.Linear(8, 16)
        self.steps = [made[name]() for name, _ in steps]
        self.modules_of_steps = nn.ModuleList(s for s in self.steps if isinstance(s, nn.Module))
        self.residual = [around for _, around in steps]
        self.last = nn.Conv2d(8, 8, 1) if convolve else nn.Linear(16, 8)
        self.out = nn.Linear(8 * 16 if convolve else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for step, around in zip(self.steps, self.residual, strict=True):
            x = x + step(x) if around else step(x)
        return self.out(torch.relu(self.last(x)).flatten(1))


SOME = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def chains(made: dict[str, Any]) -> st.SearchStrategy[list[tuple[str, bool]]]:
    step = st.tuples(st.sampled_from(sorted(made)), st.booleans())
    return st.lists(step, min_size=1, max_size=5)


@given(steps=chains(LINEAR), seed=st.integers(0, 99))
@SOME
def test_linear_graphs(permute: Permute, steps: list[tuple[str, bool]], seed: int):
    torch.manual_seed(seed)
    permute(Net(steps, LINEAR, convolve=False), torch.randn(6, 8), budget=3, training=False)


@given(steps=chains(CONVOLUTIONAL), seed=st.integers(0, 99))
@SOME
def test_convolutional_graphs(permute: Permute, steps: list[tuple[str, bool]], seed: int):
    torch.manual_seed(seed)
    permute(Net(steps, CONVOLUTIONAL, convolve=True), torch.randn(3, 4, 4, 4), budget=3)
