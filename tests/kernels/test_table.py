"""kernels/__init__.py: the name it insists on, what it registers, what it imports when."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsefx import kernels, ops


def double_up(x):
    """A launcher for the op that the tests below define."""
    return x + x


@pytest.fixture(scope="module")
def probe():
    """An op of our own with a reference, and a row that overrides it on the CPU."""
    library = torch.library.Library("sparsefx", "FRAGMENT")
    library.define("kernel_table_probe(Tensor x) -> Tensor")
    library.impl("kernel_table_probe", lambda x: x.clone(), "CompositeExplicitAutograd")
    yield kernels.Row("kernel_table_probe", "CPU", f"{__name__}:double_up", "torch", "probe")
    library._destroy()


def test_import_under_another_name_is_refused():
    spec = importlib.util.spec_from_file_location("kernels", Path(kernels.__file__))
    with pytest.raises(ImportError, match="was imported as 'kernels'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("row", kernels.TABLE, ids=lambda row: f"{row.op}-{row.key}")
def test_target_exists(row):
    module, function = row.target.split(":")
    launcher = getattr(importlib.import_module(module), function)
    schema = getattr(ops, row.op)._schema
    names = [argument.name for argument in schema.arguments]
    assert list(inspect.signature(launcher).parameters) == names
    assert kernels.kernel_for(row.op, row.key.lower()) == row.name


def test_one_row_for_an_op_and_key():
    assert len({(row.op, row.key) for row in kernels.TABLE}) == len(kernels.TABLE)


def test_reference_serves_where_no_row_does(monkeypatch):
    assert kernels.kernel_for("nm_mm", "cpu") is None
    assert kernels.kernel_for("no_such_op", "cuda") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # triton isn't installed
    assert kernels.kernel_for("nm_mm", "cuda") is None


def test_row_overrides_the_reference_once(probe, monkeypatch):
    op, x = torch.ops.sparsefx.kernel_table_probe, torch.tensor([3.0])
    monkeypatch.setattr(kernels, "TABLE", (probe._replace(needs="no_such_package"),))
    kernels.register()
    assert op(x).item() == 3  # left out: the package is missing
    monkeypatch.setattr(kernels, "TABLE", (probe,))
    kernels.register()
    kernels.register()
    assert op(x).item() == 6


def test_launchers_wait_for_the_first_call():
    code = (
        "import sys, sparsefx.kernels\n"
        "assert not [name for name in sys.modules if name.startswith('sparsefx.kernels.')]"
    )
    root = Path(kernels.__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
