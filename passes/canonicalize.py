"""Give every product a node of its own, so that the passes behind meet one form of each.

    addmm(b, x, w, beta, alpha)             ->  add(mul(mm(x, w), alpha), mul(b, beta))
                                                unless it is the linear layer's b[N] + x @ w
    baddbmm(b, x, w, beta, alpha)           ->  likewise, with bmm
    getitem(convolution_backward(...), i)   ->  conv_grad_input | conv_grad_weight | sum

Needs    nothing.
Keeps    values within rounding, shapes, provenance.
"""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsefx import ops
from sparsefx.compat import OpOverload
from sparsefx.rewriting import PassResult, Skip, arguments, emit, rewrite_nodes, size, value

aten = torch.ops.aten


def canonicalize(gm: GraphModule, *, excluded: Iterable[str] = ()) -> PassResult:
    """Run the pass; nodes named in ``excluded`` are left alone."""
    return rewrite_nodes(
        gm,
        {
            aten.addmm.default: _split_addmm,
            aten.baddbmm.default: _split_baddbmm,
            operator.getitem: _split_convolution_backward,
        },
        excluded=excluded,
    )


def _split_addmm(addmm: Node) -> Node | Skip | None:
    bias = arguments(addmm)[0]
    plain = all(addmm.kwargs.get(key, 1) == 1 for key in ("alpha", "beta"))
    if plain and value(bias).dim() == 1 and value(bias).shape[0] == value(addmm).shape[1]:
        return None
    return _product_plus(addmm, aten.mm.default)


def _split_baddbmm(baddbmm: Node) -> Node | Skip | None:
    return _product_plus(baddbmm, aten.bmm.default)


def _product_plus(node: Node, product: OpOverload) -> Node:
    bias, left, right = arguments(node)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    out = emit(node, product, left, right)
    if alpha != 1:
        out = emit(node, aten.mul.Tensor, out, alpha)
    if beta == 0:  # the bias is not read then, NaN or not
        return out
    scaled = bias if beta == 1 else emit(node, aten.mul.Tensor, bias, beta)
    return emit(node, aten.add.Tensor, out, scaled)


def _split_convolution_backward(item: Node) -> Node | Skip | None:
    backward, index = arguments(item)
    if not isinstance(backward, Node) or backward.target is not aten.convolution_backward.default:
        return None
    if not isinstance(item.meta.get("val"), Tensor):
        return None  # not computed: the output mask leaves it out
    grad, x, w, _, stride, padding, dilation, transposed, _, groups, _ = arguments(backward)
    if transposed:
        return Skip("transposed convolution")
    where = stride, padding, dilation, groups
    if index == 0:
        return emit(item, ops.conv_grad_input, grad, w, _sizes(item, x), *where)
    if index == 1:
        return emit(item, ops.conv_grad_weight, grad, x, _sizes(item, w), *where)
    return emit(item, aten.sum.dim_IntList, grad, [d for d in range(value(grad).dim()) if d != 1])


def _sizes(anchor: Node, tensor: Node) -> list[int | Node]:
    return [size(anchor, tensor, dim) for dim in range(value(tensor).dim())]
