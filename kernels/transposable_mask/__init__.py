"""N:M masks, made on a GPU: triton.py chooses the kernel, README.md has the derivations."""
