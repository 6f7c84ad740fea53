"""A matmul with a stored mask: one launcher per device beside this, README.md the reasoning."""
