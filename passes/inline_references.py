"""Where a device has no kernel of ours, put the reference's ATen graph in an op's place.

    nm_mm(x, w, b, 2, 4, 0)    ->  the mask's arithmetic, where, addmm

so that Inductor fuses the arithmetic and the partitioner sees what it can recompute. An op whose
reference can't be traced (a transposable mask made by a loop over values) stays an opaque call.

Needs    the rewrites ran.
Keeps    values, shapes, provenance.
"""

from torch.fx import GraphModule, Node

from sparsefx import ops
from sparsefx.rewriting import (
    Failure,
    PassResult,
    SitesFailedError,
    Traced,
    finish,
    inline,
    sites_failed,
    value,
)


def inline_references(gm: GraphModule) -> PassResult:
    """Run the pass."""
    result = PassResult(gm)
    traced: Traced = {}
    failures: list[Failure] = []
    for node in list(gm.graph.nodes):
        if not ops.is_sparse_op(node.target):
            continue
        reason = _opaque(node)
        if reason:
            result.skipped[node.name] = reason
            continue
        try:
            inline(node, traced)
        except Exception as error:  # any error here must leave the site dense, not crash
            # told at once: its users still say which layer it serves
            failures += sites_failed("inline_references", [(node, error)]).failures
            continue
        result.modified = True
    if failures:
        raise SitesFailedError("inline_references", failures)
    if result.modified:
        finish(gm)
    return result


def _opaque(node: Node) -> str:
    if ops.has_kernel(node.target, value(node).device.type):
        return "the device has a kernel"
    if not ops.traceable(node.target, node.args):
        return "the reference loops over values"
    return ""
