"""What VRPGE takes from its user: options, rules, and the losses that a closure returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsefx.config import Dense, Rule
from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.schedules import Schedule
from sparsefx.sparsifiers.targets import Rules
from sparsefx.sparsifiers.vrpge.groups import UNITS

BUDGETS = ("count", "flops", "parameters")


class Choice(NamedTuple):
    """What :meth:`VRPGE.choose` found.

    Attributes:
        loss: of the sub-net that was chosen.
        losses: of all that were tried, the most probable one first.
        share: what the chosen one costs, of all units' cost.
    """

    loss: float
    losses: tuple[float, ...]
    share: float


def check_options(model: object, keep: object, unit: str, budget: str, args: object) -> None:
    """Refuse what makes no sense."""
    if not isinstance(model, nn.Module):
        raise SparsifierError(f"model is {type(model).__name__}; pass an nn.Module")
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise SparsifierError(f"VRPGE: keep={keep!r} must be in (0, 1]")
    for key, value, allowed in (("unit", unit, UNITS), ("budget", budget, BUDGETS)):
        if value not in allowed:
            names = ", ".join(map(repr, allowed))
            raise SparsifierError(f"VRPGE: {key}={value!r} is not one of {names}")
    if budget == "flops" and args is None:
        raise SparsifierError("VRPGE: budget='flops' needs args=, example inputs, to count them")


def as_inputs(args: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """Return positional arguments."""
    return (args,) if isinstance(args, Tensor) else tuple(args)


def exempting(rules: Rules, exempt: Mapping[str, str]) -> Rules:
    """Return rules that leave out the layers that carry no gates."""
    if not exempt:
        return rules
    dense = Rule(_named(exempt), forward=Dense())
    return [dense, *(["*"] if rules is None else rules)]


def _named(names: Mapping[str, str]) -> Callable[[Any], bool]:
    return lambda target: target.name in names


def share_at(schedule: Schedule, step: int) -> float:
    """Return the share of the budget at a step.

    Raises:
        SparsifierError: it is outside (0, 1].
    """
    share = schedule(step)
    if not 0 < share <= 1:
        raise SparsifierError(f"VRPGE: schedule({step}) is {share!r}; it must be in (0, 1]")
    return float(share)


def scalar(loss: object) -> Tensor:
    """Return a loss without its graph; refuse anything else."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise SparsifierError(f"VRPGE: the closure returned {shape}; return the loss, a scalar")
    return loss.detach().reshape(())


def mean_over_ranks(losses: Tensor) -> Tensor:
    """Average, so that every rank moves its gates alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        losses = losses.clone()
        torch.distributed.all_reduce(losses)
        losses /= torch.distributed.get_world_size()
    return losses


def agreed(losses: Tensor) -> Tensor:
    """Return the losses' average over ranks.

    Raises:
        SparsifierError: NaN or infinity; asked of the average, so every rank says the same.
    """
    found = mean_over_ranks(losses)
    if not bool(found.isfinite().all()):
        raise SparsifierError(
            f"VRPGE: the closure returned {found.tolist()}: training diverged, or a sub-net "
            "without any unit divides by zero; lower the learning rate or raise keep"
        )
    return found


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back every buffer, masks included."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, was in saved:
            buffer.copy_(was)
