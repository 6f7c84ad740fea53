"""The only code that edits a graph.

A rule looks at one node and returns the node that replaces it, or a Skip with the reason. It adds
nodes through :func:`emit` alone, which computes their fake values and copies where they came from.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from sparsefx import compat, ops
from sparsefx.plan import Plan

PLAN = "sparsefx"
INPUT = "sparsefx_input"
RULE = "sparsefx_rule"
_NOT_COPIED = {"val", "tensor_meta", "example_value", "desc", PLAN, INPUT, RULE}

aten = torch.ops.aten


@dataclass(frozen=True)
class Skip:
    """A rule's "no", with the reason that the report shows."""

    reason: str


@dataclass
class PassResult:
    """What a pass did.

    Attributes:
        graph_module: the module, edited in place.
        modified: whether anything changed.
        skipped: reason by name of each node that a rule declined.
    """

    graph_module: GraphModule
    modified: bool = False
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A rule that raised: where, and what."""

    node: str
    layer: str
    group: int | None
    error: str
    detail: str


class SitesFailedError(Exception):
    """Rules raised at some nodes; the pipeline leaves these dense and starts over."""

    def __init__(self, pass_name: str, failures: Sequence[Failure]) -> None:
        """Keep the failures; the message names the first."""
        self.pass_name, self.failures = pass_name, tuple(failures)
        first = failures[0]
        super().__init__(
            f"{pass_name} failed at node {first.node!r} of layer {first.layer!r}: {first.error}"
        )


Rule = Callable[[Node], Node | Skip | None]


def plan_of(node: Node) -> Plan | None:
    """Return the plan that travels with ``node``."""
    found = node.meta.get(PLAN)
    return found if isinstance(found, Plan) else None


def value(node: Any) -> Tensor:
    """Return the fake tensor of a node: its shape, dtype and strides."""
    return node.meta["val"]  # type: ignore[no-any-return]


def operands(node: Node, count: int) -> tuple[Node, ...]:
    """Return the first ``count`` arguments, which must be nodes."""
    found = node.args[:count]
    if len(found) != count or not all(isinstance(arg, Node) for arg in found):
        raise TypeError(f"{node.format_node()}: expected {count} tensor operands, got {found}")
    return found  # type: ignore[return-value]


def arguments(node: Node) -> Any:
    """Return a node's arguments, free of torch.fx's wide union: the schema says what they are."""
    return node.args


def fake_result(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Run ``target`` on the fake values of its arguments."""
    real_args, real_kwargs = map_arg((tuple(args), dict(kwargs or {})), lambda n: n.meta["val"])
    with torch.no_grad():
        return target(*real_args, **real_kwargs)


def provenance(node: Node) -> dict[str, Any]:
    """Return the metadata that a node inherits from the one that it stands for."""
    return {key: entry for key, entry in node.meta.items() if key not in _NOT_COPIED}


def emit(like: Node, target: Any, *args: Any, before: Node | None = None, **kwargs: Any) -> Node:
    """Add ``target(*args)`` with its fake value and the provenance of ``like``.

    Args:
        like: what the new node inherits its metadata from.
        target: an operator overload or a function on symbolic sizes.
        args: nodes and constants.
        before: where the node goes; before ``like`` by default.
        kwargs: keyword arguments.
    """
    with like.graph.inserting_before(before or like):
        node = like.graph.call_function(target, args, kwargs)
    node.meta = provenance(like)
    with _fakes_of(like):  # what has no tensor among its arguments must be fake as well
        node.meta["val"] = fake_result(target, args, kwargs)
    return node


def _fakes_of(node: Node) -> AbstractContextManager[object]:
    found = (n.meta.get("val") for n in (node, *node.all_input_nodes))
    modes = (mode for val in found if (mode := getattr(val, "fake_mode", None)) is not None)
    return next(modes, nullcontext())


def wrap(node: Node, build: Callable[[Callable[..., Node]], Node]) -> Node:
    """Put an epilogue behind ``node``: its users see what ``build`` makes of it.

    Args:
        node: the value that is wrapped.
        build: gets an ``emit`` that inserts right after ``node``, and returns the last new node.
    """
    users, position = list(node.users), node.next
    new = build(lambda target, *args, **kw: emit(node, target, *args, before=position, **kw))
    for user in users:
        user.replace_input_with(node, new)
    return new


