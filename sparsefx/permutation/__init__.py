"""Permute the channels of a model so that N:M masks keep more of its weights.

The way of a call: ``state`` (parameters, and which must stay), ``propagate`` (walks the graphs; its
rules are in ``moves`` and ``maths``, on the dimensions of ``axes``), ``layers`` (products with a
weight), ``classes`` (axes that may be permuted), ``plan`` (asks ``search`` for each), ``places``
(turns an order into an index), ``check`` (tries it on a copy), ``transform`` (the call),
``report``.
"""

from sparsefx.permutation.report import PermutationReport, PermutedClass, PermutedLayer
from sparsefx.permutation.search import search
from sparsefx.permutation.transform import permute_channels

__all__ = [
    "PermutationReport",
    "PermutedClass",
    "PermutedLayer",
    "permute_channels",
    "search",
]
