"""What the compiler does with a model, and why: the table, the graphs, what one pass changed.

    python examples/01_inspect.py

Nothing is compiled: ``explain`` captures the graphs, runs the passes and reports.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsefx as sfx


class Net(nn.Module):
    """A convolution, two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.hidden = nn.Linear(16, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).mean((2, 3))  # [batch, 16]
        return self.out(F.relu(self.hidden(x)))


def main() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 3, 12, 12)

    print("1. One row per product: three per layer, forward and the two of its backward.\n")
    report = sfx.explain(model, config="all-three")(x)
    print(report)

    print("\n2. Why is it dense? Each product that stayed dense has a reason.\n")
    for line in report.why("conv"):
        print(" ", line)

    print("\n3. The rows are data: the products that are sparse, and what they leave to compute.\n")
    for row in report.sites:
        if row.decision is not None:
            print(f"  {row.layer}.{row.role}: {row.decision}, {row.flops_sparse} FLOPs")

    print("\n4. What the pass rewrite_nm changed ('-' before, '+' after).\n")
    print(report.diff("rewrite_nm"))

    print("\n5. The backward graph that is left to compile. masked_mm is one of our ops.\n")
    print(sfx.testing.format_graph(report.backward[0]))

    print("\n6. A model that is compiled and has run tells what happened to it.\n")
    config = sfx.SparseConfig(codegen="aot_eager")  # the same rewriting, without Inductor
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    compiled(x).sum().backward()
    print(repr(sfx.explain(compiled)))


if __name__ == "__main__":
    main()
