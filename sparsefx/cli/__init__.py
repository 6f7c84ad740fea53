"""The command line: ``python -m sparsefx``, and the script ``sparsefx``.

Each command is a function of the parsed options that returns a :class:`Result`; only ``main``
prints and decides the exit code.
"""

from sparsefx.cli.entry import main
from sparsefx.cli.results import Result, UsageError

__all__ = ["Result", "UsageError", "main"]
