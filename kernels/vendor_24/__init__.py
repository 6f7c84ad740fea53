"""2:4 products by cuSPARSELt or CUTLASS.

Meaning: sparsefx/ops/semi_structured.py.  Why, and what to measure: README.md.
"""
