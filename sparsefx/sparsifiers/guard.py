"""What DST refuses: options, numbers that are not finite, an optimizer that decays thresholds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.mask import full
from sparsefx.sparsifiers.schedules import whole_number
from sparsefx.sparsifiers.thresholds import ThresholdMask


def number(key: str, value: object, least: float, below: float) -> float:
    """Return what a user gave as a float; SparsifierError unless least <= value < below."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value < below  # NaN is not
    ):
        raise SparsifierError(
            f"DST: {key}={value!r} must be a number of at least {least} and below {below}"
        )
    return float(value)


def check_target(density: object, steps: object, reset: float) -> float | None:
    """Return the density that is asked for, if any; SparsifierError for what makes no sense."""
    if density is None:
        if steps is not None:
            raise SparsifierError(f"DST: steps={steps!r} is read with density= only; leave it out")
        return None
    share = number("density", density, 0, 1)
    if share <= reset:
        raise SparsifierError(
            f"DST: density={density!r} must be above reset={reset!r}, the share that layers are "
            "brought back from: pass a lower reset"
        )
    if steps is None:
        raise SparsifierError(
            f"DST: density={density!r} needs steps=..., the optimizer steps until it is to be met"
        )
    whole_number("DST", "steps", steps, 1)
    return share


def note_faults(
    layers: Mapping[str, tuple[Tensor, ThresholdMask]], step: int, gradients: bool
) -> Tensor:
    """Write the step into ``fault`` of each layer that holds what is not finite, the first time.

    Nothing waits for the device.

    Args:
        layers: name -> weight and mask.
        step: the number to write.
        gradients: whether to look at ``.grad`` too.

    Returns:
        A bool scalar: whether there is a fault anywhere, an earlier one too.
    """
    flags = []
    for weight, mask in layers.values():
        parts: list[Tensor] = [weight, mask.threshold]
        if gradients:
            parts += [p.grad for p in (weight, mask.threshold) if p.grad is not None]
        bad = torch.stack([_strange(part) for part in parts]).any()
        mask.fault.copy_(torch.where((mask.fault == 0) & bad, step, mask.fault))
        flags.append(mask.fault != 0)
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def tell_fault(masks: Mapping[str, ThresholdMask], alpha: float) -> None:
    """Raise SparsifierError for the first fault, if there is one. Waits for the device, once."""
    faults = [mask.fault for mask in masks.values()]
    steps = torch.stack([fault.to(faults[0].device) for fault in faults]).tolist()
    bad = [(step, name) for name, step in zip(masks, steps, strict=True) if step]
    if bad:
        step, name = min(bad, key=lambda found: found[0])
        raise SparsifierError(
            f"layer {name!r} held a weight, threshold or gradient that is not finite at step "
            f"{step}; masks are as they were before it: go back to an earlier checkpoint, and "
            f"lower the learning rate or alpha={alpha:.3g}, or clip gradients"
        )


def check_groups(optimizer: object, thresholds: Mapping[str, nn.Parameter]) -> None:
    """Raise SparsifierError unless an optimizer holds every threshold and decays none."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SparsifierError(
            f"DST: optimizer is {type(optimizer).__name__}; pass a torch.optim.Optimizer"
        )
    groups = optimizer.param_groups
    decays = {id(p): group.get("weight_decay", 0) for group in groups for p in group["params"]}
    for name, threshold in thresholds.items():
        if id(threshold) not in decays:
            raise SparsifierError(
                f"DST: the optimizer doesn't hold the threshold of layer {name!r}: build it on "
                "parameter_groups(), after the sparsifier and fully_shard"
            )
        if decay := decays[id(threshold)]:
            raise SparsifierError(
                f"DST: the optimizer decays the threshold of layer {name!r} (weight_decay="
                f"{decay!r}), which would drive it to 0: build it on parameter_groups()"
            )


def _strange(x: Tensor) -> Tensor:
    """Whether any number is not finite: 0 * x is NaN there, and sums of shards can be sent."""
    return full((x.detach() * 0).sum()) != 0
