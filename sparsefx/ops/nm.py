"""What the N:M ops mean: of every m consecutive weights along an axis, the n largest |w| act.

    nm_mask(w, n, m, dim, transposable)             bool, the shape of w
    nm_mm(x, w, bias, n, m, dim, transposable)      x @ where(nm_mask(w, ...), w, 0) + bias
    masked_mm(x, w, mask, bias)                     x @ where(mask, w, 0) + bias
    nm_conv, masked_conv                            the same for a convolution's weight
    nm_conv_grad_input, masked_conv_grad_input      dL/dx of those

Shapes: x [M, K], w [K, N], bias [N]; a linear layer's weight [out, in] enters as its transposed
view. ``dim`` is the axis of w along which the groups run: 0 in a forward, 1 in the grad_input that
shares its mask (there x is the gradient [M, out] and w is [out, in]). Convolutions: w is
[out, in / groups, *taps]; groups of m run along axis ``dim`` for each tap, 1 in a forward.

Gradients are the exact ones, zero outside the mask; the straight-through gradient is a decision
of the compiler, not of the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx import masks
from sparsefx.ops import dense
from sparsefx.ops._define import define, differentiate

aten = torch.ops.aten
Ints = Sequence[int]
_NM = "int n, int m, int dim, bool transposable"


def keep(w: Tensor, mask: Tensor) -> Tensor:
    """Return w where mask, else 0."""
    return torch.where(mask, w, torch.zeros((), dtype=w.dtype, device=w.device))


# --- the mask


def _nm_mask(w: Tensor, n: int, m: int, dim: int, transposable: bool) -> Tensor:
    if transposable:
        return masks.transposable_mask(w, n, m).contiguous()
    return masks.nm_mask(w, n, m, dim).contiguous()


def _fake_mask(w: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(w, dtype=torch.bool, memory_format=torch.contiguous_format)


nm_mask = define(f"nm_mask(Tensor w, {_NM}) -> Tensor", _nm_mask, _fake_mask)

# --- matrix products


def _masked_mm(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    kept = keep(w, mask)
    return x @ kept if bias is None else torch.addmm(bias, x, kept)


def _nm_mm(
    x: Tensor, w: Tensor, bias: Tensor | None, n: int, m: int, dim: int, transposable: bool
) -> Tensor:
    return _masked_mm(x, w, _nm_mask(w, n, m, dim, transposable), bias)


def _fake_mm(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


def _mm_flops(x: Ints, w: Ints, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * w[1]


def _nm_mm_flops(x: Ints, w: Ints, bias: object, n: int, m: int, *_: Any, **__: Any) -> int:
    return _mm_flops(x, w) * n // m


masked_mm = define(
    "masked_mm(Tensor x, Tensor w, Tensor mask, Tensor? bias) -> Tensor",
    _masked_mm,
    _fake_mm,
    _mm_flops,
)
nm_mm = define(
    f"nm_mm(Tensor x, Tensor w, Tensor? bias, {_NM}) -> Tensor", _nm_mm, _fake_mm, _nm_mm_flops
)

# --- convolutions; `where` is (stride, padding, dilation, groups)


def _conv(x: Tensor, w: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    stride, padding, dilation, groups = where
    zeros = [0] * len(stride)
    out: Tensor = aten.convolution(x, w, bias, stride, padding, dilation, False, zeros, groups)
    return out


def _masked_conv(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    return _conv(x, keep(w, mask), bias, *where)


def _nm_conv(x: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *where, n, m, dim, transposable = rest
    return _masked_conv(x, w, _nm_mask(w, n, m, dim, transposable), bias, *where)


def _fake_nm_conv(x: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return _masked_conv(x, w, _fake_mask(w), bias, *rest[:4])  # the layout follows the mask's, too


def _masked_conv_grad_input(
    grad: Tensor, w: Tensor, mask: Tensor, input_size: Ints, *where: Any
) -> Tensor:
    return dense._grad_input(grad, keep(w, mask), input_size, *where)


def _nm_conv_grad_input(grad: Tensor, w: Tensor, input_size: Ints, *rest: Any) -> Tensor:
    *where, n, m, dim, transposable = rest
    mask = _nm_mask(w, n, m, dim, transposable)
    return _masked_conv_grad_input(grad, w, mask, input_size, *where)


def _fake_nm_conv_grad_input(grad: Tensor, w: Tensor, input_size: Ints, *rest: Any) -> Tensor:
    return _masked_conv_grad_input(grad, w, _fake_mask(w), input_size, *rest[:4])


def _conv_flops(x: Ints, w: Ints, *_: Any, out_shape: Any = (), **__: Any) -> int:
    return dense.conv_flops(out_shape, w)


def _nm_conv_flops(x: Ints, w: Ints, *rest: Any, out_shape: Any = (), **__: Any) -> int:
    return int(dense.conv_flops(out_shape, w) * rest[-4] // rest[-3])


def _grad_input_flops(grad: Ints, w: Ints, *_: Any, **__: Any) -> int:
    return dense.conv_flops(grad, w)


def _nm_grad_input_flops(grad: Ints, w: Ints, *rest: Any, **__: Any) -> int:
    return int(dense.conv_flops(grad, w) * rest[-4] // rest[-3])


masked_conv = define(
    f"masked_conv(Tensor x, Tensor w, Tensor mask, Tensor? bias, {dense.GEOMETRY}) -> Tensor",
    _masked_conv,
    _masked_conv,
    _conv_flops,
)
nm_conv = define(
    f"nm_conv(Tensor x, Tensor w, Tensor? bias, {dense.GEOMETRY}, {_NM}) -> Tensor",
    _nm_conv,
    _fake_nm_conv,
    _nm_conv_flops,
)
masked_conv_grad_input = define(
    "masked_conv_grad_input(Tensor grad, Tensor w, Tensor mask, SymInt[] input_size, "
    f"{dense.GEOMETRY}) -> Tensor",
    _masked_conv_grad_input,
    _masked_conv_grad_input,
    _grad_input_flops,
)
nm_conv_grad_input = define(
    f"nm_conv_grad_input(Tensor grad, Tensor w, SymInt[] input_size, {dense.GEOMETRY}, {_NM}) "
    "-> Tensor",
    _nm_conv_grad_input,
    _fake_nm_conv_grad_input,
    _nm_grad_input_flops,
)

# --- exact derivatives, for those who call the ops eagerly


def _setup_masked_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward_masked_mm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, mask = ctx.saved_tensors
    need_x, need_w, _, need_bias = ctx.needs_input_grad
    return (
        masked_mm(grad, w.t(), mask.t(), None) if need_x else None,
        keep(x.t() @ grad, mask) if need_w else None,
        None,
        grad.sum(0) if need_bias else None,
    )


def _setup_nm_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, *ctx.pattern = inputs
    ctx.save_for_backward(x, w)


def _backward_nm_mm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w = ctx.saved_tensors
    return *product_gradients(x, w, ctx.pattern, grad, ctx.needs_input_grad), *[None] * 4


def product_gradients(
    x: Tensor, w: Tensor, pattern: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return nm_mm's gradients by x [M, K], w [K, N] and bias [N], as far as they are needed."""
    need_x, need_w, need_bias, *_ = needs
    mask = nm_mask(w, *pattern)  # of w, never of w.t(): ties may fall otherwise there
    return (
        masked_mm(grad, w.t(), mask.t(), None) if need_x else None,
        keep(x.t() @ grad, mask) if need_w else None,
        grad.sum(0) if need_bias else None,
    )


