"""Packed N:M weights on CPU: cpu.py, nm_packed.cpp and its headers, README.md."""
