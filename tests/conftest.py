"""What every test starts from: a seed, an empty Dynamo, one thread, a fresh compile cache."""

import gc
import importlib.machinery
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import types
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("sparsefx", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("sparsefx")
else:  # a GPU machine may lack it: tests that draw are skipped, the others of their files run

    def _given(*drawn: object, **named: object) -> Callable[[Any], Any]:
        def skipped(test: Any) -> Any:
            names = [name for name in inspect.signature(test).parameters if name not in named]
            kept = names[: len(names) - len(drawn)]  # fixtures, and what other marks fill

            def draws(**_: object) -> None:
                pass

            draws.__dict__.update(test.__dict__)
            one = inspect.Parameter
            shown = inspect.Signature([one(name, one.KEYWORD_ONLY) for name in kept])
            vars(draws)["__signature__"] = shown
            return pytest.mark.skip(reason="draws with hypothesis, which isn't installed")(draws)

        return skipped

    _stand_in: Any = types.ModuleType("hypothesis")
    _stand_in.__spec__ = importlib.machinery.ModuleSpec("hypothesis", None)
    _stand_in.given = _given
    _stand_in.settings = lambda *_, **__: lambda test: test
    _stand_in.strategies = unittest.mock.MagicMock()
    sys.modules["hypothesis"] = _stand_in


def pytest_collection_finish() -> None:
    """Tracing makes many objects that live on: looking for cycles less often saves a tenth."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    # Dynamo times its guards once a compilation, and empties the processor's caches before that
    if guards := sys.modules.get("torch._dynamo.guards"):
        guards.profile_guard_manager = lambda *_: 0.0


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
