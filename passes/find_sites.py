"""Find the products of every layer and tell forward, grad_input and grad_weight apart.

    mm, addmm, bmm, convolution                          forward
    mm, bmm, conv_grad_input, conv_grad_weight           its gradients: same seq_nr, and the same
                                                         operand behind the transposes
    _grouped_mm, and what Hugging Face has in its place  sites too, which stay dense

Needs    canonicalize ran; placeholders carry their names (meta["sparsefx_input"]).
Adds     meta["sparsefx"] = Plan(site) to every product's node.
"""

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsefx import naming, ops
from sparsefx.compat import OpOverload, settled
from sparsefx.plan import Kind, Plan, Role, Site, Size
from sparsefx.rewriting import (
    PLAN,
    PassResult,
    arguments,
    failing_at,
    is_backward,
    peel,
    plan_of,
    value,
)

aten = torch.ops.aten

_KINDS: dict[object, Kind] = {
    aten.mm.default: "mm",
    aten.addmm.default: "mm",
    aten.bmm.default: "bmm",
    aten.convolution.default: "conv",
}
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}
_GROUPED = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}  # a mixture of experts
_GROUPED_GRADIENTS = "transformers::grouped_mm_fallback_backward"  # both, in a tuple
_CONV_GRADIENTS: dict[object, Role] = {
    ops.conv_grad_input: "grad_input",
    ops.conv_grad_weight: "grad_weight",
}
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.unsqueeze.default, aten.expand.default, aten.alias.default, aten.detach.default,
    aten.clone.default, aten.slice.Tensor, aten.select.int,
    torch.ops.prims.convert_element_type.default, aten._to_copy.default,
}  # fmt: skip


def find_sites(gm: GraphModule, *, excluded: Iterable[str] = ()) -> PassResult:
    """Run the pass; forward products named in ``excluded`` and their gradients are no sites."""
    result, before = PassResult(gm), {n: plan_of(n) for n in gm.graph.nodes}
    graph, left_alone = _Graph(gm), set(excluded)
    for group, node in enumerate(graph.forwards):  # a group's number never depends on `excluded`
        if node.name in left_alone:
            continue
        with failing_at("find_sites", node):
            node.meta[PLAN] = Plan(_forward_site(node, group, graph))
    graph.drop(left_alone)
    for node in graph.backwards:
        with failing_at("find_sites", node):
            _mark_backward(node, graph)
    _block_unpaired(graph)
    for node in gm.graph.nodes:
        if plan_of(node) != _undecided(before.get(node)):
            result.modified = True
        elif before.get(node) is not None:  # found before: what was decided then stays
            node.meta[PLAN] = before[node]
    return result


def _undecided(plan: Plan | None) -> Plan | None:
    return plan and replace(plan, decision=None)


@dataclass
class _Graph:
    """What has to be known of the whole graph."""

    gm: GraphModule
    forwards: list[Node] = field(default_factory=list)
    backwards: list[Node] = field(default_factory=list)
    has_backward: bool = False

    def __post_init__(self) -> None:
        nodes = list(self.gm.graph.nodes)
        _tag_backward(nodes)
        self.has_backward = any(is_backward(n) for n in nodes)
        for node in nodes:
            if node.op != "call_function" or not _has_floats(node):
                continue
            if is_backward(node):
                self.backwards.append(node)
            elif _kind(node):
                self.forwards.append(node)
        self.activations = naming.depending(nodes, {"input"})
        self.learned = naming.depending(nodes, {"parameter"})
        self.final = _final_products(nodes, set(self.forwards))
        self.by_seq: dict[object, list[Node]] = {}
        for node in self.forwards:
            self.by_seq.setdefault(node.meta.get("seq_nr"), []).append(node)

    def drop(self, names: set[str]) -> None:
        """Forget forward products: their gradients then belong to none."""
        self.forwards = [node for node in self.forwards if node.name not in names]
        for seq, nodes in self.by_seq.items():
            self.by_seq[seq] = [node for node in nodes if node.name not in names]


def _schema(node: Node) -> str:
    target = node.target
    return str(target.name()) if isinstance(target, OpOverload) else ""  # type: ignore[no-untyped-call]


def _kind(node: Node) -> Kind | None:
    return "mm" if _schema(node) in _GROUPED else _KINDS.get(node.target)


def _opaque(node: Node) -> str:
    """Why the product is out of reach, whatever the rules say."""
    if _schema(node) in _GROUPED:
        return "grouped product: every expert multiplies rows of its own, known only when running"
    callers = node.meta.get("source_fn_stack") or [("", None)]
    if callers[-1][1] is torch.nn.functional.scaled_dot_product_attention:
        # where it is one operator no product shows, so what is sampled would depend on the device
        return "part of scaled_dot_product_attention, which other devices fuse"
    side = _tensors(node)[1]
    while side.target in _VIEWS:
        side = arguments(side)[0]
    if side.target is ops.nm_unpack:
        return (
            "its weight is packed, and keeps the pattern that it has; sparsefx.unpack undoes that"
        )
    return ""


