"""Remove channels that masks left without effect: networks that really shrink.

The way of a call: ``sparsefx.permutation`` says which dimensions belong together, ``evaluate``
(with ``products``, on the values of ``known``) what the weights alone determine, ``contractions``
which terms of which sums that leaves, ``dead`` which channels no sum needs, ``shrink`` builds the
smaller model (``heads``: attention whose heads went), ``trial`` compares it with the masked one,
``transform`` is the call, ``plan`` what it returns.
"""

from sparsefx.compact.plan import CompactPlan, LeftZeros, ShrunkChannels, ShrunkTensor
from sparsefx.compact.transform import Compacted, compact_channels

__all__ = [
    "CompactPlan",
    "Compacted",
    "LeftZeros",
    "ShrunkChannels",
    "ShrunkTensor",
    "compact_channels",
]
