"""Small modules that a naive tool gets wrong: what is permuted, and each reason where it isn't."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsefx as sfx

Permute = Callable[..., sfx.PermutationReport]


class Between(nn.Module):
    """Linear a (8 -> 16), something, linear b (-> 8), relu, linear out (8 -> 4)."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(width, 8), nn.Linear(8, 4)
        self.middle = middle

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.b(self.middle(self.a(x)))))


def rotated(x: Tensor) -> Tensor:
    """As rotary embeddings do, with frequencies that count positions."""
    angle = torch.arange(8, dtype=x.dtype).repeat(2)
    half = torch.cat([-x[..., 8:], x[..., :8]], -1)
    return x * angle.cos() + half * angle.sin()


def doubled_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :4] *= 2
    return y


# name: (middle, width, [(size of each class that b sums over, its blocks)])
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int, list[tuple[int, int]]]] = {
    "relu": (torch.relu, 16, [(16, 1)]),
    "softmax over channels": (lambda x: x.softmax(-1), 16, [(16, 1)]),
    "largest channel": (lambda x: x - x.amax(-1, keepdim=True), 16, [(16, 1)]),
    "standard deviation": (lambda x: x / x.std(-1, keepdim=True), 16, [(16, 1)]),
    "layer norm": (nn.LayerNorm(16), 16, [(16, 1)]),
    "rms norm": (nn.RMSNorm(16), 16, [(16, 1)]),
    "batch norm": (nn.BatchNorm1d(16), 16, [(16, 1)]),
    "parametric relu": (nn.PReLU(16), 16, [(16, 1)]),
    "a slice of the channels": (lambda x: x[..., :8], 8, [(8, 1)]),
    "channel 0 alone": (lambda x: x * x[..., 0:1].sigmoid(), 16, [(15, 1)]),
    "in place on a slice": (doubled_slice, 16, [(12, 1)]),
    "gated halves": (F.glu, 8, [(8, 1)]),
    "halves exchanged": (lambda x: torch.cat([x[..., 8:], x[..., :8]], -1), 16, [(8, 1), (8, 1)]),
    "cat of two uses": (lambda x: torch.cat([x, x.tanh()], -1), 32, [(16, 1)]),
    "repeated": (lambda x: x.repeat(1, 2), 32, [(16, 1)]),
    "outer product": (lambda x: (x[:, :, None] * x[:, None, :]).flatten(1), 256, [(16, 1)]),
    "sum of two groups": (lambda x: x.view(-1, 2, 8).sum(1), 8, [(8, 1)]),
    "cumsum over groups": (lambda x: x.view(-1, 2, 8).cumsum(1).flatten(1), 16, [(8, 1)]),
    "groups exchanged": (lambda x: x + x.view(-1, 2, 8).flip(1).flatten(1), 16, [(8, 1)]),
    "groups picked": (lambda x: x + x.view(-1, 2, 8)[:, [1, 0]].flatten(1), 16, [(8, 1)]),
    "norm of each group": (
        nn.Sequential(nn.Unflatten(-1, (2, 8)), nn.LayerNorm(8), nn.Flatten(-2)), 16, [(8, 1)],
    ),
    "group norm": (nn.GroupNorm(2, 16), 16, [(8, 2)]),
    "nothing but groups": (lambda x: x.view(-1, 2, 8).softmax(2).flatten(1), 16, [(8, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_what_treats_channels_alike_is_permuted(name: str, permute: Permute):
    middle, width, classes = MOVES[name]
    report = permute(Between(middle, width), torch.randn(6, 8), training=False)
    found = [one for one in report.classes if "b" in one.layers]
    assert sorted((one.size, one.blocks) for one in found) == sorted(classes), report
    assert report.why("b") == ""
    (row,) = (row for row in report.layers if row.layer == "b")
    assert row.after > row.before


STAYS: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "cumsum": (lambda x: x.cumsum(-1), 16, "cumsum .* tells their places apart"),
    "argmax": (lambda x: x * x.argmax(-1, keepdim=True), 16, "argmax .* tells their places"),
    "max with its place": (lambda x: x - x.max(-1)[0][:, None], 16, "max .* tells their places"),
    "sort": (lambda x: x.sort(-1).values, 16, "sort .* tells their places apart"),
    "topk": (lambda x: x.topk(8, -1).values, 8, "topk .* tells their places apart"),
    "flip": (lambda x: x.flip(-1), 16, "reverses their order"),
    "roll": (lambda x: x.roll(1, -1), 16, "counts positions"),
    "positions": (lambda x: x * torch.arange(16), 16, "iota .* counts positions"),
    "triangle": (lambda x: (x[:, :, None] * x[:, None, :]).tril().sum(2), 16, "counts positions"),
    "rotary": (rotated, 16, "counts positions"),
    "constant": (lambda x: x[:, torch.arange(15, -1, -1)], 16, "counts positions"),
    "every second": (lambda x: x[:, ::2], 8, "takes every 2th"),
    "padding": (lambda x: F.pad(x, (2, 2)), 20, "pads them"),
    "convolved channels": (
        lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 3).to(x), padding=1)[:, 0], 16,
        "works on neighbouring positions",
    ),
    "pooled channels": (lambda x: F.avg_pool1d(x[:, None], 2)[:, 0], 8, "works on neighbouring"),
    "by address": (lambda x: x.clone().as_strided((6, 8), (16, 2)), 8, "reads memory by address"),
    "reshaped across rows": (lambda x: x.view(-1, 12).reshape(-1, 16), 16, "mixes its channels"),
    "scatter": (lambda x: x.scatter(-1, x.argsort(-1), x), 16, "isn't known to treat its channels"),
    "channel shuffle": (
        lambda x: x.view(-1, 2, 8).transpose(1, 2).flatten(1), 16, "lie scattered in the groups",
    ),
    "one group": (lambda x: x.view(-1, 4, 4).amax(1).repeat(1, 2), 8, "share one group of m=4"),
    "noise": (lambda x: x + 0 * torch.rand_like(x), 16, "isn't known to treat its channels alike"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_tells_channels_apart_is_left_alone(name: str, permute: Permute):
    middle, width, reason = STAYS[name]
    report = permute(Between(middle, width), torch.randn(6, 8), training=False)
    assert [one for one in report.classes if "b" in one.layers] == []
    assert re.search(reason, report.why("b")), report.why("b")
