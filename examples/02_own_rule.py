"""Say which layers become what: by name, by type, by a function of the site; product by product.

    python examples/02_own_rule.py

The first rule that matches a layer decides about its three products.
"""

import json

import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx import NM, Dense, Rule, Sampled, SparseConfig
from sparsefx.plan import Site


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """An image, two blocks, a classifier."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(4, 64, 4, stride=4)
        self.blocks = nn.Sequential(Block(64), Block(64))
        self.head = nn.Linear(64, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(1)))


def is_deep(site: Site) -> bool:
    """A predicate: the site is the layer's forward product, its shape is (M, N, K)."""
    return site.kind == "mm" and site.shape[2] >= 256


CONFIG = SparseConfig(
    rules=[
        # By name. A pattern for a gradient of its own: transposable 2:4 serves forward and
        # grad_input, and the gradient of the weight is sampled. All three products shrink.
        Rule(
            "blocks.0.*",
            forward=NM(2, 4, transposable=True),
            grad_weight=Sampled(0.3, min_k=4),
        ),
        # By predicate. Sampled forward; its gradients are not given, so they follow: they go
        # through the sampled entries only.
        Rule(is_deep, forward=Sampled(0.25)),
        # By type. Dense() is a pattern like any other: the full product of what was there. Here
        # the forward is exact, and the backward is not.
        Rule(nn.Linear, forward=Dense(), grad_input=NM(1, 4), grad_weight=Dense()),
        # No rule is left for the convolution: it stays dense, and the report says why.
    ],
    codegen="aot_eager",
)


def main() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 4, 4, 4)

    print("What each product became:\n")
    report = sfx.explain(model, config=CONFIG)(x)
    for line in report.why():
        print(" ", line)

    print("\nThe last layer is left alone by default. With keep_output_dense=False:\n")
    bold = SparseConfig(
        rules=[Rule("head", forward=NM(2, 4, transposable=True))], keep_output_dense=False
    )
    for line in sfx.explain(model, config=bold)(x).why("head"):
        print(" ", line)

    print("\nA config is plain data; a predicate is written by its name:\n")
    plain = SparseConfig(rules=CONFIG.rules[:1])
    print(json.dumps(plain.to_dict(), indent=2))
    print("\nread back and equal:", SparseConfig.from_dict(plain.to_dict()) == plain)

    print("\nNonsense is refused where it is written:\n")
    for build in (lambda: NM(4, 4), lambda: Sampled(1.3), lambda: Rule("*", grad_weight=NM(2, 4))):
        try:
            build()
        except sfx.ConfigError as error:
            print(" ", error)

    print("\nAnd it trains:\n")
    compiled = torch.compile(model, backend="sparsefx", options={"config": CONFIG})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    target = torch.randint(30, (16,))
    for step in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), target)
        loss.backward()
        optimizer.step()
        print(f"  step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
