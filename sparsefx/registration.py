"""Register the backend from a bare checkout; an installed package has an entry point."""

from sparsefx import compat


def register_backend() -> None:
    """Register the backend unless the installed package's entry point already did.

    Dynamo skips what torch.ao.pruning puts on a weight, ``mask * w``, and so every model that it
    prunes; with that one file on its list of those to trace, the masks can be recognised.
    """
    compat.trace_into("torch.ao.pruning.sparsifier.utils")
    if "sparsefx" in compat.known_backends():
        return
    from sparsefx.backend import sparsefx

    compat.register_backend("sparsefx", sparsefx)
