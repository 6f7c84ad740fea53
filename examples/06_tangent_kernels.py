"""What a network has learned is regression with its own kernel, not with the one it began with.

    python examples/06_tangent_kernels.py [--steps 800]

A tanh network with 8 hidden units learns a noisy function of 8 numbers, densely and under 2:4
masks, until the squared loss is stationary. Then it does on its samples what ridgeless regression
does with the kernel that it has learned (Dou & Liang, 2021). The kernel of the last layer's
features shows it soonest: in the whole tangent kernel small singular values magnify what J^T r is
left with.
"""

import argparse
import copy

import torch
from torch import nn

from sparsefx.diagnostics import TangentReport, tangent_report
from sparsefx.masks import nm_mask


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(160, 8).double()
    return x, torch.sin(x @ torch.randn(8).double()) + 0.5 * torch.randn(160).double()


def learned(masked: bool, steps: int) -> TangentReport:
    """Train by L-BFGS, which gets to a stationary point where gradient descent would take long."""
    x, y = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    weight = model[0].weight
    masks = {"0": nm_mask(weight.detach(), 2, 4, dim=1)} if masked else {}
    if masked:
        weight.data.mul_(masks["0"])
        weight.register_hook(lambda grad: grad * masks["0"])
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, tolerance_grad=1e-10, tolerance_change=0,
        history_size=100, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = (model(x).squeeze(1) - y).square().mean()
        found.backward()
        return found

    optimizer.step(loss)
    print("under 2:4 masks" if masked else "dense", "\n")
    print(tangent_report(model, x, y, start, masks), "\n")
    head = tangent_report(model, x, y, start, masks, parameters="2.*")  # of the last layer alone
    print(
        f"with the last layer's features: f is {head.distance:.1e} away from regression with their "
        f"final kernel, {head.initial_distance:.2f} with their initial one\n"
    )
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="of L-BFGS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense, sparse = (learned(masked, args.steps) for masked in (False, True))
    apart = dense.drift_from(sparse)
    print(f"drift of the dense and the 2:4 network's kernels from each other: {apart:.3f}")


if __name__ == "__main__":
    main()
