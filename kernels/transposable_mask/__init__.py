"""N:M masks, made on a GPU: triton/ holds the kernels, README.md has the derivations."""