def _setup_masked_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, mask, _, *ctx.where = inputs
    ctx.save_for_backward(x, w, mask)


def _backward_masked_conv(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, mask = ctx.saved_tensors
    need_x, need_w, _, need_bias, *_ = ctx.needs_input_grad
    others = [d for d in range(grad.dim()) if d != 1]
    return (
        masked_conv_grad_input(grad, w, mask, x.shape, *ctx.where) if need_x else None,
        keep(dense.conv_grad_weight(grad, x, w.shape, *ctx.where), mask) if need_w else None,
        None,
        grad.sum(others) if need_bias else None,
        *[None] * 4,
    )


def _setup_nm_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, *ctx.rest = inputs
    ctx.save_for_backward(x, w)


def _backward_nm_conv(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w = ctx.saved_tensors
    need_x, need_w, need_bias, *_ = ctx.needs_input_grad
    *where, n, m, dim, transposable = ctx.rest
    others = [d for d in range(grad.dim()) if d != 1]
    mask = nm_mask(w, n, m, dim, transposable)
    return (
        masked_conv_grad_input(grad, w, mask, x.shape, *where) if need_x else None,
        keep(dense.conv_grad_weight(grad, x, w.shape, *where), mask) if need_w else None,
        grad.sum(others) if need_bias else None,
        *[None] * 8,
    )


differentiate(masked_mm, _setup_masked_mm, _backward_masked_mm)
differentiate(nm_mm, _setup_nm_mm, _backward_nm_mm)
differentiate(masked_conv, _setup_masked_conv, _backward_masked_conv)
differentiate(nm_conv, _setup_nm_conv, _backward_nm_conv)
