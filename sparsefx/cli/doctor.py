"""``sparsefx doctor``: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparsefx import compat
from sparsefx.cli.results import Result
from sparsefx.config import Rule, Sampled, SparseConfig
from sparsefx.errors import KernelError

_MARKS = {"works": "ok", "not needed": "-", "missing": "!", "broken": "x"}
_NO_HEADERS = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"


@dataclass(frozen=True)
class Finding:
    """One part of the installation.

    Attributes:
        part: its name.
        state: "works", "missing", "broken" or "not needed".
        detail: a version, or what went wrong.
        advice: what to do; "" where there is nothing to do.
    """

    part: str
    state: str
    detail: str
    advice: str = ""


def run(options: argparse.Namespace) -> Result:
    """Look at each part, and train a small layer; exit code 1 if that fails."""
    training = try_training("aot_eager" if options.quick else "inductor")
    findings = [
        _python(),
        compiler(options.quick),
        openssl(),
        triton(),
        gpu(),
        semi_structured(),
        *(package(name, extra, not options.quick) for name, extra in _EXTRAS),
        training,
    ]
    works = training.state == "works"
    data = {"command": "doctor", "works": works, "findings": [asdict(f) for f in findings]}
    return Result(_text(findings, works), data, code=0 if works else 1)


def _text(findings: list[Finding], works: bool) -> str:
    lines = []
    for finding in findings:
        mark = _MARKS[finding.state]
        lines.append(f"{mark:<3}{finding.part:<14}{finding.state:<12}{finding.detail}".rstrip())
        if finding.advice:
            lines.append(f"{'':<17}-> {finding.advice}")
    end = "training works" if works else "training with the backend doesn't work"
    return "\n".join([*lines, "", end])


# --- the parts


def _python() -> Finding:
    detail = f"{torch.__version__}, Python {platform.python_version()}, sparsefx {_version()}"
    if "sparsefx" in compat.known_backends():
        return Finding("torch", "works", detail)
    advice = "import sparsefx before torch.compile, or install it: pip install sparsefx"
    return Finding("torch", "broken", f"{detail}: knows no backend called sparsefx", advice)


def _version() -> str:
    import sparsefx

    return sparsefx.__version__


def compiler(quick: bool) -> Finding:
    """Look for a C++ compiler, and unless ``quick`` build something with Inductor's flags."""
    advice = (
        "install a C++ compiler, or name one in CXX; without one, "
        'SparseConfig(codegen="aot_eager") does the same rewriting operator by operator'
    )
    named = os.environ.get("CXX")
    path = next(filter(None, map(shutil.which, [named] if named else ["g++", "clang++"])), None)
    if quick:
        found = Finding("C++ compiler", "works", f"{path} (found, not tried)")
        missing = Finding("C++ compiler", "missing", f"no {named or 'g++ or clang++'}", advice)
        return found if path else missing
    try:
        built = compat.build_cpp('extern "C" int sparsefx_doctor() { return 24; }')
    except KernelError as error:
        return Finding("C++ compiler", "broken" if path else "missing", _first(error), advice)
    answer = built.sparsefx_doctor()
    if answer != 24:
        return Finding("C++ compiler", "broken", f"built code returned {answer}, not 24", advice)
    return Finding("C++ compiler", "works", path or "built a library")


def openssl() -> Finding:
    """Look for the command that Inductor hashes precompiled headers with."""
    path = shutil.which("openssl")
    if path:
        return Finding("openssl", "works", path)
    if os.environ.get(_NO_HEADERS) == "0":
        return Finding("openssl", "not needed", f"{_NO_HEADERS}=0")
    advice = f"install openssl, or export {_NO_HEADERS}=0"
    return Finding("openssl", "missing", "Inductor precompiles headers by its help", advice)


def triton() -> Finding:
    """Look for Triton, which kernels on a GPU are written in."""
    version = _installed("triton")
    if version and torch.cuda.is_available():
        return Finding("triton", "works", f"{version} (installed)")
    if not torch.cuda.is_available():
        return Finding("triton", "not needed", f"{version or 'not installed'}; there is no GPU")
    return Finding("triton", "missing", "not installed", 'pip install "sparsefx[triton]"')


def gpu() -> Finding:
    """Look for a GPU, and compute something on it."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built}, sees no device" if built else "torch is built for CPU"
        return Finding("GPU", "not needed", why)
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        return Finding("GPU", "broken", _first(error), "check the driver with nvidia-smi")
    major, minor = torch.cuda.get_device_capability()
    return Finding("GPU", "works", f"{torch.cuda.get_device_name()}, capability {major}.{minor}")


def semi_structured() -> Finding:
    """Look for what multiplies 2:4 weights on the GPU."""
    if not torch.cuda.is_available():
        return Finding("cuSPARSELt", "not needed", "there is no GPU")
    library = compat.semi_structured_library(torch.device("cuda"))
    if library == "cusparselt":
        return Finding("cuSPARSELt", "works", compat.semi_structured_version())
    advice = "2:4 products run as masked ones; use a torch build whose cuSPARSELt knows this GPU"
    if library:
        return Finding("cuSPARSELt", "missing", f"{library} multiplies 2:4 weights instead")
    return Finding("cuSPARSELt", "missing", "nothing multiplies 2:4 weights on this GPU", advice)


_EXTRAS = (("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("yaml", "yaml"))
_NAMES = {"yaml": "pyyaml"}  # where a package isn't called as its module


def package(module: str, extra: str, tried: bool) -> Finding:
    """Look for an optional package, and import it where ``tried``."""
    name = _NAMES.get(module, module)
    version = _installed(name)
    advice = f'pip install "sparsefx[{extra}]"'
    if not version:
        return Finding(name, "missing", f"optional: the extra {extra!r}", advice)
    if not tried:
        return Finding(name, "works", f"{version} (installed, not imported)")
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(name, "broken", f"{version}: {_first(error)}", advice)
    return Finding(name, "works", version)


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- the whole


def try_training(codegen: str) -> Finding:
    """Compile a small layer with the backend and run it forward and backward, here and on the GPU.

    Args:
        codegen: as for a SparseConfig.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for device in devices:
                _train(codegen, device)
    except (ImportError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        advice = (
            "see the lines above; doctor --quick tells whether it works without Inductor "
            '(SparseConfig(codegen="aot_eager"))'
        )
        return Finding("training", "broken", f"{codegen}: {_first(error)}", advice)
    slower = [w for w in told if w.category.__name__ == "SparsefxWarning"]
    said = f"; {_first(slower[0].message)}" if slower else ""
    return Finding("training", "works", f"{codegen}, on {' and '.join(devices)}{said}")


def _train(codegen: str, device: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(device)
    # operator by operator, too, a mask's CPU kernel would be built: a sampled product needs none
    plain = Rule("*", forward=Sampled(0.5), lowering="reference")
    rules = (plain,) if codegen == "aot_eager" else None
    config = SparseConfig(rules, keep_output_dense=False, strict=True, codegen=codegen)
    options: dict[str, Any] = {"config": config}
    compiled = torch.compile(model, backend="sparsefx", options=options)
    compiled(torch.ones(4, 16, device=device)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.isfinite().all()):
            raise RuntimeError(f"the gradient of {name} is {parameter.grad}")


def _first(error: object) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
