"""Recognise what is masked already: note a weight's stored mask, or the N:M zeros that it holds.

    mm(x, permute(where(mask, w, 0)))    site.mask = "fc.mask", site.weight = "right"
    mm(x, permute(w * mask))             likewise
    mm(x, permute(w))                    site.holds = "2:4", where w holds such zeros

Needs    find_sites ran; placeholders carry their names (meta["sparsefx_input"]).
Adds     mask, mask_pattern, mask_density or holds to the sites of a layer call; the names of a
         layer and a weight that stand behind a mask.
Keeps    the graph itself.
"""

from collections.abc import Container
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from sparsefx import naming
from sparsefx.passes.mask_forms import MaskFinder, MaskForm, axis_of
from sparsefx.plan import Plan, Site
from sparsefx.rewriting import INPUT, PLAN, PassResult, arguments, failing_at, plan_of

aten = torch.ops.aten


def recognize_masks(gm: GraphModule, *, failed: Container[int] = ()) -> PassResult:
    """Run the pass; layer calls whose group is in ``failed`` are left alone."""
    result, finder = PassResult(gm), MaskFinder(gm)
    found: dict[int, Site] = {}
    for node in gm.graph.nodes:
        plan = plan_of(node)
        if plan is None or plan.site.role != "forward" or plan.site.kind == "bmm":
            continue
        if plan.site.group not in failed:
            with failing_at("recognize_masks", node):
                found[plan.site.group] = _forward_site(node, plan.site, finder)
    for node in gm.graph.nodes:
        plan = plan_of(node)
        known = found.get(plan.site.group) if plan is not None else None
        if plan is None or known is None:
            continue
        if (changed := _with_findings(plan, known)) != plan:
            node.meta[PLAN] = changed
            result.modified = True
    return result


def _with_findings(plan: Plan, known: Site) -> Plan:
    site = replace(
        plan.site,
        layer=known.layer,
        weight=known.weight,
        weight_name=known.weight_name,
        mask=known.mask,
        mask_pattern=known.mask_pattern,
        mask_density=known.mask_density,
        holds=known.holds,
    )
    return replace(plan, site=site)


def weight_operand(product: Node, side: str | None) -> Node:
    """Return the operand that is a weight: the right one, unless ``side`` is "left"."""
    first = 1 if product.target is aten.addmm.default else 0
    return arguments(product)[first + (side != "left")]  # type: ignore[no-any-return]


def _forward_site(node: Node, site: Site, finder: MaskFinder) -> Site:
    conv = site.kind == "conv"
    for side in ("right",) if conv else ("right", "left"):
        if site.weight not in (None, side):
            continue
        operand = weight_operand(node, side)
        axis = 1 if conv or side == "left" else 0  # K of the operand
        form = finder.find(operand)
        if form is not None:
            look = _look(finder, form, _axis_of_mask(form, operand, axis))
            weight = _unmasked(finder, form)
            return _masked_site(node, replace(site, weight=side, weight_name=weight), form, look)
    if site.weight in ("left", "right"):
        operand = weight_operand(node, site.weight)
        root, axis_there = axis_of(operand, 0 if site.weight == "right" and not conv else 1)
        known = root.meta.get(INPUT)
        if known is not None and axis_there in (0, 1):
            return replace(site, holds=known.holds[axis_there])
    return site


def _masked_site(node: Node, site: Site, form: MaskForm, look: tuple[float | None, str]) -> Site:
    known, (density, pattern) = form.mask.source.meta.get(INPUT), look
    return replace(
        site,
        layer=naming.layer_of(node, site.weight_name),
        mask=known.name if known is not None else _buffer_behind(form.mask.source),
        mask_density=density,
        mask_pattern=pattern,
    )


def _unmasked(finder: MaskFinder, form: MaskForm) -> str | None:
    """Name the parameter behind a mask, and behind a mask behind that."""
    while (inner := finder.find(form.weight)) is not None:
        form = inner
    return naming.weight_of(form.weight)


def _buffer_behind(source: Node) -> str:
    """Name what a mask is computed from, where that is one buffer; else its own node."""
    seen, queue = {source}, [source]
    for node in queue:
        queue += [other for other in node.all_input_nodes if other not in seen]
        seen.update(queue)
    names = [node.meta[INPUT].name for node in queue if INPUT in node.meta]
    return names[0] if len(names) == 1 else source.name


def _axis_of_mask(form: MaskForm, operand: Node, axis: int) -> int | None:
    """The axis of the stored mask that a product sums over."""
    _, at_form = axis_of(operand, axis)
    sides = [form.bits] if form.bits is not None else arguments(form.node)[:2]
    for side in sides:
        found, there = axis_of(side, at_form, bits=True)
        if found is form.mask.source:
            return there
    return None


def _look(finder: MaskFinder, form: MaskForm, axis: int | None) -> tuple[float | None, str]:
    """What is known of the mask's values: (density, N:M pattern)."""
    known = finder.described(form.mask.source)
    if known is None or known.density is None:
        return None, ""
    if form.mask.negated:
        return 1 - known.density, ""
    return known.density, known.holds[axis] if axis in (0, 1) else ""
