"""Weights that don't change, packed once: memory and state_dict shrink to n/m plus index bits."""

from sparsefx.packing.report import PackedLayer, PackReport
from sparsefx.packing.swap import pack, unpack

__all__ = ["PackReport", "PackedLayer", "pack", "unpack"]
