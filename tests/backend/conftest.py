"""An eager reference that shares no code with the compiler, and what compares a model with it.

The reference copies a model and gives named layers a forward of their own: three products each,
written out in plain torch as the README of a published method would.
"""

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx import compat

# --- patterns by hand


def nm_mask(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Keep a weight when fewer than n of its group are larger, or equal and earlier."""
    rows = w.detach().abs().movedim(dim, -1)
    groups = rows.reshape(*rows.shape[:-1], -1, m)
    mine, other = groups[..., :, None], groups[..., None, :]
    earlier = torch.arange(m)[None, :] < torch.arange(m)[:, None]
    rank = ((other > mine) | ((other == mine) & earlier)).sum(-1)
    return (rank < n).reshape(rows.shape).movedim(-1, dim)


def tile_mask(w: Tensor, n: int, m: int) -> Tensor:
    """The best of all m x m tiles with n per row and per column, found by trying each."""
    rows = [[float(i in kept) for i in range(m)] for kept in itertools.combinations(range(m), n)]
    tiles = torch.tensor([*itertools.product(rows, repeat=m)], dtype=torch.float64)
    tiles = tiles[(tiles.sum(1) == n).all(1)]
    mask = torch.zeros_like(w, dtype=torch.bool)
    for i, j in itertools.product(range(0, w.shape[0], m), range(0, w.shape[1], m)):
        block = w.detach()[i : i + m, j : j + m].double().abs()
        if w.dim() == 2:
            mask[i : i + m, j : j + m] = tiles[(tiles * block).sum((1, 2)).argmax()].bool()
            continue
        for tap in itertools.product(*map(range, w.shape[2:])):
            best = tiles[(tiles * block[(..., *tap)]).sum((1, 2)).argmax()].bool()
            mask[(slice(i, i + m), slice(j, j + m), *tap)] = best
    return mask


def mask_of(w: Tensor, pattern: sfx.NM, dim: int = 1) -> Tensor:
    if pattern.transposable:
        return tile_mask(w, pattern.n, pattern.m)
    return nm_mask(w, pattern.n, pattern.m, dim)


def largest(left: Tensor, right: Tensor, pattern: sfx.Sampled) -> Tensor:
    """The k pairs of rows with the largest product of norms (or the largest norm of the right)."""
    wide = torch.promote_types(left.dtype, torch.float32)
    a, b = (t.to(wide).flatten(1).pow(2).sum(1).sqrt() for t in (left, right))
    score = b if pattern.scores == "weight" else a * b
    depth = score.shape[0]
    k = min(depth, max(pattern.min_k, int(pattern.ratio * depth)))
    return score.sort(descending=True, stable=True).indices[:k].sort().values


# --- three products by hand


class LinearProducts:
    """y = x @ w.T of [M, K] and [N, K]."""

    @staticmethod
    def pairs(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x.t(), w.t()

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()

    @staticmethod
    def grad_input(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return g @ w

    @staticmethod
    def grad_weight(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return g.t() @ x


class ConvProducts:
    """A convolution without groups; what it sums over are input channels."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.where = layer.stride, layer.padding, layer.dilation

    @staticmethod
    def pairs(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x.transpose(0, 1), w.transpose(0, 1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w, None, *self.where)

    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return nn.grad.conv2d_input(x.shape, w, g, *self.where)

    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return nn.grad.conv2d_weight(x, w.shape, g, *self.where)


class Product(torch.autograd.Function):
    """One layer's three products under a rule, each written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, rule: sfx.Rule, products: Any) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.rule, ctx.products, forward = rule, products, rule.forward
        if isinstance(forward, sfx.NM):
            return products.forward(x, w * mask_of(w, forward))
        if isinstance(forward, sfx.Sampled):
            kept = largest(*products.pairs(x, w), forward)
            return products.forward(x[:, kept], w[:, kept])
        return products.forward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, w = ctx.saved_tensors
        return Product.grad_input(ctx, g, x, w), Product.grad_weight(ctx, g, x, w), None, None

    @staticmethod
    def grad_input(ctx: Any, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        asked, forward, products = ctx.rule.grad_input, ctx.rule.forward, ctx.products
        if isinstance(asked, sfx.NM):
            return products.grad_input(g, x, w * mask_of(w, asked, dim=0))
        if isinstance(asked, sfx.Sampled):  # over output features
            kept = largest(g.transpose(0, 1), w, asked)
            return products.grad_input(g[:, kept], x, w[kept])
        if asked is None and isinstance(forward, sfx.NM):
            return products.grad_input(g, x, w * mask_of(w, forward))
        if asked is None and isinstance(forward, sfx.Sampled):
            kept = largest(*products.pairs(x, w), forward)
            full = torch.zeros_like(x)
            full[:, kept] = products.grad_input(g, x[:, kept], w[:, kept])
            return full
        return products.grad_input(g, x, w)

    @staticmethod
    def grad_weight(ctx: Any, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        asked, forward, products = ctx.rule.grad_weight, ctx.rule.forward, ctx.products
        if isinstance(asked, sfx.Sampled):  # over tokens, or examples of a convolution
            kept = largest(x, g, asked)
            full = products.grad_weight(g[kept], x[kept], w)
        elif asked is None and isinstance(forward, sfx.Sampled):
            kept = largest(*products.pairs(x, w), forward)
            full = torch.zeros_like(w)
            full[:, kept] = products.grad_weight(g, x[:, kept], w[:, kept])
        else:
            full = products.grad_weight(g, x, w)
        if isinstance(forward, sfx.NM):  # its decay acts whatever computed the product
            mask = mask_of(w, forward)
            full = full * mask if forward.weight_grad == "masked" else full
            full = full + forward.decay * torch.where(mask, torch.zeros_like(w), w)
        return full


def _forward_of(layer: nn.Module, rule: sfx.Rule) -> Callable[[Tensor], Tensor]:
    conv = isinstance(layer, nn.Conv2d)
    products = ConvProducts(layer) if conv else LinearProducts()

    def forward(x: Tensor) -> Tensor:
        w, b = layer.weight, layer.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, w, b = x.to(dtype), w.to(dtype), b if b is None else b.to(dtype)
        flat = x if conv else x.reshape(-1, x.shape[-1])
        with torch.autocast("cpu", enabled=False):
            y = Product.apply(flat, w, rule, products)
        if b is not None:
            y = y + (b.view(1, -1, 1, 1) if conv else b)
        return y if conv else y.view(*x.shape[:-1], -1)

    return forward


def by_hand(model: nn.Module, rules: Mapping[str, sfx.Rule]) -> nn.Module:
    """Copy a model; its layers of these names compute what the rules say, in eager mode."""
    twin = copy.deepcopy(model)
    for name, rule in rules.items():
        layer = twin.get_submodule(name)
        layer.forward = _forward_of(layer, rule)
    return twin


# --- comparing


def run(model: Any, params: Any, *args: Tensor) -> dict[str, Tensor]:
    """Return the output and every gradient of a fixed loss; gradients start from nothing."""
    for p in params.values():
        p.grad = None
    inputs = [a.detach().clone(memory_format=torch.preserve_format) for a in args]
    for a, given in zip(inputs, args, strict=True):
        a.requires_grad_(given.requires_grad)
    y = model(*inputs)
    weight = torch.linspace(-1, 1, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view(y.shape)
    (y * weight).sum().backward()
    found = {"output": y.detach()}
    found |= {f"input {i}": a.grad for i, a in enumerate(inputs) if a.requires_grad}
    found |= {name: p.grad for name, p in params.items() if p.requires_grad}
    return found


def agree(
    compiled: Any, model: nn.Module, twin: nn.Module, *args: Tensor, **tolerance: float
) -> None:
    """Compare outputs and all gradients; ``model`` owns the parameters that ``compiled`` reads."""
    got = run(compiled, dict(model.named_parameters()), *args)
    wanted = run(twin, dict(twin.named_parameters()), *args)
    same(got, wanted, **tolerance)


def same(got: Mapping[str, Any], wanted: Mapping[str, Any], **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None or got[name] is None:
            assert value is got[name], name
            continue
        torch.testing.assert_close(
            got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def compile_eager(model: Any, config: Any = None, **kwargs: Any) -> Any:
    """Compile without Inductor, every graph checked between the passes."""
    given = sfx.config.as_config(config)
    given = replace(given, codegen="aot_eager", verify=True)
    return torch.compile(model, backend="sparsefx", options={"config": given}, **kwargs)


def records(compiled: Any) -> list[Any]:
    return compat.wrapper_of(compiled)._sparsefx


def sparse(compiled: Any) -> set[tuple[str, str]]:
    """Return (layer, role) of every product that became a sparse op, in any graph."""
    found = set()
    for record in records(compiled):
        served = record.outcome.ops
        found |= {
            (p.site.layer, p.site.role)
            for p in record.outcome.plans
            if (p.site.group, p.site.role) in served
        }
    return found


class MLP(nn.Module):
    """Three layers; the last one feeds the output."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.second(x)))


class CNN(nn.Module):
    """Two convolutions and a layer that feeds the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.last = nn.Linear(12 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.second(x)).flatten(1))


@pytest.fixture
def kit() -> SimpleNamespace:
    """Everything above, since a test can't import its conftest."""
    return SimpleNamespace(
        CNN=CNN,
        MLP=MLP,
        agree=agree,
        by_hand=by_hand,
        compile=compile_eager,
        mask_of=mask_of,
        records=records,
        run=run,
        same=same,
        sparse=sparse,
    )
