"""The example's modules, and tiny files in the formats that it reads."""

import gzip
import importlib
import pickle
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

MODULES = ("formats", "cifar", "images", "networks", "training", "digits")


@pytest.fixture(scope="session")
def kit(root: Path):
    """The modules of the example, which `python examples/recipes` finds beside each other."""
    before = sys.path[:]
    sys.path.insert(0, str(root / "examples" / "recipes"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path[:] = before
        for name in MODULES:
            del sys.modules[name]


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    """IDX as its description says: big-endian magic number and sizes, then the bytes."""
    magic = 0x800 + array.ndim if magic is None else magic
    sizes = b"".join(n.to_bytes(4) for n in array.shape)
    return magic.to_bytes(4) + sizes + array.astype(np.uint8).tobytes()


def mnist(folder: Path, zipped: bool = False, **instead: bytes) -> dict[str, np.ndarray]:
    """Write four tiny files; ``instead`` replaces the content of some, by the key below."""
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.integers(0, 256, (30, 28, 28)),
        "train_y": np.arange(30) % 10,
        "test_x": rng.integers(0, 256, (10, 28, 28)),
        "test_y": np.arange(10),
    }
    names = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    folder.mkdir(parents=True, exist_ok=True)
    for (key, array), name in zip(arrays.items(), names, strict=True):
        content = instead.get(key, idx(array))
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return arrays


def batch(count: int = 4, seed: int = 0, labels: str = "labels", classes: int = 10) -> dict:
    rng = np.random.default_rng(seed)
    return {
        b"batch_label": b"a batch",
        labels.encode(): [int(y) for y in rng.integers(0, classes, count)],
        b"data": rng.integers(0, 256, (count, 3072)).astype(np.uint8),
        b"filenames": [b"x.png"] * count,
    }


def cifar10(folder: Path, protocol: int = 2) -> list[dict]:
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    folder.mkdir(parents=True, exist_ok=True)
    batches = [batch(seed=seed) for seed in range(6)]
    for name, content in zip(names, batches, strict=True):
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    return batches


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        tar.add(folder, folder.name)


@pytest.fixture
def files():
    """The functions above."""
    return SimpleNamespace(idx=idx, mnist=mnist, batch=batch, cifar10=cifar10, pack=pack)
