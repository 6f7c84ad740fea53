"""Sums along matrices in a launch, the largest of K scores in another: triton.py, README.md."""