def rewrite_nodes(
    gm: GraphModule, rules: Mapping[Any, Rule], *, excluded: Iterable[str] = ()
) -> PassResult:
    """Visit every node once; where a rule returns a new node, it takes the old one's place.

    Args:
        gm: edited in place, linted and recompiled if anything changed.
        rules: rule by target.
        excluded: names of nodes that are left alone.

    Returns:
        What was done, and every Skip.

    Raises:
        SitesFailedError: naming each node at which a rule raised.
    """
    result, failures, name = PassResult(gm), [], _name_of(rules)
    left_alone = set(excluded)
    for node in list(gm.graph.nodes):
        rule = rules.get(node.target) if node.op == "call_function" else None
        if rule is None or node.name in left_alone:
            continue
        try:
            outcome = rule(node)
            if isinstance(outcome, Node) and outcome is not node:
                _replace(node, outcome, rule)
        except Exception as error:  # any error of any rule must leave its site dense, not crash
            failures.append(_failure(node, error))
            continue
        if isinstance(outcome, Skip):
            result.skipped[node.name] = outcome.reason
        elif outcome is not None and outcome is not node:
            result.modified = True
    if failures:
        raise SitesFailedError(name, failures)
    if result.modified:
        finish(gm)
    return result


def finish(gm: GraphModule) -> None:
    """Drop what nobody uses any more, lint, recompile."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


def _name_of(rules: Mapping[Any, Rule]) -> str:
    for rule in rules.values():
        function = getattr(rule, "func", rule)
        return str(getattr(function, "__module__", "pass")).rpartition(".")[2]
    return "pass"


def _owner(node: Node) -> Plan | None:
    """The plan of a node, or of the product that a mask or a draw was made for."""
    queue = [node]
    for candidate in queue:
        if (plan := plan_of(candidate)) is not None:
            return plan
        queue += [user for user in candidate.users if user not in queue]
    return None


def _failure(node: Node, error: Exception) -> Failure:
    plan = _owner(node)
    return Failure(
        node=node.name,
        layer=plan.site.layer if plan else "",
        group=plan.site.group if plan else None,
        error=f"{type(error).__name__}: {error}",
        detail="".join(traceback.format_exception(error)),
    )


def _replace(old: Node, new: Node, rule: Rule) -> None:
    before, after = value(old), value(new)
    if isinstance(before, Tensor):
        if tuple(before.shape) != tuple(after.shape) or before.dtype != after.dtype:
            raise ValueError(
                f"{old.name}: {after.dtype}{tuple(after.shape)} can't replace "
                f"{before.dtype}{tuple(before.shape)}"
            )
        if PLAN in old.meta:  # on the op itself, not on the copy that only changes its layout
            new.meta.setdefault(PLAN, old.meta[PLAN])
        new = _with_layout(old, new)
    for key, entry in old.meta.items():
        if key not in new.meta and (key == PLAN or key not in _NOT_COPIED):
            new.meta[key] = entry
    new.meta[RULE] = getattr(getattr(rule, "func", rule), "__name__", "rule")
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _with_layout(old: Node, new: Node) -> Node:
    """Copy ``new`` where its strides differ: views downstream were made for the old ones."""
    for layout in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(layout)
        if rank is not None and value(old).dim() != rank:
            continue
        if value(old).is_contiguous(memory_format=layout):
            if value(new).is_contiguous(memory_format=layout):
                return new
            copy = emit(old, aten.clone.default, new, memory_format=layout)
            copy.meta[PLAN] = None
            return copy
    return new


# --- reading a graph

CASTS: set[Any] = {torch.ops.prims.convert_element_type.default, aten._to_copy.default}


def is_backward(node: Node) -> bool:
    """Whether a node belongs to the backward, as the partitioner will be told."""
    return node.meta.get("partitioner_tag") == "is_backward"


def peel(node: Node) -> tuple[Node, bool]:
    """Follow transposes of the last two axes: (what is transposed, whether it is)."""
    flipped = False
    while (inner := _transposed(node)) is not None:
        node, flipped = inner, not flipped
    return node, flipped


def _transposed(node: Node) -> Node | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    rank = value(source).dim() if isinstance(source.meta.get("val"), Tensor) else 0
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if node.target is aten.t.default and rank == 2:
        return source
    if node.target is aten.permute.default and rank in (2, 3):
        return source if [d % rank for d in node.args[1]] == swapped else None  # type: ignore[union-attr,operator]
    if node.target is aten.transpose.int and rank in (2, 3):
        return source if {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2} else None  # type: ignore[operator]
    return None


def flip(anchor: Node, node: Node) -> Node:
    """Transpose the last two axes, undoing a transpose instead of adding a second."""
    inner = _transposed(node)
    if inner is not None:
        return inner
    rank = value(node).dim()
    return emit(anchor, aten.permute.default, node, [*range(rank - 2), rank - 1, rank - 2])


def in_node_orientation(anchor: Node, out: Node, plan: Plan) -> Node:
    """Transpose ``out`` if the node that it replaces computes the product's transpose.

    The plan stays with ``out``, which is the product.
    """
    if not plan.flipped:
        return out
    out.meta[PLAN] = plan
    turned = flip(anchor, out)
    turned.meta[PLAN] = None
    return turned


def size(anchor: Node, node: Node, dim: int) -> int | Node:
    """Return a size: an int, or the node that reads it where it is symbolic."""
    found = compat.settled(value(node).shape[dim])
    return found if isinstance(found, int) else emit(anchor, aten.sym_size.int, node, dim)


def copy_graph_module(gm: GraphModule) -> GraphModule:
    """Copy the graph, nodes' names and metadata included; the attributes are shared."""
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.set_codegen(gm.graph._codegen)
    copied = compat.lazy_graph_module(gm, graph)
    copied.meta.update(gm.meta)
    return copied


