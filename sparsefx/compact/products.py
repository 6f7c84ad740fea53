"""Products of which the weights, and maybe some of the inputs, are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx.compact.known import Env, Known, nothing, some, unknown_like
from sparsefx.permutation.flow import argument

aten = torch.ops.aten

PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
WITH_BIAS = {aten.addmm.default, aten.baddbmm.default}
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}


def product(node: Node, env: Env) -> Any:
    """Evaluate mm and its kin: a column is known where all that it sums is."""
    first = 1 if node.target in WITH_BIAS else 0
    left, right = (env[n] for n in node.args[first : first + 2])  # type: ignore[index]
    batch = list(range(left.value.dim() - 2))
    known, value = left.constant([*batch, left.value.dim() - 1])  # [*, K]
    live = (~known | (value != 0)).to(torch.float32)
    unknown = _any(~known, right.live()) | _any(live.bool(), right.unknown)  # [*, N]
    total = torch.matmul(value.unsqueeze(-2), right.value)  # [*, 1, N]
    shape = node.meta["val"].shape
    found = some(total.expand(shape), unknown.unsqueeze(-2).expand(shape))
    if not first:
        return found
    bias = env[node.args[0]]  # type: ignore[index]
    scaled = argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1
    if scaled:
        return nothing(node.meta["val"])
    return some(found.value + bias.value, found.unknown | bias.unknown)


def _any(left: Tensor, right: Tensor) -> Tensor:
    """Whether both hold for any k: bool [*, K] and [*, K, N] -> [*, N]."""
    return torch.matmul(left.float().unsqueeze(-2), right.float()).squeeze(-2) > 0


def grouped(tensor: Tensor, groups: int) -> Tensor:
    """Return [G x n, *] as [G, n, *]."""
    return tensor.reshape(groups, -1, *tensor.shape[1:])


def taps(node: Node, env: Env) -> tuple[Known, Known]:
    """Return a convolution's input and its weight as [G x in] x [G, in, out] over all taps.

    Returns:
        The weight's ``value`` is the sum over taps, its ``unknown`` says where any tap isn't 0.
    """
    x, w = (env[n] for n in node.args[:2])  # type: ignore[index]
    groups: Any = node.args[8]
    live, total = w.live().flatten(2).any(2), w.value.flatten(2).sum(2)
    sums = [grouped(t, groups) for t in (total, live)]  # [G, out, in], or [G, in, out]
    if not node.args[6]:
        sums = [t.transpose(1, 2) for t in sums]
    return x, Known(*sums)


def moves_off_the_edge(node: Node) -> bool:
    """Whether constant channels make an output that differs at the edge."""
    padding: Any = node.args[4]
    return bool(node.args[6]) or any(amount != 0 for amount in padding)


def convolution(node: Node, env: Env) -> Any:
    """Evaluate a convolution: an output channel is known where all that it sums is."""
    x, w = taps(node, env)
    groups: Any = node.args[8]
    known, value = (grouped(t, groups) for t in x.constant([1]))
    unknown = _any(~known, w.unknown)  # [G, out]
    if moves_off_the_edge(node):
        unknown = unknown | _any(value != 0, w.unknown)
    total = torch.matmul(value.unsqueeze(1).to(w.value.dtype), w.value).flatten()
    shape = node.meta["val"].shape
    unknown = unknown.flatten()
    if isinstance(node.args[2], Node):
        total, unknown = total + env[node.args[2]].value, unknown | env[node.args[2]].unknown
    form = (1, -1, *[1] * (len(shape) - 2))
    return some(total.view(form).expand(shape), unknown.view(form).expand(shape))


def attention(node: Node, env: Env) -> Any:
    """A mean of values with weights that sum to 1: constants stay, unless a mask hides all keys."""
    v: Known = env[node.args[2]]  # type: ignore[index]
    metas = node.meta["val"]
    known, value = v.constant([0, 1, 3])
    masked = any(isinstance(a, Node) for a in [*node.args[3:], node.kwargs.get("attn_mask")])
    if masked:
        known = known & (value == 0)
    shape = metas[0].shape
    repeat = shape[1] // value.shape[1]  # each head of keys serves a run of queries' heads
    known, value = (t.repeat_interleave(repeat, 1).unsqueeze(2) for t in (known, value))
    return [some(value.expand(shape), (~known).expand(shape)), *map(unknown_like, metas[1:])]
