"""What an N:M product with an activation behind it means: act(nm_mm(x, w, bias, ...)).

    nm_mm_act(x, w, bias, n, m, dim, transposable, activation)

``activation`` is "relu", "gelu" (by erf), "gelu_tanh" or "silu". A kernel activates the float32
sums and rounds once; the reference rounds the product to its dtype first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.errors import ConfigError
from sparsefx.ops import nm
from sparsefx.ops._define import define, differentiate

aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of (grad, what went in)
    "gelu": aten.gelu_backward,
    "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"),
    "silu": aten.silu_backward,
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation by its name.

    Raises:
        ConfigError: for a name that is none of :data:`ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation={name!r}: use one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def _nm_mm_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    dim: int,
    transposable: bool,
    activation: str,
) -> Tensor:
    return activation_of(activation)(nm.nm_mm(x, w, bias, n, m, dim, transposable))


nm_mm_act = define(
    "nm_mm_act(Tensor x, Tensor w, Tensor? bias, int n, int m, int dim, bool transposable, "
    "str activation) -> Tensor",
    _nm_mm_act,
    nm._fake_mm,
    nm._nm_mm_flops,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bias, *ctx.pattern, ctx.activation = inputs
    ctx.save_for_backward(x, w, bias, output if ctx.activation == "relu" else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """A relu is undone by its result; the others compute what went in once more."""
    x, w, bias, output = ctx.saved_tensors
    if ctx.activation == "relu":
        inner = aten.threshold_backward(grad, output, 0)
    else:
        before = nm.nm_mm(x, w, bias, *ctx.pattern)
        inner = _DERIVATIVES[ctx.activation](grad, before)
    gradients = nm.product_gradients(x, w, ctx.pattern, inner, ctx.needs_input_grad)
    return *gradients, *[None] * 5


differentiate(nm_mm_act, _setup, _backward)
