"""Feed calibration batches to a model and collect each layer's Gram, in bounded memory.

A batch's activations are gone before the next batch comes; what stays is one Gram per layer that is
being solved: all layers at once in independent mode, one (or those that share an input, such as
query, key and value) in sequential mode, which runs the batches once more for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.gram import Gram, empty_gram, input_rows
from sparsefx.sparsifiers.taps import tapped
from sparsefx.sparsifiers.targets import Target

Forward = Callable[[nn.Module, Any], object]
Keep = Callable[[Any], Tensor]

_LINEAR = {"linear", "conv1d"}  # kinds whose rows are their input as it is


class _SeenEnough(Exception):
    """Ends a forward whose remaining layers nobody watches."""


@dataclass
class Stream:
    """Batches, and how the model takes one.

    Args:
        model: in eval mode, see :func:`quiet`.
        batches: tensors, tuples or lists (positional arguments) or mappings (keyword arguments).
        forward: called with model and batch instead, where batches are something else.
        keep: called with a batch, tells which tokens count: bool [*, T].
    """

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward | None = None
    keep: Keep | None = None
    count: int = field(default=0, init=False)  # how many there were when they first ran through

    def feed(self, batch: Any) -> None:
        """Run the model on one batch."""
        try:
            if self.forward is not None:
                self.forward(self.model, batch)
            elif isinstance(batch, Mapping):
                self.model(**batch)
            elif isinstance(batch, tuple | list):
                self.model(*batch)
            elif isinstance(batch, Tensor):
                self.model(batch)
            else:
                raise SparsifierError(
                    f"a batch is of type {type(batch).__name__}; give a tensor, a tuple or a "
                    "mapping, or pass forward=lambda model, batch: ..."
                )
        except _SeenEnough:
            pass

    def run(self) -> Iterator[tuple[int, Any]]:
        """All batches with their numbers.

        Raises:
            SparsifierError: there are none, or not as many as the first time.
        """
        number = 0
        for batch in self.batches:
            yield number, batch
            number += 1
        if number == 0 or (self.count and number != self.count):
            before = f", and {self.count} before" if self.count else ""
            raise SparsifierError(
                f"there were {number} calibration batches{before}; pass a list or a DataLoader, "
                "which give the same batches each time"
            )
        self.count = number

    def kept(self, batch: Any) -> Tensor | None:
        """Return which tokens of a batch count; None for all."""
        if self.keep is None:
            return None
        kept = self.keep(batch)
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            got = str(kept.dtype) if isinstance(kept, Tensor) else type(kept).__name__
            raise SparsifierError(f"keep returned {got}; return a bool tensor, True where to count")
        return kept

    def check_repeats(self) -> None:
        """Raise SparsifierError for an iterator: it ends for good after one round."""
        if isinstance(self.batches, Iterator):
            raise SparsifierError(
                f"batches is a {type(self.batches).__name__}, which runs only once, and sequential "
                "mode runs the batches for each layer; pass a list or a DataLoader, or "
                "sequential=False"
            )


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's train/eval flag comes back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@dataclass
class Survey:
    """The order in which layers ran, and which got the very input of the layer before.

    Attributes:
        order: the layers, as they were first called.
        calls: name -> how many calls in all batches.
        joined: name -> the layer before it, where all its calls had that one's input; else "".
    """

    order: list[Target] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    joined: dict[str, str] = field(default_factory=dict)
    _last: tuple[Target, Tensor, int] | None = None  # of the batch that runs now

    def note(self, target: Target, inputs: tuple[Tensor, ...]) -> None:
        """Take down one call."""
        name, x = target.name, inputs[0]
        version = -1 if x.is_inference() else x._version  # counts changes in place
        before = ""
        if self._last is not None and version >= 0 and {target.kind, self._last[0].kind} <= _LINEAR:
            before = self._last[0].name if self._last[1] is x and self._last[2] == version else ""
        if name not in self.calls:
            self.order.append(target)
            self.joined[name] = before
        elif self.joined[name] != before:
            self.joined[name] = ""
        self.calls[name] = self.calls.get(name, 0) + 1
        self._last = (target, x, version)

    def end_batch(self) -> None:
        """Let go of the last activation."""
        self._last = None

    def stages(self) -> list[list[Target]]:
        """Layers that share an input, so that one Gram serves them; in execution order."""
        stages: list[list[Target]] = []
        for target in self.order:
            before = self.joined[target.name]
            if stages and before == stages[-1][-1].name and self._alike(target.name, before):
                stages[-1].append(target)
            else:
                stages.append([target])
        return stages

    def _alike(self, name: str, before: str) -> bool:
        return self.calls[name] == self.calls[before]


def survey(stream: Stream, targets: Iterable[Target], grams: dict[str, Gram] | None) -> Survey:
    """Run all batches once; note the layers' order and, where asked, collect all their Grams."""
    found, by_name = Survey(), {target.name: target for target in targets}
    number, kept = 0, None

    def take(name: str, inputs: tuple[Tensor, ...]) -> None:
        found.note(by_name[name], inputs)
        if grams is not None:
            if name not in grams:
                grams[name] = empty_gram(by_name[name])
            add_inputs(grams[name], by_name[name], inputs, None, kept, number)

    with tapped(stream.model, by_name.values(), take):
        for number, batch in stream.run():  # noqa: B007  # take reads it
            kept = stream.kept(batch)
            stream.feed(batch)
            found.end_batch()
    return found


