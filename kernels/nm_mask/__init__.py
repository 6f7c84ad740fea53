"""Row-wise N:M masks on CPU: cpu.py, nm_mask.cpp, README.md."""
