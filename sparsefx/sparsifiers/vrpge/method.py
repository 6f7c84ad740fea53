"""VR-PGE: gates on units, learned by a policy gradient from losses alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.base import Layer, Sparsifier, clear_outside, unregister
from sparsefx.sparsifiers.schedules import Schedule, as_schedule, whole_number
from sparsefx.sparsifiers.targets import Rules, Target, all_targets, find_targets
from sparsefx.sparsifiers.unstructured import Unstructured
from sparsefx.sparsifiers.vrpge.cuts import skeleton_of
from sparsefx.sparsifiers.vrpge.draws import draw, likely
from sparsefx.sparsifiers.vrpge.gate import GateState, check_alone, exchange, put
from sparsefx.sparsifiers.vrpge.groups import Member, costs_of, count_uses, group_units
from sparsefx.sparsifiers.vrpge.maths import adam, policy_gradient, project
from sparsefx.sparsifiers.vrpge.options import (
    Choice,
    agreed,
    as_inputs,
    as_it_was,
    check_options,
    exempting,
    scalar,
    share_at,
)
from sparsefx.sparsifiers.vrpge.step import CompactStep

Closure = Callable[[], Tensor]


class VRPGE(Sparsifier[Unstructured]):
    """Keep each unit with a probability that losses, not gradients, teach.

    Every unit has a gate, on with probability s. Weights are trained on one drawn sub-net a step;
    :meth:`structure_step` compares the losses of K others, forward passes without gradient, and
    moves s by the variance-reduced policy gradient, Adam and a projection onto the budget
    ``sum(cost * s) <= keep * sum(cost)`` of the whole net. A gate that is off zeroes the filter
    and its bias; where ``args`` tell who shares its channels, one gate covers all that writes one
    channel (all filters of a residual stream, a norm's scale and shift), so that the channel is
    exactly zero and :meth:`compact` can leave it out. s of 0 or 1 has no gradient and stays, but
    for Adam's momentum and the projection.

    In training mode the model is the drawn sub-net, in eval mode the most probable one of the
    expected cost; :meth:`freeze` or :meth:`choose` ends the draws. Zhou, Zhang, Xu & Zhang,
    "Efficient Neural Network Training via Forward and Backward Propagation Sparsification"
    (NeurIPS 2021), algorithm 1; the losses' average over ranks makes it data-parallel.

    Args:
        model: the plain model.
        keep: share of the budget that is kept, in (0, 1].
        unit: "filter" (an output of a linear or conv layer), "hidden" (of linear layers alone),
            "head" (of ``nn.MultiheadAttention``) or "block" (``block`` filters each).
        budget: "count" of gates, "parameters" or "flops" (needs args): the cost of a unit is that
            of its own rows, with all inputs there.
        lr: of the gates' Adam; a number or a schedule.
        schedule: share of the budget at each step, ``Cubic(1, keep, steps)`` for one; None is
            ``keep`` all along.
        seed: of the draws.
        rules: which layers, see :func:`sparsefx.sparsifiers.targets.find_targets`.
        args: example inputs, a tensor or a sequence: ties gates that share channels.
        kwargs: example inputs by name, with args.
        block: filters of one gate, for ``unit="block"``.
        keep_output: leave out the layer that writes the model's output (without args, the last).

    Raises:
        SparsifierError: an option or the model doesn't allow it; the model is untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.25,
        unit: str = "filter",
        budget: str = "count",
        *,
        lr: float | Schedule = 0.012,
        schedule: Schedule | None = None,
        seed: int = 0,
        rules: Rules = None,
        args: Tensor | Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        block: int = 8,
        keep_output: bool = True,
    ) -> None:
        """Check the options, group the units, then put gates on them."""
        check_options(model, keep, unit, budget, args)
        whole_number("VRPGE", "seed", seed, 0)
        whole_number("VRPGE", "block", block, 1)
        self.keep, self.unit, self.budget = float(keep), unit, budget
        self.lr = as_schedule("VRPGE", "lr", lr)
        self.schedule = as_schedule("VRPGE", "schedule", keep if schedule is None else schedule)
        first = share_at(self.schedule, 0)
        self.inputs = None if args is None else (as_inputs(args), dict(kwargs or {}))
        pattern = Unstructured(keep, unit if unit in ("head", "block") else "filter")
        targets, _ = find_targets(model, rules, pattern)
        found = group_units(model, targets, unit, block, keep_output, self.inputs)
        if not found.groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in found.exempt.items())
            raise SparsifierError(f"VRPGE(unit={unit!r}): no layer carries gates ({why})")
        self.groups, self.known = found.groups, found.known
        every = [target for target in all_targets(model) if target.kind != "transposed conv"]
        self.uses = {} if self.inputs is None else count_uses(model, every, self.inputs)
        self.skeleton = skeleton_of(model) if self.inputs is not None else None
        device = targets[0][0].weight.device
        self.costs = costs_of(self.groups, budget, self.uses).to(device)
        sizes = torch.tensor([group.size for group in self.groups])
        self.group_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device)
        super().__init__(model, pattern, exempting(rules, found.exempt), straight_through=False)
        self.skipped.update(found.exempt)
        self._gate(pattern, seed, first, device)

    def make_mask(self, target: Target, pattern: Unstructured, weight: Tensor, step: int) -> Tensor:
        """Return a mask of ones: gates are drawn once all are known."""
        return torch.ones_like(weight, dtype=torch.bool)

    @torch.no_grad()
    def _gate(self, pattern: Unstructured, seed: int, share: float, device: torch.device) -> None:
        self.layers = {name: exchange(layer) for name, layer in self.layers.items()}
        members = [member for group in self.groups for member in group.beside]
        self.beside = {m.target.name: put(m.target, pattern) for m in members}
        self.state = GateState(len(self.costs), seed, device)
        next(iter(self.layers.values())).mask.add_module("state", self.state)
        self.state.probability.fill_(share)
        self._refresh()
        self._show(self.state.gates)

    # --- what is known

    @property
    def probabilities(self) -> Tensor:
        """Return s of every gate, float32 [n], group after group; see :attr:`groups`."""
        return self.state.probability

    @property
    def frozen(self) -> bool:
        """Whether the draws have ended."""
        return bool(self.state.counts[2])

    def share(self, gates: Tensor | None = None) -> float:
        """Return the cost of gates, bool [n], of all gates' cost; None takes the expected one."""
        on = self.state.probability if gates is None else gates
        return float((self.costs * on).sum() / self.costs.sum())

    def spread(self, gates: Tensor) -> Iterator[tuple[Member, Layer[Unstructured], Tensor]]:
        """Yield each gated parameter with its gates, in a shape that broadcasts over it."""
        start = 0
        for group in self.groups:
            own = gates[start : start + group.size]
            start += group.size
            for member in group.members:
                yield member, self.layers[member.target.name], member.spread(own)
            for member in group.beside:
                yield member, self.beside[member.target.name], member.spread(own)

    # --- training

    def begin(self, step: int) -> None:
        """Follow the budget and draw the sub-net of the next weight step."""
        if self.frozen:
            return
        state = self.state
        state.probability.copy_(project(state.probability, self._limit(step), self.costs))
        self._refresh(step)
        self._show(state.gates, count=True)

    @torch.no_grad()
    def structure_step(self, closure: Closure, draws: int = 2) -> Tensor:
        """Learn from the losses of ``draws`` sub-nets: forward passes alone.

        Buffers (batch norm's, say) and the sub-net of the weight step come back as they were.
        Every rank has to call it; losses are averaged over ranks.

        Args:
            closure: runs the model on the batch and returns the loss, a scalar.
            draws: K, at least 2.

        Returns:
            The losses, [K].

        Raises:
            SparsifierError: after freeze() or squash(), or a loss that is no finite scalar; the
                gates are then as they were.
        """
        self._check_alive()
        whole_number("VRPGE", "draws", draws, 2)
        if self.frozen:
            raise SparsifierError("the gates are frozen: leave out structure_step() from here on")
        state, s = self.state, self.state.probability
        seed, done, _ = state.counts.tolist()
        tried = torch.stack([draw(s, seed, "structure", done, k) for k in range(draws)])
        losses = self._losses(tried, closure)
        step = self.steps
        direction = adam(state.moments, policy_gradient(losses, tried, s), done + 1)
        s.copy_(project(s - self.lr(step) * direction, self._limit(step), self.costs))
        state.counts[1] += 1
        state.gates[1] = likely(s, self.costs, self.group_of)
        self._show(state.gates)
        return losses

    @torch.no_grad()
    def choose(self, closure: Closure, draws: int = 10) -> Choice:
        """Try the most probable sub-net and draws, and freeze the one of the smallest loss.

        Args:
            closure: returns the loss over the set that decides, a scalar; never the test set.
            draws: sub-nets to try, the most probable one included.

        Raises:
            SparsifierError: as for :meth:`structure_step`.
        """
        self._check_alive()
        whole_number("VRPGE", "draws", draws, 1)
        if self.frozen:
            raise SparsifierError("the gates are frozen: a sub-net was chosen before")
        state = self.state
        seed, step = int(state.counts[0]), self.steps
        others = [draw(state.probability, seed, "choice", step, k) for k in range(1, draws)]
        tried = torch.stack([state.gates[1], *others])
        losses = self._losses(tried, closure)
        best = int(losses.argmin())
        state.gates[1] = tried[best]
        self.freeze()
        return Choice(float(losses[best]), tuple(losses.tolist()), self.share(tried[best]))

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the most probable sub-net (or the chosen one) from here on."""
        self._check_alive()
        self.state.gates[0] = self.state.gates[1]
        self.state.counts[2] = 1
        self._show(self.state.gates)

    def compact(self, backend: Any = None, *, buckets: int = 8, programs: int = 16) -> CompactStep:
        """Return a callable that runs the model with only the channels of the present sub-net.

        Args:
            backend: what ``torch.compile`` takes; None runs eagerly.
            buckets: sizes that a count of channels is rounded up to, per axis.
            programs: the most that are compiled; from then on a larger one that fits is taken.

        Raises:
            SparsifierError: VRPGE was constructed without args.
        """
        self._check_alive()
        return CompactStep(self, backend, buckets, programs)

    @torch.no_grad()
    def squash(self) -> nn.Module:
        """Write the most probable (or chosen) sub-net into the parameters and take gates off.

        Raises:
            SparsifierError: as for :meth:`Sparsifier.squash`.
        """
        if self._squashed:
            return self.model
        check_alone(self.layers | self.beside)
        self.freeze()
        for layer in reversed(self.beside.values()):  # the last came last, so orders come back
            clear_outside(layer)
            unregister(self.model, layer)
        return super().squash()

    # --- inside

    def _limit(self, step: int) -> Tensor:
        return share_at(self.schedule, step) * self.costs.sum()

    def _refresh(self, step: int = 0) -> None:
        """Draw the gates of a step, and note the most probable ones."""
        state = self.state
        seed = int(state.counts[0])
        state.gates[0] = draw(state.probability, seed, "weights", step)
        state.gates[1] = likely(state.probability, self.costs, self.group_of)

    def _show(self, gates: Tensor, count: bool = False) -> None:
        """Write gates, bool [2, n], into the masks."""
        for row, name in enumerate(("mask", "likely")):
            for _, layer, values in self.spread(gates[row]):
                if count and name == "mask":
                    layer.mask.replace(values)
                else:
                    getattr(layer.mask, name).copy_(values)

    def _losses(self, tried: Tensor, closure: Closure) -> Tensor:
        losses = []
        with as_it_was(self.model):
            for one in tried:
                self.state.gates.copy_(one.expand(2, -1))
                self._show(self.state.gates)
                losses.append(scalar(closure()))
        return agreed(torch.stack(losses))
