"""How far sampled gradients are from exact ones, and a ratio for every layer under a budget.

    python examples/04_tune_ratios.py [--flops 0.3] [--plot FOLDER]

Nothing is compiled for speed: gradients under a config are compared with exact ones.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx as sfx


class Net(nn.Module):
    """Two convolutions, two linear layers: 8 x 8 digits."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3)
        self.hidden, self.out = nn.Linear(512, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.out(F.relu(self.hidden(x.flatten(1))))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(images: Tensor, labels: Tensor) -> Net:
    """Some steps in: gradients of fresh weights say little of those of a training."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(40):
        rows = torch.arange(64) + 64 * (step % 20)
        loss(model, (images[rows], labels[rows])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flops", type=float, default=0.3, help="share of the gradients' FLOPs")
    parser.add_argument("--plot", type=Path, help="folder for two pictures")
    args = parser.parse_args()
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    model, batch = trained(images, labels), (images[:256], labels[:256])

    print("1. One ratio for all: top-k is bias, unbiased sampling is noise.\n")
    for estimator in ("topk", "systematic"):
        pattern = sfx.Sampled(args.flops, estimator=estimator)
        config = sfx.SparseConfig([sfx.Rule("*", grad_input=pattern, grad_weight=pattern)])
        uniform = sfx.diagnostics.gradient_error(model, batch, config, loss=loss)
        print(f"{pattern}: {uniform}\n")

    print("2. A ratio for each layer, for the same FLOPs.\n")
    tuned = sfx.diagnostics.tune_ratio(model, batch, flops=args.flops, loss=loss)
    errors = sfx.diagnostics.gradient_error(model, batch, tuned.config, loss=loss)
    print(f"{tuned}\n\n{errors}\n")
    one, own = uniform.total.relative, errors.total.relative
    print(f"|error| / |gradient|: {one:.3f} with one ratio, {own:.3f} with a ratio by layer")
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        errors.plot(str(args.plot / "errors.png"))
        tuned.plot(str(args.plot / "ratios.png"))


if __name__ == "__main__":
    main()
