"""The weight step on the drawn sub-net alone: the same model with smaller tensors.

Weights are gathered, ``W[rows][:, columns]``, the model runs on them through
``torch.func.functional_call``, and the gather's backward brings gradients to the full parameters.
What a channel that is off would hold is never computed, in the forward or the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsefx import compat
from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.schedules import whole_number
from sparsefx.sparsifiers.vrpge.cuts import Tensors, Wiring, Written
from sparsefx.sparsifiers.vrpge.sizes import Programs, Sizes
from sparsefx.sparsifiers.vrpge.trial import find_whole

if TYPE_CHECKING:
    from sparsefx.sparsifiers.vrpge.method import VRPGE


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass on the example inputs, products with gates alone.

    Attributes:
        dense: of the full net.
        live: of the channels that are on.
        computed: of what runs, padding included.
    """

    dense: int
    live: int
    computed: int


class CompactStep:
    """Call it in place of the model; it computes the channels of the present sub-net alone.

    In training mode that is the drawn sub-net, in eval mode the most probable one. The outputs are
    those of the masked model to rounding; so are gradients, which land in the model's parameters
    (zeros where gates are off), and running statistics, but that those of channels that are off
    stay as they are. Counts are rounded up with channels whose weights act as zero. Groups that
    can't be left out (see :attr:`whole`) are computed whole, with masked weights.

    Hooks of wrappers around the model, such as DDP's, don't run: average gradients yourself.

    Args:
        owner: the gates; constructed with args.
        backend: as for :meth:`VRPGE.compact`, like the others.
        buckets: likewise.
        programs: likewise.

    Attributes:
        whole: group -> why its channels are computed whole.
        sizes: channels of each group that the last call computed.

    Raises:
        SparsifierError: the owner has no example inputs, or an option is out of range.
    """

    def __init__(self, owner: VRPGE, backend: Any, buckets: int, programs: int) -> None:
        """Find what is cut where, and try it."""
        if owner.known is None or owner.skeleton is None:
            raise SparsifierError(
                "VRPGE.compact() needs to know who reads which channel: pass args=, example "
                "inputs, to VRPGE"
            )
        whole_number("VRPGE.compact", "buckets", buckets, 1)
        whole_number("VRPGE.compact", "programs", programs, 1)
        self.owner, self.backend = owner, backend
        self.skeleton: nn.Module = owner.skeleton
        self.groups = owner.groups
        self._starts = [0]
        for group in self.groups:
            self._starts.append(self._starts[-1] + group.size)
        self._run = _run_of(self.skeleton)
        self.wiring = Wiring(owner, owner.skeleton, owner.known)
        self._modules = [
            (owner.model.get_submodule(name), mine) for name, mine in self.skeleton.named_modules()
        ]
        self.whole = {group.name: group.reason for group in self.groups if group.reason}
        self.whole |= find_whole(self)
        full = tuple(len(group.unit) for group in self.groups)
        self.programs = Programs(full, buckets, programs, self.wiring.cost)
        self.sizes: Sizes = full
        self._compiled: dict[object, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the sub-net on inputs of the model.

        Raises:
            SparsifierError: after squash().
        """
        owner = self.owner
        owner._check_alive()
        live = self._live(owner.state.gates[0 if owner.model.training else 1])
        counts = torch.stack([one.sum() for one in live]).tolist()
        self.sizes = self._choose(counts)
        kept = [pad(one, size) for one, size in zip(live, self.sizes, strict=True)]
        small, written = self.wiring.gather(live, kept, lambda source: source.tensor)
        for module, mine in self._modules:
            mine.training = module.training
        out = self._run_program(small, args, kwargs)
        if owner.model.training:
            _write_back(small, written)
        return out

    def macs(self) -> Macs:
        """Return what the present sub-net takes, and what the last call computed."""
        gates = self.owner.state.gates[0 if self.owner.model.training else 1]
        counts = tuple(int(one.sum()) for one in self._live(gates))
        full = tuple(len(group.unit) for group in self.groups)
        return Macs(*(round(self.wiring.cost(sizes)) for sizes in (full, counts, self.sizes)))

    def _live(self, gates: Tensor) -> list[Tensor]:
        return [
            gates[start : start + group.size][group.unit.to(gates.device)]
            for start, group in zip(self._starts, self.groups, strict=False)
        ]

    def _choose(self, counts: list[int]) -> Sizes:
        free = [group.name not in self.whole for group in self.groups]
        full = self.programs.full
        counts = [c if f else size for c, f, size in zip(counts, free, full, strict=True)]
        if self.backend is None:
            return self.programs.tight(counts)
        return self.programs.choose(counts, self._expected())

    def _expected(self) -> list[float]:
        s = self.owner.state.probability
        out = []
        for start, group in zip(self._starts, self.groups, strict=False):
            own = s[start : start + group.size][group.unit.to(s.device)]
            out.append(float(own.sum() + (own * (1 - own)).sum().sqrt()))
        return out

    def _run_program(self, small: Tensors, args: Any, kwargs: Any) -> Any:
        """Run eagerly, or what was compiled for these sizes."""
        if self.backend is None:
            return self._run(small, args, kwargs)
        if self.sizes in self._compiled:
            return self._compiled[self.sizes](small, args, kwargs)
        compiled = compat.compile_apart(_run_of(self.skeleton), self.backend)
        self._compiled[self.sizes] = compiled
        with warnings.catch_warnings():  # Dynamo asks gathered tensors, no leaves, for their .grad
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
            return compiled(small, args, kwargs)


def _run_of(skeleton: nn.Module) -> Callable[..., Any]:
    def run(small: Tensors, args: Any, kwargs: Any) -> Any:
        return functional_call(skeleton, small, args, kwargs)

    return run


def pad(live: Tensor, size: int) -> Tensor:
    """Return ``size`` channels: those that are on, and the first others."""
    order = (~live).to(torch.uint8).argsort(stable=True)
    return torch.zeros_like(live).index_fill(0, order[:size], True)


@torch.no_grad()
def _write_back(small: Tensors, written: Written) -> None:
    for name, full, number, index, on in written:
        part = small[name].index_select(number, on.nonzero().flatten())
        full.index_copy_(number, index[on], part)
