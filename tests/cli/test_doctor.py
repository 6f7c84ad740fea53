"""doctor: each part's states, what it says to do, and when it fails."""

import argparse
import warnings
from typing import Any

import pytest
import torch

from sparsefx import compat
from sparsefx.cli import doctor
from sparsefx.errors import KernelError, SparsefxWarning
from sparsefx.kernels import _native


class Library:
    def __init__(self, answer: int) -> None:
        self.answer = answer

    def sparsefx_doctor(self) -> int:
        return self.answer


def no_command(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda n: None if n in names else f"bin/{n}")
    monkeypatch.delenv("CXX", raising=False)


def test_compiler(monkeypatch):
    no_command(monkeypatch)
    monkeypatch.setattr(compat, "build_cpp", lambda source: Library(24))
    assert doctor.compiler(False) == doctor.Finding("C++ compiler", "works", "bin/g++")
    assert doctor.compiler(True).detail == "bin/g++ (found, not tried)"
    monkeypatch.setattr(compat, "build_cpp", lambda source: Library(7))
    found = doctor.compiler(False)
    assert (found.state, found.detail) == ("broken", "built code returned 7, not 24")


def test_no_compiler(monkeypatch):
    def refuses(source: str) -> Any:
        raise KernelError("C++ can't be built here: no g++\nmore")

    monkeypatch.setattr(compat, "build_cpp", refuses)
    no_command(monkeypatch)
    assert doctor.compiler(False).state == "broken"
    no_command(monkeypatch, "g++", "clang++")
    for quick in (False, True):
        found = doctor.compiler(quick)
        assert found.state == "missing"
        assert "install a C++ compiler, or name one in CXX" in found.advice
    assert doctor.compiler(False).detail == "KernelError: C++ can't be built here: no g++"
    monkeypatch.setenv("CXX", "g++")
    assert doctor.compiler(True).detail == "no g++"


def test_openssl(monkeypatch):
    no_command(monkeypatch)
    assert doctor.openssl().state == "works"
    no_command(monkeypatch, "openssl")
    monkeypatch.delenv(doctor._NO_HEADERS, raising=False)
    assert doctor.openssl().advice.endswith("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS=0")
    monkeypatch.setenv(doctor._NO_HEADERS, "0")
    assert doctor.openssl().state == "not needed"


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = doctor.triton(), doctor.gpu(), doctor.semi_structured()
    assert [found.state for found in parts] == ["not needed"] * 3
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor.gpu().detail == "torch is built for 13.0, sees no device"


def test_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_installed", lambda name: "")
    assert doctor.triton().advice == 'pip install "sparsefx[triton]"'
    monkeypatch.setattr(doctor, "_installed", lambda name: "3.7")
    assert doctor.triton().state == "works"
    monkeypatch.setattr(compat, "semi_structured_version", lambda: "cuSPARSELt 800")
    states = {}
    for library in ("cusparselt", "cutlass", ""):
        monkeypatch.setattr(compat, "semi_structured_library", lambda device, it=library: it)
        states[library] = doctor.semi_structured()
    assert states["cusparselt"].detail == "cuSPARSELt 800"
    assert states["cutlass"].detail == "cutlass multiplies 2:4 weights instead"
    assert "run as masked ones" in states[""].advice


def test_a_broken_gpu(monkeypatch):
    def fails(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("driver too old\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch, "ones", fails)
    found = doctor.gpu()
    assert (found.state, found.detail) == ("broken", "RuntimeError: driver too old")


def test_packages(monkeypatch):
    assert doctor.package("torch", "x", True).detail == doctor._installed("torch")
    assert doctor.package("torch", "x", False).detail.endswith("(installed, not imported)")
    found = doctor.package("no_such_module", "onnx", True)
    assert (found.state, found.advice) == ("missing", 'pip install "sparsefx[onnx]"')
    monkeypatch.setattr(doctor, "_installed", lambda name: f"{name} 1")
    found = doctor.package("no_such_module", "onnx", True)
    assert (found.state, found.part) == ("broken", "no_such_module")
    assert found.detail == "no_such_module 1: ModuleNotFoundError: No module named 'no_such_module'"
    assert doctor.package("yaml", "yaml", False).detail.startswith("pyyaml 1")


def test_an_unknown_backend(monkeypatch):
    monkeypatch.setattr(compat, "known_backends", lambda: ["inductor"])
    found = doctor._python()
    assert found.state == "broken"
    assert "knows no backend called sparsefx" in found.detail


@pytest.mark.parametrize("error", [RuntimeError("no\nmore"), OSError("no"), ImportError("no")])
def test_training_that_fails(error: Exception, monkeypatch, capsys):
    def fails(codegen: str, device: str) -> None:
        raise error

    monkeypatch.setattr(doctor, "_train", fails)
    found = doctor.try_training("aot_eager")
    assert (found.state, found.detail) == ("broken", f"aot_eager: {type(error).__name__}: no")
    result = doctor.run(argparse.Namespace(quick=True))
    assert result.code == 1
    assert not result.data["works"]
    assert result.text.endswith("training with the backend doesn't work")
    assert "-> see the lines above" in result.text


def test_training_that_is_slower_says_so(monkeypatch):
    def warns(codegen: str, device: str) -> None:
        warnings.warn("CPU kernels run as torch operators", SparsefxWarning, stacklevel=1)

    monkeypatch.setattr(doctor, "_train", warns)
    found = doctor.try_training("inductor")
    assert found.state == "works"
    assert "SparsefxWarning: CPU kernels run as torch operators" in found.detail


def test_the_object(call, monkeypatch):
    def refuses(source: str) -> Any:
        raise AssertionError("--quick builds nothing")

    monkeypatch.setattr(compat, "build_cpp", refuses)
    monkeypatch.setattr(_native, "build_cpp", refuses)
    done = call("doctor", "--quick", "--json")
    assert done.code == 0
    assert done.data["works"]
    parts = {finding["part"]: finding for finding in done.data["findings"]}
    assert {"torch", "C++ compiler", "openssl", "triton", "GPU", "cuSPARSELt"} <= parts.keys()
    assert {"onnx", "onnxscript", "onnxruntime", "pyyaml", "training"} <= parts.keys()
    assert all(finding["advice"] for finding in parts.values() if finding["state"] == "broken")
