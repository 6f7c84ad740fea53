"""Columns picked and put back on CPU: cpu.py, moves.cpp, README.md."""
