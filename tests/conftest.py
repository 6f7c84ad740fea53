"""What every test starts from: a seed, an empty Dynamo, one thread, a fresh compile cache."""

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

UNDER_XDIST = "PYTEST_XDIST_WORKER" in os.environ

os.environ["SPARSEFX_CALIBRATION"] = ""  # what was measured on this machine changes no test

# All of this is read when torch or Triton is imported, so it is set before either is. Workers and
# the processes that tests start inherit it.
if not UNDER_XDIST:  # one cache for all workers of a run, none of it from an earlier run
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="sparsefx-tests-")
else:  # the workers share the cores: no thread pools, no pools of compile processes
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch  # noqa: E402

if UNDER_XDIST:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec(
    "hypothesis"
):  # a GPU machine may lack it, and its kernel tests don't need it
    import hypothesis

    hypothesis.settings.register_profile("sparsefx", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("sparsefx")


def pytest_collection_finish() -> None:
    """Tracing makes many objects that live on: looking for cycles less often saves a tenth."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_unconfigure() -> None:
    if not UNDER_XDIST:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # importing it only to reset it would cost seconds
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).parents[1]
