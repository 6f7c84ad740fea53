"""Try a step with fewer channels: what differs from the masked model is computed whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from sparsefx import compat

if TYPE_CHECKING:
    from sparsefx.sparsifiers.vrpge.step import CompactStep

FAILURES = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def find_whole(step: CompactStep) -> dict[str, str]:
    """Return group -> why its channels can't be left out, by trying on noisy weights in eval mode.

    All groups are tried together, then each alone, then those that passed.
    """
    free = [i for i, group in enumerate(step.groups) if group.name not in step.whole]
    trial = Trial(step)
    if not free or not trial.why(free):
        return {}
    reasons = {i: trial.why([i]) for i in free}
    good = [i for i in free if not reasons[i]]
    if good and (together := trial.why(good)):
        reasons |= dict.fromkeys(good, f"together with others: {together}")
    return {step.groups[i].name: reason for i, reason in reasons.items() if reason}


class Trial:
    """Weights with noise and gates at random, and what the masked model makes of them."""

    def __init__(self, step: CompactStep) -> None:
        """Run the masked model."""
        self.step = step
        assert step.owner.inputs is not None
        self.args, self.kwargs = step.owner.inputs
        generator = torch.Generator().manual_seed(0)
        self.values = {s.name: _noisy(s.tensor, generator) for s in step.wiring.sources}
        sizes = [len(group.unit) for group in step.groups]
        device = step.owner.costs.device
        self.live = [
            (torch.randperm(size, generator=generator) < max(size // 2, 1)).to(device)
            for size in sizes
        ]
        self.all = [torch.ones_like(one) for one in self.live]
        self.expected = self._run(self.all)

    def why(self, free: list[int]) -> str:
        """Return why these groups can't go without their other channels; "" where they can."""
        kept = [live if i in free else self.all[i] for i, live in enumerate(self.live)]
        try:
            found = self._run(kept)
        except FAILURES as error:
            line = str(error).strip().split("\n")[0]
            return f"the model doesn't run without: {type(error).__name__}: {line}"[:160]
        for was, now in zip(self.expected, found, strict=True):
            if was.shape != now.shape:
                return f"without, an output is {tuple(now.shape)} instead of {tuple(was.shape)}"
            scale = float(was.abs().max()) or 1.0
            gap = float((was - now).abs().max()) / scale
            if not gap <= min(1000 * torch.finfo(was.dtype).eps, 0.05):
                return f"without, an output differs by {gap:.1e}: a norm over channels?"
        return ""

    def _run(self, kept: list[Tensor]) -> list[Tensor]:
        values = {name: value.clone() for name, value in self.values.items()}
        small, _ = self.step.wiring.gather(self.live, kept, lambda source: values[source.name])
        flags = [(module, module.training) for module in self.step.skeleton.modules()]
        try:
            self.step.skeleton.eval()
            out: Any = functional_call(self.step.skeleton, small, self.args, self.kwargs)
        finally:
            for module, flag in flags:
                module.training = flag
        leaves = [leaf for leaf in compat.leaves(out) if isinstance(leaf, Tensor)]
        return [leaf for leaf in leaves if leaf.is_floating_point()]


def _noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise above 0, so that variances stay positive."""
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    noise = torch.rand(tensor.shape, generator=generator).to(tensor)
    return tensor.detach() + 0.1 * noise
