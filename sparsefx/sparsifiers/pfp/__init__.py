"""Provable filter pruning: which channels to drop, how many of each layer, and who made them.

``sensitivity`` looks at a few examples, ``channels`` at the graph, ``allocation`` divides the
budget, ``selection`` chooses, ``plan`` puts these together, ``pruner`` masks, ``report`` tells.
"""

from sparsefx.sparsifiers.pfp.allocation import draws_for, expected_unique, sample_complexity
from sparsefx.sparsifiers.pfp.pruner import ProvableFilterPruner
from sparsefx.sparsifiers.pfp.report import FilterReport, FilterRow
from sparsefx.sparsifiers.pfp.sensitivity import channel_sensitivity, sample_size

__all__ = [
    "FilterReport",
    "FilterRow",
    "ProvableFilterPruner",
    "channel_sensitivity",
    "draws_for",
    "expected_unique",
    "sample_complexity",
    "sample_size",
]
