"""The gradients of a convolution as two products, which ``aten.convolution_backward`` is not.

    conv_grad_input(g, w)   dL/dx       conv_grad_weight(g, x)   dL/dw

``canonicalize`` splits, ``cleanup`` joins what stayed dense. ``stride``, ``padding`` and
``dilation`` have one entry per spatial axis; shapes are [batch, channels, *spatial].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx.ops._define import define

aten = torch.ops.aten
Ints = Sequence[int]

GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"


def conv_flops(image: Sequence[Any], weight: Sequence[Any]) -> int:
    """2 * batch * positions * out * (in / groups) * taps; ``image`` is the output's shape."""
    return int(2 * math.prod(image) * math.prod(weight[1:]))


def _grad_input(
    grad: Tensor, w: Tensor, input_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int,
) -> Tensor:  # fmt: skip
    # a transposed convolution is exactly this gradient, and needs no stand-in for the input
    spare = [
        size - ((out - 1) * s - 2 * p + d * (tap - 1) + 1)
        for size, out, s, p, d, tap in zip(
            input_size[2:], grad.shape[2:], stride, padding, dilation, w.shape[2:], strict=True
        )
    ]
    out: Tensor = aten.convolution(
        grad, w, None, stride, padding, dilation, True, spare, groups
    )  # fmt: skip
    return out


def _grad_weight(
    grad: Tensor, x: Tensor, weight_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int,
) -> Tensor:  # fmt: skip
    like = x.new_empty(()).expand(weight_size)  # only its shape is read
    out: Tensor = aten.convolution_backward(
        grad, x, like, None, stride, padding, dilation, False, [0] * len(stride), groups,
        [False, True, False],
    )[1]  # fmt: skip
    return out


def _grad_weight_flops(grad: Ints, x: Ints, weight_size: Ints, *_: Any, **__: Any) -> int:
    return conv_flops(grad, weight_size)


def _grad_input_flops(grad: Ints, w: Ints, *_: Any, **__: Any) -> int:
    return conv_flops(grad, w)


conv_grad_input = define(
    f"conv_grad_input(Tensor grad, Tensor w, SymInt[] input_size, {GEOMETRY}) -> Tensor",
    _grad_input,
    _grad_input,
    _grad_input_flops,
)
conv_grad_weight = define(
    f"conv_grad_weight(Tensor grad, Tensor x, SymInt[] weight_size, {GEOMETRY}) -> Tensor",
    _grad_weight,
    _grad_weight,
    _grad_weight_flops,
)