def _tag_backward(nodes: Iterable[Node]) -> None:
    """Tag what waits for the backward: the nodes of a custom autograd function lack the tag."""
    for node in nodes:
        if node.op == "call_function" and any(map(is_backward, node.all_input_nodes)):
            node.meta["partitioner_tag"] = "is_backward"


def _has_floats(node: Node) -> bool:
    found = node.meta.get("val")
    return isinstance(found, Tensor) or (node.target is aten.convolution_backward.default)


def _final_products(nodes: list[Node], forwards: set[Node]) -> set[Node]:
    """Products that reach an output through views alone and feed no other product."""
    feeds: set[Node] = set()
    for node in reversed(nodes):
        if any((u in forwards or u in feeds) and not is_backward(u) for u in node.users):
            feeds.add(node)
    final: set[Node] = set()
    for result in nodes[-1].all_input_nodes:
        step: Node | None = result
        while step is not None and not is_backward(step):
            if step in forwards:
                if step not in feeds:
                    final.add(step)
                break
            viewed = step.op == "call_function" and step.target in _VIEWS
            source = step.args[0] if viewed else None
            step = source if isinstance(source, Node) else None
    return final


def _tensors(node: Node) -> tuple[Node, Node]:
    """The two factors of a product."""
    first = 1 if node.target is aten.addmm.default else 0
    left, right = arguments(node)[first : first + 2]
    assert isinstance(left, Node), node.format_node()
    assert isinstance(right, Node), node.format_node()
    return left, right


def _forward_site(node: Node, group: int, graph: _Graph) -> Site:
    left, right = _tensors(node)
    kind = _kind(node)
    assert kind is not None, node.format_node()
    sides = [side for side in (left, right) if side not in graph.activations]
    weight = "both" if len(sides) == 2 else None
    if len(sides) == 1:
        weight = "right" if sides[0] is right else "left"
    found = naming.weight_of(sides[0]) if len(sides) == 1 else None
    shape, channels = _shape(node, kind)
    transposed = kind == "conv" and bool(node.args[6])
    return Site(
        layer=naming.layer_of(node, found),
        role="forward",
        kind=kind,
        op=naming.op_name(node.target),
        shape=shape,
        dtype=str(value(right).dtype).removeprefix("torch."),
        device=value(right).device.type,
        group=group,
        module_types=naming.module_types(node),
        source=naming.source_line(node),
        weight=weight,
        weight_name=found,
        channels=channels,
        batch=settled(value(node).shape[0]) if kind == "bmm" else 1,
        depthwise=channels is not None and channels[0] == 1 and channels[2] != 1,
        transposed=transposed,
        is_output=node in graph.final,
        is_input=weight in ("left", "right")
        and (right if weight == "left" else left) not in graph.learned,
        has_backward=graph.has_backward,
        opaque=_opaque(node),
    )


