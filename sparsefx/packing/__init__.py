"""Weights that don't change, packed once: memory and state_dict shrink to n/m plus index bits."""

from sparsefx.packing.pack import pack, unpack
from sparsefx.packing.report import PackedLayer, PackReport

__all__ = ["PackReport", "PackedLayer", "pack", "unpack"]
