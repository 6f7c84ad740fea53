"""A 2-d convolution of sampled channels or examples, and its gradients: triton.py, README.md."""
