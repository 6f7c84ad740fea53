"""A product of a layer (Site), and what was decided about it (Decision). No graph in sight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sparsefx.config import Dense, Pattern

Role = Literal["forward", "grad_input", "grad_weight", "other"]
Kind = Literal["mm", "bmm", "conv"]
Size = Any  # int, or torch.SymInt where the graph's shapes are symbolic


@dataclass(frozen=True)
class Site:
    """One of the products of a layer, as it was found in the graph.

    Attributes:
        layer: qualified name of the module (or functional call) that the product belongs to.
        role: which of the layer's products.
        kind: matrix product, batched matrix product or convolution.
        op: name of the operator that computed it densely.
        shape: (M, N, K) of the product as a matrix product; K is the reduction axis. A convolution
            counts output positions as rows of its forward; a batched product is told per batch.
        dtype: of the operands.
        device: type of the device, "cpu" or "cuda".
        group: number shared by the products of one layer call.
        module_types: classes on the module stack, innermost first (names where only these are
            known).
        source: file and line of the user's code, where known.
        weight: which operand is a weight: "right", "left", "both", or None if both are activations
            (an operand is a weight if it depends on parameters, buffers and constants alone).
        weight_name: qualified name of the weight's parameter, where it is one.
        channels: (in / groups, out / groups, groups, batch) of a convolution.
        batch: how many products of this shape, of a batched product.
        depthwise: convolution with one input channel per group.
        transposed: transposed convolution.
        is_output: the last product on the way to an output of the graph.
        is_input: a weight times something that depends on no parameter: the model's first layer.
        has_backward: the graph has a backward.
        opaque: why no pass can take the product by itself (fused attention, a grouped product).
        mask: name of the mask that the model applies to the weight; "" where there is none.
        mask_pattern: of that mask when it was compiled, such as "2:4 transposable"; "" if none.
        mask_density: share that it kept then; None where its values were not at hand.
        holds: pattern of the zeros of an unmasked weight when it was compiled; "" if none.
    """

    layer: str
    role: Role
    kind: Kind
    op: str
    shape: tuple[Size, Size, Size]
    dtype: str
    device: str
    group: int
    module_types: tuple[type | str, ...] = ()
    source: str = ""
    weight: str | None = None
    weight_name: str | None = None
    channels: tuple[Size, Size, Size, Size] | None = None
    batch: Size = 1
    depthwise: bool = False
    transposed: bool = False
    is_output: bool = False
    is_input: bool = False
    has_backward: bool = True
    opaque: str = ""
    mask: str = ""
    mask_pattern: str = ""
    mask_density: float | None = None
    holds: str = ""


@dataclass(frozen=True)
class Decision:
    """What a site becomes.

    Attributes:
        pattern: of the site itself; Dense() where it stays dense.
        reason: why it is dense; empty where it is sparse.
        derived: the product is the derivative of the forward's pattern (grad_input=None or
            grad_weight=None in the rule), not a pattern of its own.
        forward: the pattern of the layer's forward, which a derived product follows.
        note: what of the rule does not act here.
        lowering: what the rule forces to run, None where nothing is forced.
    """

    pattern: Pattern
    reason: str = ""
    derived: bool = False
    forward: Pattern = field(default_factory=Dense)
    note: str = ""
    lowering: str | None = None

    @property
    def dense(self) -> bool:
        """Whether the site stays as it was."""
        return isinstance(self.pattern, Dense)


@dataclass(frozen=True)
class Plan:
    """What travels in ``node.meta["sparsefx"]``: the site and, once selected, its decision.

    Attributes:
        site: the product.
        decision: what it becomes; None until ``select_sites`` ran.
        flipped: the node computes the transpose of the site's product, as autograd does for the
            gradient of a transposed view.
    """

    site: Site
    decision: Decision | None = None
    flipped: bool = False

    def decided(self, decision: Decision) -> Plan:
        """Return this plan with a decision."""
        return replace(self, decision=decision)
