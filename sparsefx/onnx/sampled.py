"""Sampled products in a file: a named function of standard operators for each kind.

    MatMul(x, w), Gemm(x, w, b)   ->   sparsefx::SampledMatMul_*(x, w), SampledGemm_*(x, w, b)
    Conv(x, w, b)                 ->   sparsefx::SampledConv_*(x, w, b)

As passes/rewrite_sampled.py has it (Adelman et al., NeurIPS 2021): norms of both operands by
ReduceSumSquare, in float32 at least, the k largest pairs by TopK, Gather, and the product of what
was gathered. Nothing depends on the number of rows, so that the batch may be dynamic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsefx.config import Sampled
from sparsefx.errors import ExportError
from sparsefx.onnx.forms import add_domain
from sparsefx.onnx.tensors import DOMAIN

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_LAYOUT = ("Transpose", "Identity")
_SIDES = {"product": "product", "weight": "right", "input": "left", "uniform": "uniform"}


@dataclass(frozen=True)
class Product:
    """A forward product of the model's graph.

    Attributes:
        parameter: the name of its weight; "" where that is no parameter.
        layer: qualified name of the layer.
        pattern: how it is sampled; None where it isn't.
        weight_left: whether the weight is the left operand.
    """

    parameter: str
    layer: str
    pattern: Sampled | None
    weight_left: bool = False


def check(products: Sequence[Product]) -> None:
    """Refuse what no function here computes.

    Raises:
        ExportError: for estimators that draw at random, a mass, estimated scores, products without
            a weight on the right.
    """
    for product in products:
        if product.pattern is not None and (reason := _unsupported(product)):
            raise ExportError(
                f"{product.layer!r} is sampled at inference ({product.pattern}), and {reason}; "
                "sampled='exact' exports the dense product"
            )


def _unsupported(product: Product) -> str:
    pattern = product.pattern
    assert pattern is not None
    if pattern.random:
        return f"estimator={pattern.estimator!r} draws at random, which a file can't repeat"
    if pattern.estimator != "topk":
        return f"estimator={pattern.estimator!r} can't be written: only 'topk' can"
    if pattern.mass is not None:
        return f"mass={pattern.mass} can't be written: only a ratio can"
    if pattern.scores not in _SIDES:
        return f"scores={pattern.scores!r} can't be written: only {', '.join(_SIDES)} can"
    if not product.parameter:
        return "its right operand is no parameter, so that no product of the file is known as it"
    return "its weight is the left operand" if product.weight_left else ""


def rewrite(model: Any, products: Sequence[Product], tensors: Mapping[str, str]) -> int:
    """Replace sampled products of an ``onnx.ModelProto`` by calls; returns how many.

    Args:
        model: as the exporter wrote it.
        products: all forward products of the model's graph, in order.
        tensors: by parameter, the initializer that holds it.

    Raises:
        ExportError: when the file's products of a weight aren't those of the graph.
    """
    planned: dict[str, list[Product]] = defaultdict(list)
    for product in products:
        if product.parameter:
            planned[tensors.get(product.parameter, product.parameter)].append(product)
    wanted = {name for name, uses in planned.items() if any(use.pattern for use in uses)}
    readers: dict[str, list[tuple[int, Any, list[int]]]] = defaultdict(list)
    for place, node, name, shape in _readers(model, wanted):
        readers[name].append((place, node, shape))
    functions: dict[str, str] = {}
    count = 0
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    kinds = {proto.name: proto.data_type for proto in model.graph.initializer}
    for name in sorted(wanted):
        if len(readers[name]) != len(planned[name]):
            raise ExportError(
                f"{planned[name][0].layer!r} is sampled at inference, and the file has "
                f"{len(readers[name])} products of its weight {planned[name][0].parameter!r} where "
                f"the model's graph has {len(planned[name])}; sampled='exact' exports the dense "
                "product"
            )
        for (place, node, shape), product in zip(readers[name], planned[name], strict=True):
            if product.pattern is None:
                continue
            called = _call(node, shape, product.pattern, kinds[name], functions, opset)
            if called is not None:
                model.graph.node[place].CopyFrom(called)
                count += 1
    if functions:
        import onnx

        add_domain(model)
        model.functions.extend(onnx.parser.parse_function(text) for text in functions.values())
    return count


def _readers(model: Any, wanted: set[str]) -> Iterator[tuple[int, Any, str, list[int]]]:
    """Every product of a wanted weight: place, node, the initializer, its shape as it is read."""
    import onnx

    seen = {p.name: (p.name, list(p.dims)) for p in model.graph.initializer if p.name in wanted}
    for place, node in enumerate(model.graph.node):
        if node.op_type in _LAYOUT and node.input[0] in seen:
            name, shape = seen[node.input[0]]
            found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            perm = found.get("perm", list(range(len(shape)))[::-1])
            if node.op_type == "Identity":
                perm = list(range(len(shape)))
            seen[node.output[0]] = name, [shape[axis] for axis in perm]
        elif node.op_type in _PRODUCTS and node.input[1] in seen:
            yield place, node, *seen[node.input[1]]


def _call(
    node: Any, shape: list[int], pattern: Sampled, kind: int, functions: dict[str, str], opset: int
) -> Any:
    """The node that calls the function of a product; None where all pairs are used."""
    import onnx

    facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    turned = bool(facts.get("transB", 0))
    depth = shape[1] if node.op_type == "Conv" or turned else shape[0]
    if facts.get("transA") or facts.get("alpha", 1.0) != 1 or facts.get("beta", 1.0) != 1:
        raise ExportError(
            f"node {node.name!r} ({node.op_type} {facts}) can't be sampled in the file; "
            "sampled='exact' exports the dense product"
        )
    k = pattern.k(depth)
    if k >= depth:
        return None
    wide = 11 if kind == 11 else 1  # float64 stays, all else is scored in float32
    side = _SIDES[pattern.scores]
    if node.op_type == "Conv":
        body = _conv(shape, k, side, wide, facts, len(node.input) > 2)
    else:
        body = _mm(node.op_type, depth, k, side, wide, turned, len(node.input) > 2)
    if body not in functions:
        name = f"Sampled{node.op_type}_{k}of{depth}_{side}_{len(functions)}"
        functions[body] = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]> {name} {body}'
    name = functions[body].split("> ", 1)[1].split(" ", 1)[0]
    called = onnx.helper.make_node(
        name, list(node.input), list(node.output), name=node.name, domain=DOMAIN
    )
    called.metadata_props.extend(node.metadata_props)
    return called


# --- bodies


def _ints(name: str, values: Sequence[int]) -> str:
    return f"{name} = Constant <value_ints: ints = [{', '.join(map(str, values))}]> ()"


def _chosen(k: int, side: str) -> list[str]:
    """``left`` and ``right``, sums of squares [*, K] -> ``pairs`` [*, k], ascending."""
    score = {
        "left": ["score = Identity (left)"],
        "right": ["score = Identity (right)"],
        "product": ["a = Sqrt (left)", "b = Sqrt (right)", "score = Mul (a, b)"],
    }[side]
    return [
        *score,
        _ints("k", [k]),
        "largest, any_order = TopK (score, k)",
        "pairs, order = TopK <largest: int = 0> (any_order, k)",
    ]


def _mm(op: str, depth: int, k: int, side: str, wide: int, turned: bool, bias: bool) -> str:
    """X [*, M, K], w [K, N], or [N, K] where ``turned``."""
    columns = "first" if turned else "last"
    lines = [_ints("matrix", [-1, depth]), _ints("first", [0]), _ints("last", [1])]
    if side == "uniform":
        lines.append(_ints("pairs", range(k)))
    else:
        lines += [
            "rows = Reshape (x, matrix)",
            f"wide_x = Cast <to: int = {wide}> (rows)",
            f"wide_w = Cast <to: int = {wide}> (w)",
            "left = ReduceSumSquare <keepdims: int = 0> (wide_x, first)",
            f"right = ReduceSumSquare <keepdims: int = 0> (wide_w, {columns})",
            *_chosen(k, side),
        ]
    lines += [
        "xs = Gather <axis: int = -1> (x, pairs)",
        f"ws = Gather <axis: int = {int(turned)}> (w, pairs)",
    ]
    if op == "MatMul":
        lines.append("y = MatMul (xs, ws)")
    else:
        lines.append(f"y = Gemm <transB: int = {int(turned)}> (xs, ws{', c' if bias else ''})")
    return _body(lines, bias)


def _conv(
    shape: Sequence[int], k: int, side: str, wide: int, facts: Mapping[str, Any], bias: bool
) -> str:
    """X [batch, groups * K, *spatial], w [groups * out, K, *taps]: k channels of each group."""
    groups = facts.get("group", 1)
    filters, depth, *taps = shape
    out, count = filters // groups, math.prod(taps)
    lines = [_ints("by_group", [0, groups, depth, -1]), _ints("filters", [groups, out, depth, -1])]
    lines.append("grouped = Reshape (w, filters)")
    if side == "uniform":
        each = [place + group * depth for group in range(groups) for place in range(k)]
        lines.append(_ints("channels", each))
    else:
        lines += [
            "planes = Reshape (x, by_group)",
            f"wide_x = Cast <to: int = {wide}> (planes)",
            f"wide_w = Cast <to: int = {wide}> (grouped)",
            _ints("but_channels", [0, 3]),
            _ints("but_inputs", [1, 3]),
            "left = ReduceSumSquare <keepdims: int = 0> (wide_x, but_channels)",
            "right = ReduceSumSquare <keepdims: int = 0> (wide_w, but_inputs)",
            *_chosen(k, side),
            _ints("column", [groups, 1]),
            _ints("firsts", [group * depth for group in range(groups)]),
            "start = Reshape (firsts, column)",
            "all = Add (pairs, start)",
            _ints("flat", [-1]),
            "channels = Reshape (all, flat)",
        ]
    lines += [
        "xs = Gather <axis: int = 1> (x, channels)",
        "turned = Transpose <perm: ints = [0, 2, 1, 3]> (grouped)",
        _ints("lines", [groups * depth, out * count]),
        "inputs = Reshape (turned, lines)",
        "picked = Gather <axis: int = 0> (inputs, channels)",
        _ints("split", [groups, k, out, count]),
        "separate = Reshape (picked, split)",
        "back = Transpose <perm: ints = [0, 2, 1, 3]> (separate)",
        _ints("smaller", [filters, k, *taps]),
        "ws = Reshape (back, smaller)",
        f"y = Conv <{_attributes(facts)}> (xs, ws{', c' if bias else ''})",
    ]
    return _body(lines, bias)


def _attributes(facts: Mapping[str, Any]) -> str:
    written = []
    for name, value in facts.items():
        if name == "auto_pad":
            written.append(f'auto_pad: string = "{value.decode()}"')
        elif isinstance(value, int):
            written.append(f"{name}: int = {value}")
        else:
            written.append(f"{name}: ints = [{', '.join(map(str, value))}]")
    return ", ".join(written)


def _body(lines: Sequence[str], bias: bool) -> str:
    inputs = "x, w, c" if bias else "x, w"
    return f"({inputs}) => (y) {{ {' '.join(lines)} }}"
