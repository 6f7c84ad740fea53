"""Networks without their dead channels: parameters, MACs and time beside Torch-Pruning and dense.

    python benchmarks/compact.py [--models conv resnet50 ...] [--ratios .25 .5 .75] [--json FILE]

Of every class of channels that can be removed as one (channels of a stream, neurons, heads) a
random share is zeroed in all tensors. Then the model is compacted, and Torch-Pruning, where it is
installed, removes the same channels by its dependency graph; heads by its functions for single
layers, since its graph doesn't know them. Outputs of all are compared before anything is timed.
"conv" is one 3x3 convolution of 256 channels, 28x28, half of its channels on each side gone.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
from timing import factor, machine, race, show, spread_of, where, write

from sparsefx.compact import CompactPlan, compact_channels
from sparsefx.compact.contractions import contractions
from sparsefx.compact.dead import Search, search_of
from sparsefx.permutation.axes import Axis, factors, leaves, segments
from sparsefx.permutation.propagate import Model, understand

Inputs = dict[str, Tensor]


# --- models


def _conv(batch: int) -> tuple[nn.Module, Inputs]:
    """Three convolutions: the middle one is timed by itself, the outer ones are 1x1 of 4."""
    model = nn.Sequential(nn.Conv2d(4, 256, 1), nn.Conv2d(256, 256, 3, padding=1, bias=False))
    model.append(nn.Conv2d(256, 4, 1))
    return model, {"input": torch.randn(batch, 4, 28, 28)}


def _hugging_face(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    import transformers as t

    ids = {"input_ids": torch.randint(5, 1000, (batch, 128))}
    pixels = {"pixel_values": torch.randn(batch, 3, 224, 224)}
    made: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
        "resnet50": lambda: (t.ResNetForImageClassification(t.ResNetConfig()), pixels),
        "convnext": lambda: (t.ConvNextForImageClassification(t.ConvNextConfig()), pixels),
        "vit": lambda: (t.ViTForImageClassification(t.ViTConfig()), pixels),
        "bert": lambda: (t.BertForSequenceClassification(t.BertConfig()), ids),
        "gpt2": lambda: (t.GPT2LMHeadModel(t.GPT2Config(use_cache=False)), ids),
    }
    return made[name]()


def build(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    model, inputs = _conv(batch) if name == "conv" else _hugging_face(name, batch)
    return model.eval(), inputs


# --- masks


def classes(model: nn.Module, inputs: Inputs) -> tuple[Model, Search, list[Axis]]:
    """Axes that go as one: alone in a dimension, or the outer part of one (heads)."""
    known = understand(model, (), dict(inputs), False, training=False)
    with torch.no_grad():
        search = search_of(known, contractions(known))
    whole = [dim for state in known.states.values() if state.read for dim in state.dims]
    dims = [factors(part) for dim in whole for part in segments(dim)]
    inner = {axis for parts in dims for part in parts[1:] for axis in leaves(part)}
    free = [axis for axis in search.axes if not search.reason(axis) and axis not in inner]
    return known, search, free


def mask(model: nn.Module, inputs: Inputs, ratio: float) -> None:
    """Zero a random share of every class, in all tensors that hold it."""
    known, search, free = classes(model, inputs)
    for axis in free:
        gone = torch.randperm(axis.size)[: int(ratio * axis.size)]
        for state in known.states.values():
            for number, dim in enumerate(state.dims):
                for spot in search.layout.places(dim) if state.read else ():
                    if spot.axis is axis:
                        at = spot.positions[torch.isin(spot.local, gone)]
                        with torch.no_grad():
                            state.tensor.index_fill_(number, at, 0.0)


# --- Torch-Pruning on the same channels


def torch_pruning(
    model: nn.Module, small: nn.Module, plan: CompactPlan, inputs: Inputs
) -> nn.Module:
    """Return a copy of ``model`` without the channels that ``plan`` removed."""
    import torch_pruning as tp

    pruned = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=inputs)
    for one in plan.channels:
        gone = sorted(set(range(one.size)) - set(one.kept))
        layers = [(pruned.get_submodule(n.rpartition(".")[0]), n, d) for n, d in one.tensors]
        writers = [
            layer for layer, n, d in layers
            if isinstance(layer, nn.Linear | nn.Conv2d) and n.endswith("weight") and d == 0
            and getattr(layer, "groups", 1) == 1
        ]  # fmt: skip
        if not writers:
            raise TypeError(f"no layer that it knows writes {one.tensors[0][0]}")
        conv = isinstance(writers[0], nn.Conv2d)
        if len(writers[0].weight) == one.size:
            function = tp.prune_conv_out_channels if conv else tp.prune_linear_out_channels
            graph.get_pruning_group(writers[0], function, idxs=gone).prune()
        else:
            _heads(tp, layers, one.size, gone)
    for path, module in pruned.named_modules():  # sizes that it leaves to the user
        theirs = vars(small.get_submodule(path))
        numbers = {k: v for k, v in theirs.items() if type(v) is int and k in vars(module)}
        vars(module).update(numbers)
    return pruned


def _heads(tp: Any, layers: Sequence[tuple[Any, str, int]], size: int, gone: list[int]) -> None:
    for layer, name, dim in layers:
        if name.endswith("weight"):
            width = layer.weight.shape[dim] // size
            places = [head * width + i for head in gone for i in range(width)]
            function = tp.prune_linear_in_channels if dim else tp.prune_linear_out_channels
            function(layer, idxs=places)


# --- measuring


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def _same(name: str, model: nn.Module, masked: nn.Module, inputs: Inputs) -> None:
    want, got = _logits(masked, inputs), _logits(model, inputs)
    error = float((want - got).abs().max() / want.abs().max())
    if not error <= 1e-4:
        raise SystemExit(f"{name}: outputs differ by {error:.1e} from the masked model's")


def _works(name: str, models: dict[str, nn.Module], inputs: Inputs) -> list[Callable[[], object]]:
    if name != "conv":
        return [lambda m=m: _logits(m, inputs) for m in models.values()]  # type: ignore[misc]
    middles = [m[1] for m in models.values()]  # type: ignore[index]
    batch = len(inputs["input"])
    fed = [(m, torch.randn(batch, m.in_channels, 28, 28)) for m in middles]
    return [lambda m=m, x=x: _bare(m, x) for m, x in fed]  # type: ignore[misc]


def _bare(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def measure(name: str, ratio: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of dense, sparsefx and Torch-Pruning."""
    torch.manual_seed(options.seed)
    model, inputs = build(name, options.batch)
    mask(model, inputs, ratio)
    began = time.perf_counter()
    plan, small = compact_channels(model, (), kwargs=inputs)
    seconds = time.perf_counter() - began
    models, notes = {"masked, dense": model, "sparsefx": small}, {"sparsefx": f"{seconds:.1f} s"}
    try:
        began = time.perf_counter()
        models["Torch-Pruning"] = torch_pruning(model, small, plan, inputs)
        notes["Torch-Pruning"] = f"{time.perf_counter() - began:.1f} s"
        _same("Torch-Pruning", models["Torch-Pruning"], model, inputs)
    except ImportError:
        notes["Torch-Pruning"] = "not installed"
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, SystemExit) as error:
        models.pop("Torch-Pruning", None)
        notes["Torch-Pruning"] = f"fails: {error}".splitlines()[0][:60]
    _same(f"{name} at {ratio}", small, model, inputs)
    times = race(_works(name, models, inputs), options.rounds)
    rows = [
        {"model": name, "ratio": ratio, "method": method, **_sizes(models[method], plan, small),
         **spread_of(own, times[0]), "note": notes.get(method, "")}
        for method, own in zip(models, times, strict=True)
    ]  # fmt: skip
    if "Torch-Pruning" not in models:
        note = notes["Torch-Pruning"]
        rows.append({"model": name, "ratio": ratio, "method": "Torch-Pruning", "note": note})
    return rows