def _shape(
    node: Node, kind: str
) -> tuple[tuple[Size, Size, Size], tuple[Size, Size, Size, Size] | None]:
    left, right = (value(side) for side in _tensors(node))
    if kind != "conv":
        return _settled(left.shape[-2], right.shape[-1], left.shape[-1]), None
    groups, out = arguments(node)[8], value(node)
    inner, outer = right.shape[1], right.shape[0]
    if node.args[6]:  # transposed: [in, out / groups, *taps]
        inner, outer = right.shape[0] // groups, right.shape[1] * groups
    rows = math.prod([out.shape[0], *out.shape[2:]])
    depth = inner * math.prod(right.shape[2:])
    channels = _settled(inner, outer // groups, groups)
    return _settled(rows, outer, depth), (*channels, settled(left.shape[0]))


def _settled(a: Size, b: Size, c: Size) -> tuple[Size, Size, Size]:
    return settled(a), settled(b), settled(c)


# --- backward


def _mark_backward(node: Node, graph: _Graph) -> None:
    for forward, role, flipped in _candidates(node, graph):
        plan = forward.meta[PLAN]
        m, n, k = plan.site.shape
        shape = (m, k, n) if role == "grad_input" else (k, n, m)
        target = _whole(node).target  # of a tuple's entry: what made the tuple
        site = replace(plan.site, role=role, op=naming.op_name(target), shape=shape)
        node.meta[PLAN] = Plan(site, flipped=flipped)
        return
    if node.target in (aten.mm.default, aten.bmm.default):
        left, right = (value(side) for side in _tensors(node))
        node.meta[PLAN] = Plan(
            Site(
                layer=naming.layer_of(node, None),
                role="other",
                kind="bmm" if node.target is aten.bmm.default else "mm",
                op=naming.op_name(node.target),
                shape=_settled(left.shape[-2], right.shape[-1], left.shape[-1]),
                batch=settled(left.shape[0]) if left.dim() == 3 else 1,
                dtype=str(right.dtype).removeprefix("torch."),
                device=right.device.type,
                group=-1,
                module_types=naming.module_types(node),
                source=naming.source_line(node),
            )
        )


def _block_unpaired(graph: _Graph) -> None:
    """Keep a forward exact whose gradient may be a product that wasn't recognised.

    Such products come from an autograd.Function's own backward. They stay exact, so their forward
    must, too: it shares their seq_nr, or it has no gradient that was recognised.
    """
    plans = {node: plan for node in graph.backwards if (plan := plan_of(node)) is not None}
    unpaired = {node for node, plan in plans.items() if plan.site.role == "other"}
    relatives = {node.meta.get("seq_nr") for node in unpaired}
    paired = {plan.site.group for node, plan in plans.items() if node not in unpaired}
    for forward in graph.forwards if unpaired else ():
        plan = forward.meta[PLAN]
        if forward.meta.get("seq_nr") in relatives or plan.site.group not in paired:
            reason = plan.site.opaque or "its gradient may be a product that was not recognised"
            forward.meta[PLAN] = Plan(replace(plan.site, opaque=reason))


def _candidates(node: Node, graph: _Graph) -> Iterator[tuple[Node, Role, bool]]:
    """Forward products that ``node`` is a gradient of: (forward, role, transposed)."""
    seq = node.meta.get("seq_nr")
    forwards = graph.by_seq.get(seq, []) if seq is not None else graph.forwards
    if node.target in _CONV_GRADIENTS or _unsplit(node):
        yield from _conv_candidates(node, forwards)
    elif _schema(node) in _GROUPED or _schema(_whole(node)) == _GROUPED_GRADIENTS:
        yield from _grouped_candidates(node, forwards)
    elif node.target in (aten.mm.default, aten.bmm.default):
        for forward in forwards:
            yield from _mm_candidates(node, forward)


def _whole(node: Node) -> Node:
    """What an entry of a tuple was taken from, else the node itself."""
    source = node.args[0] if node.target is operator.getitem else node
    return source if isinstance(source, Node) else node


def _unsplit(node: Node) -> bool:
    source = _whole(node)
    if source is node or source.target is not aten.convolution_backward.default:
        return False
    return node.args[1] in (0, 1)


def _grouped_candidates(node: Node, forwards: list[Node]) -> Iterator[tuple[Node, Role, bool]]:
    for forward in forwards:
        if _schema(forward) not in _GROUPED:
            continue
        x, w = (_untransposed(side) for side in _tensors(forward))
        if _schema(node) in _GROUPED:
            sides = {_untransposed(side) for side in _tensors(node)}
            if w in sides:
                yield forward, "grad_input", False
            elif x in sides:
                yield forward, "grad_weight", False
        elif [_untransposed(side) for side in _tensors(_whole(node))] == [x, w]:
            yield forward, "grad_weight" if node.args[1] else "grad_input", False


def _untransposed(node: Node) -> Node:
    while node.target in (aten.permute.default, aten.transpose.int):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _conv_candidates(node: Node, forwards: list[Node]) -> Iterator[tuple[Node, Role, bool]]:
    for forward in forwards:
        if forward.target is not aten.convolution.default:
            continue
        x, w = _tensors(forward)
        if _unsplit(node):
            _, bx, bw = node.args[0].args[:3]  # type: ignore[union-attr]
            if (bx, bw) == (x, w):
                yield forward, "grad_weight" if node.args[1] else "grad_input", False
        elif node.args[1] is (w if node.target is ops.conv_grad_input else x):
            yield forward, _CONV_GRADIENTS[node.target], False


def _mm_candidates(node: Node, forward: Node) -> Iterator[tuple[Node, Role, bool]]:
    """Y = A @ B has dA = G @ B^T or its transpose B @ G^T, and dB = A^T @ G or G^T @ A."""
    if value(node).dim() != value(forward).dim() or forward.target not in _PRODUCTS:
        return
    (a, a_flip), (b, b_flip) = (peel(side) for side in _tensors(forward))
    (left, left_flip), (right, right_flip) = (peel(side) for side in _tensors(node))
    # of a product with itself (x @ x.T) both match: the gradient's own orientation decides
    if right is b and right_flip != b_flip and not (left_flip and a is b):
        yield forward, "grad_input", False
    if left is a and left_flip != a_flip and not (right_flip and a is b):
        yield forward, "grad_weight", False
    if left is b and left_flip == b_flip:
        yield forward, "grad_input", True
    if right is a and right_flip == a_flip:
        yield forward, "grad_weight", True
