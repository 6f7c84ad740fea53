"""``python -m sparsefx``: the command line."""

import sys

from sparsefx.cli import main

if __name__ == "__main__":
    sys.exit(main())
