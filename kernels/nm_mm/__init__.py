"""A matmul with an N:M mask: triton.py holds the launcher, README.md the derivation."""
