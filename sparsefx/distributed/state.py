"""What the hook keeps between buckets and steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from sparsefx.distributed.entries import Plan, Sliced
from sparsefx.distributed.parcel import Part, Whole, header_of, parts_of, read_header
from sparsefx.distributed.plan import Planner, plain_name
from sparsefx.distributed.traffic import AllreduceReport, Traffic
from sparsefx.errors import ConfigError, SparsefxError, SparsefxWarning


@dataclass
class Sent:
    """A bucket on its way.

    Attributes:
        buffer: the bucket's own, which gets the result.
        parts: views into it.
        sizes: of what was sent of each.
        payload: what was sent; holds the sums once ``work`` is done.
        header: how many entries of it are the header.
        work: of the engine.
        future: what DDP waits for.
    """

    buffer: Tensor
    parts: list[Whole | Part]
    sizes: list[torch.Size]
    payload: Tensor
    header: int
    work: Any
    future: Future[Tensor]

    def write_back(self) -> None:
        """Copy the averages into the bucket."""
        pieces = torch.split(self.payload, [*(n.numel() for n in self.sizes), self.header])
        for part, size, piece in zip(self.parts, self.sizes, pieces[:-1], strict=True):
            part.put(piece.view(size).to(self.buffer.dtype))


class SampledAllreduceState:
    """State of :func:`sampled_allreduce_hook`, one for each model.

    What travels is read from the graphs that sparsefx compiled, at the first backward and again
    when more was compiled; a parameter of which nothing is known travels whole.

    Args:
        model: the module that is trained: what DDP wraps, or the DDP module itself, compiled as a
            whole or in parts, before or after it is wrapped.
        process_group: the one that DDP uses; ``None`` is the default group.
        compiled: compiled functions that are not found in ``model``, such as a training step.
        compress: dtype that gradients travel in, such as ``torch.bfloat16``; ``None`` is their own.

    Attributes:
        traffic: bytes sent so far, beside those of a dense all-reduce.

    Raises:
        ConfigError: for a model that is no module, or a dtype that is not floating-point.
    """

    def __init__(
        self,
        model: nn.Module,
        process_group: dist.ProcessGroup | None = None,
        *,
        compiled: Sequence[Any] = (),
        compress: torch.dtype | None = None,
    ) -> None:
        """Check what is given; nothing is read yet."""
        if compress is not None and not (
            isinstance(compress, torch.dtype) and compress.is_floating_point
        ):
            raise ConfigError(
                f"SampledAllreduceState: compress={compress!r} must be None or a floating-point "
                "dtype, such as torch.bfloat16"
            )
        self.process_group, self.compress = process_group, compress
        self.traffic = Traffic()
        self._warned: set[str] = set()
        self.attach(model, compiled=compiled)

    def attach(self, model: nn.Module, *, compiled: Sequence[Any] = ()) -> None:
        """Serve this model from now on, on every rank: after unpickling, or when it was replaced.

        Args:
            model: as for the constructor.
            compiled: likewise.

        Raises:
            ConfigError: for a model that is no module.
        """
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"SampledAllreduceState: model={model!r} must be an nn.Module; give a compiled "
                "function as compiled=[function] beside the module that it trains"
            )
        self._planner: Planner | None = Planner(model, tuple(compiled))
        self._plan: Plan | None = None
        self._stale = False
        self._pending: list[Sent] = []
        self._short: list[Sliced] = []

    # --- figures

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent so far."""
        return self.traffic.bytes_sent

    @property
    def bytes_dense(self) -> int:
        """Bytes that it would have sent in full."""
        return self.traffic.bytes_dense

    def report(self) -> AllreduceReport:
        """Return what travels of each parameter, and the bytes so far."""
        if self._plan is None or self._planner is None:
            return AllreduceReport(copy.copy(self.traffic))
        shapes = {plain_name(name): p.dim() for name, p in self._planner.model.named_parameters()}
        sliced = {entry.name: entry.describe() for entry in self._plan.sliced.values()}
        whole = {name: why for name, why in self._plan.whole.items() if shapes.get(name, 0) > 1}
        return AllreduceReport(copy.copy(self.traffic), sliced, whole)

    # --- one step, called by the hook

    def begin_step(self) -> None:
        """Plan anew if any rank has compiled more; all ranks do this or none."""
        self._pending, self._short = [], []  # of a backward that failed half-way
        self.traffic.begin_step()
        if self._plan is None or self._stale:
            self._plan, self._stale = self._agreed_plan(), False

    def _agreed_plan(self) -> Plan:
        if self._planner is None:
            raise SparsefxError(
                "this SampledAllreduceState was unpickled and serves no model yet: call "
                "state.attach(model) on every rank, then train"
            )
        # a thread of its own: in a backward's, its modes would be around what is traced
        with ThreadPoolExecutor(1) as thread:
            plan = thread.submit(self._planner.plan).result()
        group = self._group()
        others: list[Any] = [None] * group.size()
        dist.all_gather_object(others, plan.signatures(), group=group)
        plan.keep_agreed(others)
        if not plan.seen:
            self._warn("", "nothing in this model was compiled by sparsefx: gradients travel whole")
        return plan

    def send(self, bucket: Any) -> Future[Tensor]:
        """Start the all-reduce of a bucket; its future waits for the last bucket's verdict."""
        assert self._plan is not None, "begin_step has made it"
        self._check_owner(bucket)
        buffer = bucket.buffer()
        with torch.no_grad(), torch.autocast(buffer.device.type, enabled=False):
            parts = parts_of(bucket, self._plan.sliced)
            header = buffer.new_empty(0, dtype=self.compress or buffer.dtype)
            if bucket.is_last() or any(isinstance(part, Part) for part in parts):
                header = header_of(parts, bucket.is_last() and self._is_stale(), header)
            pieces = [part.piece() for part in parts]
            payload = self._averaged(torch.cat([piece.reshape(-1) for piece in pieces]))
            payload = torch.cat([payload, header])
        self.traffic.dense(buffer.nbytes)
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        work = self._all_reduce(payload)
        sizes = [piece.shape for piece in pieces]
        self._pending.append(Sent(buffer, parts, sizes, payload, len(header), work, future))
        return future

    def finish_step(self) -> None:
        """Wait for all buckets in turn; send again in full what their slices didn't hold.

        Every rank reads the same sums, so all of them send again or none does.
        """
        for sent in self._pending:
            sent.work.wait()
            with torch.no_grad():
                self._settle(sent)
        for sent in self._pending:
            sent.future.set_result(sent.buffer)
        self._pending.clear()
        for entry in () if self._stale else self._short:  # else what is new explains it
            self._tell(entry)

    def _settle(self, sent: Sent) -> None:
        """Put the average into the bucket, and choose what its parameters send next."""
        if not sent.header:
            sent.write_back()
            return
        answer = read_header(sent.payload[-sent.header :], sent.parts)
        self._stale = self._stale or answer.stale
        entries = [part.entry for part in sent.parts if isinstance(part, Part)]
        if any(answer.short):
            self._resend(sent)
        else:
            sent.write_back()
        if answer.differ:
            self._tell_difference(entries)
        else:
            self._short += [
                e for e, is_short in zip(entries, answer.short, strict=True) if is_short
            ]
        for entry, level in zip(entries, answer.needed, strict=True):
            entry.level = level

    def _resend(self, sent: Sent) -> None:
        full = self._averaged(sent.buffer)
        self._all_reduce(full).wait()
        sent.buffer.copy_(full)
        self.traffic.resent += 1

    def _tell_difference(self, entries: list[Sliced]) -> None:
        names = ", ".join(entry.name for entry in entries)
        self._warn(
            names,
            f"the ranks chose different slices of {names}: their weights differ, or their "
            "machines add up differently. The bucket is sent in full",
        )

    def _tell(self, entry: Sliced) -> None:
        """Warn once of a parameter's gradient that nothing that was compiled explains."""
        if entry.whole and not entry.expected:
            self._warn(
                entry.name,
                f"the gradient of {entry.name} is not zero outside the slices of its sampled "
                "products: something else adds to it, such as a penalty on the weight, a hook, "
                "or a gradient of earlier weights (zero_grad). It is sent in full until it is",
            )

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"sampled_allreduce_hook: {text}", SparsefxWarning, stacklevel=2)

    # --- the engine

    def _group(self) -> dist.ProcessGroup:
        found = self.process_group if self.process_group is not None else dist.group.WORLD
        assert found is not None, "DDP has a process group"
        return found

    def _averaged(self, gradient: Tensor) -> Tensor:
        """Cast and divide before the sum, as torch's own hooks do, so that fp16 holds it."""
        return gradient.to(self.compress or gradient.dtype, copy=True).div_(self._group().size())

    def _all_reduce(self, tensor: Tensor) -> Any:
        self.traffic.sent(tensor.nbytes)
        return dist.all_reduce(tensor, group=self._group(), async_op=True)

    def _is_stale(self) -> bool:
        assert self._planner is not None, "a plan was made"
        assert self._plan is not None, "begin_step has made it"
        return not self._planner.is_current(self._plan)

    def _check_owner(self, bucket: Any) -> None:
        assert self._planner is not None, "a plan was made"
        assert self._plan is not None, "begin_step has made it"
        if any(id(param) not in self._plan.known for param in bucket.parameters()):
            raise SparsefxError(
                "this SampledAllreduceState was made for another "
                f"{type(self._planner.model).__name__} than the one whose gradients it gets: "
                "register a state of its own for each model"
            )

    # --- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can't be pickled: process group, model, plan."""
        return {"compress": self.compress, "traffic": self.traffic, "warned": self._warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the default process group; ``attach`` gives a model."""
        self.compress, self.traffic = state["compress"], state["traffic"]
        self._warned = state["warned"]
        self.process_group = self._planner = self._plan = None
        self._stale, self._pending, self._short = False, [], []
