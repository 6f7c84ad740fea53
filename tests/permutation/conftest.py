"""Models with uneven channels, and whether a call keeps their function on inputs of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx


def uneven(model: nn.Module) -> nn.Module:
    """Give every channel a scale of its own, in float64, in eval mode; nothing stays 0 or 1."""
    model.double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point():
                continue
            if tensor.dim() < 2:
                tensor.add_(0.1 + 0.4 * torch.rand_like(tensor))
            else:
                for dim in (0, 1):
                    shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
                    tensor.mul_(torch.randn(tensor.shape[dim]).double().mul(0.7).exp().view(shape))
    return model


def _outputs(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        out = model(*args)
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.fixture
def permute() -> Callable[..., sfx.PermutationReport]:
    """Permute ``model`` and assert that its outputs stay, for ``args`` and for other inputs."""

    def run(
        model: nn.Module, *args: Tensor, rtol: float = 1e-10, **options: Any
    ) -> sfx.PermutationReport:
        uneven(model)
        args = tuple(a.double() if a.is_floating_point() else a for a in args)
        others = tuple(torch.randn_like(a) if a.is_floating_point() else a.flip(0) for a in args)
        before = [*_outputs(model, args), *_outputs(model, others)]
        same = dict(model.named_parameters())
        report = sfx.permute_channels(model, args, **{"budget": 20, **options})
        after = [*_outputs(model, args), *_outputs(model, others)]
        for one, two in zip(before, after, strict=True):
            torch.testing.assert_close(two, one, rtol=rtol, atol=rtol * float(one.abs().max()))
        assert all(p is same[name] for name, p in model.named_parameters())
        assert report.after >= report.before
        return report

    return run
