"""Models with channels masked by the L1 norm of their filters, and whether a call keeps them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx


def _mask_smallest(weight: Tensor, share: float, dim: int = 0, block: int = 1) -> Tensor:
    """Zero the slices of least L1 norm, blocks of them together; return those that stay."""
    rows = weight.detach().abs().movedim(dim, 0).flatten(1).sum(1)
    order = rows.unflatten(0, (-1, block)).sum(1).argsort()
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[: int(share * len(order))]] = True
    with torch.no_grad():
        weight.movedim(dim, 0)[gone.repeat_interleave(block)] = 0
    return (~gone).nonzero().flatten()


@pytest.fixture
def mask_smallest() -> Callable[..., Tensor]:
    """``mask_smallest(weight, share, dim=0, block=1)`` -> numbers of the blocks that stay."""
    return _mask_smallest


def _outputs(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if t is not None]


@pytest.fixture
def compact() -> Callable[..., sfx.Compacted]:
    """Compact ``model`` and assert equal outputs, on ``args`` and on other inputs, unchanged it."""

    def run(model: nn.Module, *args: Tensor, **options: Any) -> sfx.Compacted:
        model.eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = sfx.compact_channels(model, args, **options)
        assert all(torch.equal(model.state_dict()[name], was) for name, was in before.items())
        others = tuple(3 * torch.randn_like(a) if a.is_floating_point() else a for a in args)
        for given in (args, others):
            with torch.no_grad():
                pairs = zip(_outputs(model(*given)), _outputs(found.model(*given)), strict=True)
            for one, two in pairs:
                torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
        shapes = {name: tuple(t.shape) for name, t in found.model.state_dict().items()}
        assert all(shapes[tensor.name] == tensor.after for tensor in found.plan.tensors)
        return found

    return run
