"""Sparsifiers on real models: train, save, load in a fresh process, squash; the output stays."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsefx as sfx
from sparsefx import masks, sparsifiers

Make = Callable[[torch.nn.Module], Any]

# Small models have few layers that m divides; each pattern is met by a transformer and a conv net.
MADE: dict[str, str] = {
    "resnet": "sparsifiers.SRSTE(model, 2, 4)",
    "vit": "sparsifiers.TransposableNM(model, 4, 8, refresh=2)",
    "bert": "sparsifiers.SRSTE(model, 1, 4, decay=2e-3)",
    "llama": "sparsifiers.TransposableNM(model, 2, 4, refresh=1, solver='exact')",
    "gpt2": "sparsifiers.TransposableNM(model, 2, 4, static=True)",
}

FRESH = """
import json, sys
from pathlib import Path
import torch, transformers
from sparsefx import masks, sparsifiers

for line in Path(sys.argv[1]).read_text().splitlines():
    case = json.loads(line)
    folder = Path(case["folder"])
    kind = getattr(transformers, case["kind"])
    model = kind(kind.config_class.from_dict(json.loads((folder / "config.json").read_text())))
    sparsifier = eval(case["made"])
    saved = torch.load(folder / "saved.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    model.eval()
    with torch.no_grad():
        loaded = model(**saved["inputs"]).logits
        sparsifier.squash()
        squashed = model(**saved["inputs"]).logits
    assert not any("parametrizations" in key for key in model.state_dict())
    plain = kind(model.config)
    plain.load_state_dict(model.state_dict())
    plain.eval()
    with torch.no_grad():
        dense = plain(**saved["inputs"]).logits
    same = [torch.equal(out, saved["logits"]) for out in (loaded, squashed, dense)]
    print(case["name"], *same)
"""


def _make(text: str, model: torch.nn.Module) -> Any:
    return eval(text, {"sparsifiers": sparsifiers, "model": model})


def _train(model: torch.nn.Module, sparsifier: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
    """Three steps through the compiler, forward and backward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = sfx.SparseConfig(rules=[], codegen="aot_eager")
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        logits = compiled(**inputs).logits.float()
        loss = torch.nn.functional.mse_loss(logits, torch.ones_like(logits))
        loss.backward()
        optimizer.step()
        sparsifier.step()
        losses.append(loss.item())
    rows = sfx.explain(compiled).sites
    kept = {row.layer for row in rows if row.role == "forward" and row.decision is not None}
    assert kept == set(sparsifier.layers), kept.symmetric_difference(sparsifier.layers)
    return losses


@pytest.mark.slow
def test_train_save_load_squash(zoo: Callable[[str], Any], tmp_path: Path) -> None:
    lines = []
    for name, made in MADE.items():
        case, folder = zoo(name), tmp_path / name
        model = case.model
        sparsifier = _make(made, model)
        assert sparsifier.layers, name
        losses = _train(model, sparsifier, case.inputs)
        assert losses[-1] < losses[0], f"{name}: {losses}"
        for layer, mask in sparsifier.masks().items():
            assert not mask.all(), f"{name}: {layer} is dense"
        model.eval()
        with torch.no_grad():
            logits = model(**case.inputs).logits
        folder.mkdir()
        state = {"model": model.state_dict(), "inputs": case.inputs, "logits": logits}
        torch.save(state, folder / "saved.pt")
        (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
        line = {"name": name, "folder": str(folder), "kind": type(model).__name__, "made": made}
        lines.append(json.dumps(line))
    (tmp_path / "cases").write_text("\n".join(lines))
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path / "cases")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{name} True True True" for name in MADE]


@pytest.mark.parametrize("name", ["resnet", "gpt2"])
def test_squashed_weights_hold_the_pattern(zoo: Callable[[str], Any], name: str) -> None:
    model = zoo(name).model
    sparsifier = sparsifiers.TransposableNM(model, 4, 8)
    targets = dict(sparsifier.layers)
    sparsifier.squash()
    modules = dict(model.named_modules())
    assert targets
    for layer in targets:
        weight = modules[layer].weight
        verdict = masks.is_valid(weight, 4, 8, transposable=True)
        assert verdict, f"{layer}: {verdict.reason}"
