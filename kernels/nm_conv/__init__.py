"""A 2-d convolution with a mask: triton.py holds the launchers, README.md the derivation."""
