"""What other runtimes do with the files that export_onnx writes: prints the table of the README.

    python benchmarks/onnx_runtimes.py

Each form of the same 1:8 network, and a network with sampled products, is given to each runtime.
"Works" is that its outputs equal those of the eager model; for those that only rewrite a file, that
the rewritten file does in onnxruntime.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript
import torch
from onnx.reference import ReferenceEvaluator
from onnxscript import optimizer
from torch import nn

import sparsefx as sfx

FORMS = ("dense", "packed", "coo", "sampled")
_LIMIT = 1 << 30  # bytes: fold whatever can be


def in_onnxruntime(file: Any, x: np.ndarray) -> np.ndarray:
    """Run a path or the bytes of a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def _plain(path: str, x: np.ndarray) -> np.ndarray:
    return in_onnxruntime(path, x)


def _reference(path: str, x: np.ndarray) -> np.ndarray:
    evaluator = ReferenceEvaluator(path)
    return evaluator.run(None, {evaluator.input_names[0]: x})[0]


def _through_ir(path: str, x: np.ndarray) -> np.ndarray:
    model = onnx_ir.to_proto(onnx_ir.load(path))
    return in_onnxruntime(model.SerializeToString(), x)


def _optimized(path: str, x: np.ndarray) -> np.ndarray:
    model = optimizer.optimize(
        onnx.load(path), input_size_limit=_LIMIT, output_size_limit=_LIMIT
    )  # fmt: skip
    return in_onnxruntime(model.SerializeToString(), x)


def _converted(path: str, x: np.ndarray) -> np.ndarray:
    model = onnx.version_converter.convert_version(onnx.load(path), 21)
    return in_onnxruntime(model.SerializeToString(), x)


def _checked(path: str, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(path, full_check=True)
    return in_onnxruntime(path, x)


RUNTIMES: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    f"onnxruntime {onnxruntime.__version__}": _plain,
    f"onnx.reference {onnx.__version__}": _reference,
    f"onnx.checker {onnx.__version__}, full": _checked,
    f"onnx.version_converter {onnx.__version__}, to 21": _converted,
    f"onnx_ir {onnx_ir.__version__}, load and save": _through_ir,
    f"onnxscript {onnxscript.__version__} optimizer": _optimized,
}


def _files(folder: Path) -> tuple[nn.Module, torch.Tensor, dict[str, tuple[str, np.ndarray]]]:
    """Write one file per form; returns (path, what eager gives) by form."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    model, x = nn.Sequential(*layers).eval(), torch.randn(4, 64)
    sparse = sfx.SparseConfig(rules=[sfx.Rule("*", forward=sfx.NM(1, 8))])
    pattern = sfx.Sampled(0.5, inference=True)
    drawn = sfx.SparseConfig(rules=[sfx.Rule("*", forward=pattern)])
    found = {}
    for form in FORMS:
        path = str(folder / f"{form}.onnx")
        config = drawn if form == "sampled" else sparse
        sfx.export_onnx(model, x, path, config, "dense" if form == "sampled" else form)
        options = {"config": {**config.to_dict(), "codegen": "aot_eager"}}
        with torch.no_grad():
            compiled = torch.compile(model, backend="sparsefx", options=options)
            found[form] = path, compiled(x).numpy()
    return model, x, found


def _outcome(run: Callable[[str, np.ndarray], np.ndarray], path: str, x: Any, wanted: Any) -> str:
    try:
        got = run(path, x)
    except Exception as error:  # whatever it is, it is the finding
        lines = str(error).strip().splitlines() or [""]
        return f"fails: {type(error).__name__}: {lines[-1][:70].replace('|', '/')}"
    return "works" if np.allclose(got, wanted, rtol=1e-4, atol=1e-5) else "fails: other results"


def table() -> list[Sequence[str]]:
    """Return rows of (runtime, one outcome per form)."""
    with tempfile.TemporaryDirectory() as folder:
        _, x, found = _files(Path(folder))
        return [
            (name, *(_outcome(run, path, x.numpy(), wanted) for path, wanted in found.values()))
            for name, run in RUNTIMES.items()
        ]


def main() -> None:
    """Print the table as Markdown."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = table()
    print("|", " | ".join(("", *FORMS)), "|")
    print("|" + "---|" * (1 + len(FORMS)))
    for row in rows:
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