def _sizes(model: nn.Module, plan: CompactPlan, small: nn.Module) -> dict[str, int]:
    parameters = sum(p.numel() for p in model.parameters())
    same = parameters == sum(p.numel() for p in small.parameters())
    return {"parameters": parameters, "macs": plan.macs_after if same else plan.macs_before}


def _line(row: dict[str, Any]) -> list[str]:
    first = [row["model"], f"{row['ratio']:g}", row["method"]]
    if "median" not in row:
        return [*first, "", "", "", "", row["note"]]
    sizes = [f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}"]
    return [*first, *sizes, f"{row['median']:.1f}", factor(row["speedup"]), row["note"]]


NAMES = ("conv", "resnet50", "convnext", "vit", "bert", "gpt2")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compacted networks beside masked ones.")
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    facts = machine("cpu")
    blocks = [measure(name, ratio, options) for name in options.models for ratio in options.ratios]
    headings = ("model", "removed", "method", "M params", "GMACs", "ms", "x dense", "took / why")
    lines = [[_line(row) for row in block] for block in blocks]
    show("Compacted networks", f"batch {options.batch}, {where(facts)}", headings, lines)
    rows = [row for block in blocks for row in block]
    write(options.json, {**facts, "batch": options.batch, "rows": rows})


if __name__ == "__main__":
    main()