@contextmanager
def failing_at(pass_name: str, node: Node) -> Iterator[None]:
    """Say of any error at which node it was raised.

    Raises:
        SitesFailedError: in place of any other error.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the site goes dense and the model runs
        raise sites_failed(pass_name, [(node, error)]) from error


def sites_failed(pass_name: str, failures: Sequence[tuple[Node, Exception]]) -> SitesFailedError:
    """Gather what rules raised at some nodes into one error."""
    return SitesFailedError(pass_name, [_failure(node, error) for node, error in failures])


# --- references in place

Traced = dict[Any, GraphModule]


def inline(node: Node, traced: Traced | None = None) -> None:
    """Put the ATen graph of an op's reference in the place of ``node``.

    Args:
        node: a call of one of our ops.
        traced: graphs made so far, by op and kind of arguments: repeated layers trace once.
    """
    cache = {} if traced is None else traced
    key = (node.target, *(_describe(arg) for arg in node.args))
    if key not in cache:
        cache[key] = _trace(node)
    env: dict[Node, Any] = {}
    operands = iter(_symbolic_or_tensor(node.args))
    out: Any = None
    for inner in cache[key].graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(operands)
        elif inner.op == "output":
            out = map_arg(inner.args[0], lambda n: env[n])
        elif inner.op == "get_attr":
            raise TypeError(f"{node.format_node()}: its reference holds a constant tensor")
        else:
            args, kwargs = map_arg((inner.args, inner.kwargs), lambda n: env[n])
            env[inner] = emit(node, inner.target, *args, **kwargs)
    if isinstance(out, Node):
        node.replace_all_uses_with(out)
    else:
        _replace_results(node, out)
    node.graph.erase_node(node)


def _replace_results(node: Node, results: Sequence[Node]) -> None:
    """Put several results in the place of what reads each of them, and of what it is told to do."""
    for reader in list(node.users):
        result = results[reader.args[1]]  # type: ignore[index]  # users are getitem(node, place)
        if "recompute" in reader.meta:
            result.meta["recompute"] = reader.meta["recompute"]
        reader.replace_all_uses_with(result)
        reader.graph.erase_node(reader)


def _symbolic_or_tensor(args: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(args, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return list(dict.fromkeys(found))


def _describe(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return tuple(map(_describe, arg))
    if not isinstance(arg, Node):
        return type(arg), arg
    found = arg.meta["val"]
    if not isinstance(found, Tensor):
        return str(found)
    return str(tuple(found.shape)), str(found.stride()), found.dtype, found.device


def _trace(node: Node) -> GraphModule:
    reference = ops.REFERENCES[node.target]
    nodes = _symbolic_or_tensor(node.args)

    def run(*values: Any) -> Any:
        at = dict(zip(nodes, values, strict=True))
        return reference(*map_arg(node.args, lambda n: at[n]))

    return compat.trace_reference(run, [n.meta["val"] for n in nodes])
