"""Every way to train or prune sparsely, on one small task: accuracy, operations, time.

    python examples/compare_methods.py [--only dense set] [--quick] [--plot methods.png]

An MLP 64-304-104-10 on scikit-learn's digits (1297 images, tested on 500), SGD, rate 0.05, momentum
0.9, batches of 64, 40 epochs, three seeds. Multiply-accumulates are those of a training step's
three products as they are executed: a mask that is multiplied into a weight saves none, and what it
leaves stands in a column of its own. Time is the median step; what masks take stands beside it. On
a net this small calls cost more than arithmetic, and fewer operations save no time: what they save
on larger nets is in benchmarks/. References are what the methods' own routines get on this recipe.
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("comparing")), run_name="__main__")
