"""Register the backend from a bare checkout; an installed package has an entry point."""

from sparsefx import compat


def register_backend() -> None:
    """Register the backend unless the installed package's entry point already did."""
    if "sparsefx" in compat.known_backends():
        return
    from sparsefx.backend import sparsefx

    compat.register_backend("sparsefx", sparsefx)
