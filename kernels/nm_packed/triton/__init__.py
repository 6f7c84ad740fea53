"""Packed weights on CUDA: packing.py, product.py."""
