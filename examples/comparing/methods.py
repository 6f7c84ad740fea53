"""The methods, each a function that trains and returns what was measured."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from task import BATCH, SIZE, Run, Task
from torch import nn
from torch.nn import functional as F

import sparsefx as sfx
from sparsefx.compact import compact_channels
from sparsefx.config import Pattern
from sparsefx.masks import nm_mask
from sparsefx.sparsifiers import (
    DST,
    SET,
    SRSTE,
    VRPGE,
    ProvableFilterPruner,
    RigL,
    Sparsifier,
    Static,
    TransposableNM,
)

ROLES = ("forward", "grad_input", "grad_weight")
HIDDEN = [sfx.Rule("4", forward=sfx.Dense()), "*"]  # the last layer stays dense
Made = tuple[Sparsifier[Any], torch.optim.Optimizer]


def compiled(
    task: Task, made: Made | None = None, finish: Callable[[Task], object] = id,
    **patterns: Pattern,
) -> Run:  # fmt: skip
    """Train through the compiler: products of a pattern, or a sparsifier's masks, or neither."""
    sparsifier, optimizer = made or (None, task.sgd())
    rules = [sfx.Rule("*", **patterns)] if patterns else []
    config = sfx.SparseConfig(rules, keep_output_dense=False, codegen=task.codegen)
    torch.compiler.reset()  # else Dynamo gives up after a handful of compilations of one code
    options = {"config": config}
    run = torch.compile(task.model, backend="sparsefx", dynamic=False, options=options)
    task.fit(optimizer, run, sparsifier)
    flops = sfx.explain(task.model, config=config)(task.x[:BATCH]).totals.flops
    left = sum(flops[role].sparse for role in ROLES) / 2
    macs = {role: flops[role].executed / 2 for role in ROLES}
    finish(task)
    return task.result(macs, left, sparsifier and kept_by(sparsifier))


@torch.no_grad()
def keep_24(task: Task) -> None:
    """Leave in the weights what their products use."""
    for weight in (p for p in task.model.parameters() if p.dim() == 2):
        weight.mul_(nm_mask(weight, 2, 4, dim=1))


def two_of_four(task: Task) -> Run:
    """Masks made anew in the product at every step: nothing is stored, nothing decays."""
    return compiled(task, finish=keep_24, forward=sfx.NM(2, 4))


def kept_by(sparsifier: Sparsifier[Any]) -> int:
    """Weights inside masks, and those of layers without one."""
    masks = sparsifier.masks().values()
    return SIZE - sum(int((~mask).count_nonzero()) for mask in masks)


def sampled_backward(task: Task) -> Run:
    pattern = sfx.Sampled(0.5, estimator="systematic")
    return compiled(task, grad_input=pattern, grad_weight=pattern)


def dst(task: Task) -> Run:
    sparsifier = DST(task.model, alpha=5e-4)
    return compiled(task, (sparsifier, task.sgd(sparsifier.parameter_groups())))


def srste(task: Task) -> Run:
    return compiled(task, (SRSTE(task.model, 2, 4, rules=HIDDEN), task.sgd()))


def transposable(task: Task) -> Run:
    sparsifier = TransposableNM(task.model, 4, 8, freeze=task.total * 19 // 20, rules=HIDDEN)
    return compiled(task, (sparsifier, task.sgd()))


def narrow_start(task: Task) -> None:
    """Start as SET does, whose layers have few inputs left: normal weights of deviation 0.1."""
    for layer in task.model[:3:2]:
        nn.init.normal_(layer.weight, std=0.1)


def static(task: Task) -> Run:
    narrow_start(task)
    return compiled(task, (Static(task.model, epsilon=8, rules=HIDDEN, seed=task.seed), task.sgd()))


def evolving(task: Task, kind: type[SET] | type[RigL], **options: Any) -> Run:
    narrow_start(task)
    optimizer = task.sgd()
    shared = {"epsilon": 8, "every": task.every, "rules": HIDDEN, "seed": task.seed}
    return compiled(task, (kind(task.model, optimizer=optimizer, **shared, **options), optimizer))


def vrpge(task: Task) -> Run:
    """Weight steps compute the drawn units alone; gates learn from two forward passes a step."""
    gates = VRPGE(task.model, keep=0.25, args=task.x[:BATCH], seed=task.seed)
    run = gates.compact()
    task.fit(task.sgd(), run, gates, before=gates.structure_step)
    task.timed(gates.choose, lambda: F.cross_entropy(task.model(task.x), task.y))
    task.fit(task.sgd(lr=1e-3), run, gates)  # the chosen sub-net goes on
    task.total *= 2
    forward, backward = (statistics.mean(half) / 2 for half in zip(*task.counted, strict=True))
    executed = forward + backward
    tried = BATCH * SIZE  # two full forward passes with masked weights, in half of the steps
    macs = {
        "forward": forward + tried,
        "grad_input": backward - forward,  # no layer lacks a weight's gradient
        "grad_weight": forward,
    }
    small = compact_channels(gates.squash(), task.x[:BATCH]).model
    return task.result(macs, executed, net=small)


def pfp(task: Task) -> Run:
    """Train densely, drop channels, make the net smaller; no training afterwards."""
    dense = compiled(task)
    pruner = task.timed(ProvableFilterPruner, task.model, task.x.split(BATCH), 0.25)
    small = task.timed(compact_channels, pruner.squash(), task.x[:BATCH]).model
    return task.result(dense.macs, dense.executed, net=small)


@dataclass(frozen=True)
class Method:
    """How it is called, how it trains, and what the method's reference routine gets."""

    title: str
    train: Callable[[Task], Run]
    reference: float | None = None


def train(name: str, seed: int, epochs: int, codegen: str) -> Run:
    """Train by one method, in one process: more threads only get in the way of a net this small."""
    torch.set_num_threads(1)
    return METHODS[name].train(Task(seed, epochs, codegen))


METHODS = {
    "dense": Method("dense", compiled, 97.87),
    "sampled": Method(
        "sampled .5, top-k forward", lambda t: compiled(t, forward=sfx.Sampled(0.5)), 97.33
    ),
    "backward": Method("sampled .5, gradients alone", sampled_backward, 97.73),
    "2:4": Method("2:4, made in the product", two_of_four),
    "srste": Method("SR-STE 2:4", srste, 97.73),
    "transposable": Method("4:8 transposable", transposable, 97.67),
    "dst": Method("DST, alpha 5e-4", dst, 97.67),
    "static": Method("static, epsilon 8", static, 97.60),
    "set": Method("SET, epsilon 8", lambda t: evolving(t, SET, until=t.total), 97.33),
    "rigl": Method("RigL, epsilon 8", lambda t: evolving(t, RigL, steps=t.total)),
    "vrpge": Method("VR-PGE, keep .25, fine-tuned", vrpge, 96.73),
    "pfp": Method("PFP, keep .25, as it is", pfp, 95.6),
}