def collect(
    stream: Stream, stage: list[Target], once: bool, switch: Callable[[bool], None] | None
) -> Gram:
    """Run all batches for the layers of one stage, whose common input makes one Gram.

    Args:
        stream: the batches.
        stage: the layers.
        once: each is called once a batch, so that the forward may end there.
        switch: called with True to make the model dense, with False to make it the pruned one:
            then each batch runs through both and the Gram is paired.
    """
    leader = stage[0]
    gram = empty_gram(leader, paired=switch is not None)
    for number, batch in stream.run():
        dense: list[tuple[Tensor, ...]] = []
        if switch is not None:
            switch(True)
            _watch(stream, leader, once, batch, dense.append)
            switch(False)
        wanted = dense if switch is not None else None
        add = _adder(gram, leader, wanted, stream.kept(batch), number)
        _watch(stream, leader, once, batch, add)
        if dense:
            raise SparsifierError(
                f"layer {leader.name!r} ran {len(dense)} times less in the pruned net than in the "
                "dense one; pass sequential=False"
            )
    return gram


def _adder(
    gram: Gram,
    target: Target,
    dense: list[tuple[Tensor, ...]] | None,
    kept: Tensor | None,
    number: int,
) -> Callable[[tuple[Tensor, ...]], None]:
    def add(inputs: tuple[Tensor, ...]) -> None:
        if dense == []:
            raise SparsifierError(
                f"layer {target.name!r} ran more often in the pruned net than in the dense one; "
                "pass sequential=False"
            )
        add_inputs(gram, target, inputs, dense.pop(0) if dense else None, kept, number)

    return add


def _watch(
    stream: Stream,
    target: Target,
    once: bool,
    batch: Any,
    take: Callable[[tuple[Tensor, ...]], None],
) -> None:
    def taken(name: str, inputs: tuple[Tensor, ...]) -> None:
        if once:
            take(inputs)
            raise _SeenEnough
        take(tuple(x.clone() for x in inputs))  # the model may go on to change them in place

    with tapped(stream.model, [target], taken):
        stream.feed(batch)


def add_inputs(
    gram: Gram,
    target: Target,
    inputs: tuple[Tensor, ...],
    dense: tuple[Tensor, ...] | None,
    kept: Tensor | None,
    number: int,
) -> None:
    """Add one call's inputs, those that count; errors name layer and batch."""
    try:
        if kept is not None and target.kind in _LINEAR:
            inputs = tuple(_choose(x, kept) for x in inputs)
            dense = dense and tuple(_choose(x, kept) for x in dense)
        if dense is None:
            for groups, rows in input_rows(target, inputs):
                gram.add(rows, groups)
            return
        shapes, theirs = ([tuple(x.shape) for x in xs] for xs in (inputs, dense))
        if shapes != theirs:
            raise SparsifierError(
                f"its input is {shapes} in the pruned net and {theirs} in the dense one; pass "
                "sequential=False"
            )
        pairs = zip(input_rows(target, inputs), input_rows(target, dense), strict=True)
        for (groups, rows), (_, wanted) in pairs:
            gram.add(rows, groups, wanted)
    except SparsifierError as error:
        raise SparsifierError(f"layer {target.name!r}, batch {number}: {error}") from error


def _choose(x: Tensor, kept: Tensor) -> Tensor:
    """Rows [*, K] of the tokens that count, where x has one row for each token of the batch."""
    return x[kept.to(x.device)] if x.shape[:-1] == kept.shape else x
