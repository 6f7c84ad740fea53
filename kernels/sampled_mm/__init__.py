"""A matmul over sampled columns and rows, and its gradients: triton.py, README.md."""
