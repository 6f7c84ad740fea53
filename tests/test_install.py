"""The wheel and the sdist: what is in them, and that torch finds the backend once installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

FOUND_WITHOUT_AN_IMPORT = """
    import sys
    import torch
    assert "sparsefx" in torch._dynamo.list_backends()
    assert "sparsefx" not in sys.modules
    """

COMPILES = """
    import sys
    from importlib.metadata import distribution
    import torch
    linear = torch.nn.Linear(8, 4)
    compiled = torch.compile(
        linear, backend="sparsefx", options={"config": {"codegen": "aot_eager"}}
    )
    x = torch.randn(3, 8)
    y = compiled(x)
    y.sum().backward()
    assert y.shape == (3, 4) and linear.weight.grad is not None
    import sparsefx, sparsefx.kernels, sparsefx.passes
    places = [m.__file__ for m in (sparsefx, sparsefx.kernels, sparsefx.passes)]
    places.append(str(distribution("sparsefx").locate_file("")))
    assert all(p.startswith(sys.prefix) for p in places), places
    """


def run(*command: str | Path, cwd: Path) -> None:
    """Run it away from the checkout; a failure shows all that it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    base = tmp_path_factory.mktemp("build")
    source, out = base / "source", base / "out"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(root, source, symlinks=True, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=base)
    return out


def names_in(built: Path, kind: str) -> set[str]:
    """Archive members, without the folder that an sdist puts around them."""
    (archive,) = built.glob(f"*{kind}")
    if kind == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".whl", ".tar.gz"])
def test_contents(kind: str, built: Path, root: Path):
    names = names_in(built, kind)
    sources = {f"sparsefx/{path.relative_to(root / 'sparsefx')}" for path in sources_under(root)}
    assert {"sparsefx/py.typed", "sparsefx/passes/__init__.py"} <= sources
    assert sources <= names, f"left out: {sorted(sources - names)}"
    assert not {name.split("/")[0] for name in names} & {"passes", "kernels", "tests"}


def sources_under(root: Path) -> list[Path]:
    """Every file that must ship, reached as it is imported: through sparsefx and its two links."""
    folders = [root / "sparsefx", root / "sparsefx/passes", root / "sparsefx/kernels"]
    found = (path for folder in folders for path in folder.rglob("*"))
    return [p for p in found if p.suffix in {".py", ".cpp", ".h", ".md"} or p.name == "py.typed"]


@pytest.mark.slow
def test_installed_in_an_empty_venv(built: Path, tmp_path: Path):
    (archive,) = built.glob("*.tar.gz")  # pip builds the wheel from it
    place = tmp_path / "venv"
    venv.create(place, symlinks=True)
    site = sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)})
    # torch and setuptools come from here. A path line comes after the venv's own folder, and the
    # checkout's editable install stays unseen, since .pth files behind such a line are not read.
    (Path(site) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = place / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    flags = ["--no-deps", "--no-build-isolation", "--ignore-installed"]
    run(*pip, *flags, archive, cwd=tmp_path)
    for script in (FOUND_WITHOUT_AN_IMPORT, COMPILES):
        run(python, "-c", textwrap.dedent(script), cwd=tmp_path)
