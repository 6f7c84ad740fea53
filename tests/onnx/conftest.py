"""Models that are exported, and how a file is read back: by onnx and onnxruntime alone."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsefx  # noqa: F401  # before its root leaves sys.path

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

_ROOT = str(Path(__file__).parents[2])


@contextmanager
def _without_root() -> Iterator[None]:
    """With the root on sys.path, transformers would take kernels/ for a package of that name."""
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if entry not in ("", ".", _ROOT)]
    try:
        yield
    finally:
        sys.path[:] = path


class Cnn(nn.Module):
    """The batch norm is folded into the first convolution; the head takes three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, stride=2, groups=2)
        self.mix = nn.Linear(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.grouped(torch.relu(self.norm(self.stem(x)))))
        hidden = torch.relu(self.mix(x.flatten(2).transpose(1, 2)))
        return {"scores": self.head(hidden).mean(1), "hidden": hidden}


def mlp() -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24, bias=False), nn.Linear(24, 5)
    return nn.Sequential(*layers), torch.randn(7, 16)


def cnn() -> tuple[nn.Module, Tensor]:
    model = Cnn()
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    nn.init.normal_(model.norm.running_mean)
    return model, torch.randn(2, 8, 9, 9)


def gpt2() -> tuple[nn.Module, Tensor]:
    with _without_root():
        transformers = pytest.importorskip("transformers")
        from transformers.utils.import_utils import is_kernels_available

        is_kernels_available()  # asked later on too; the answer is kept
        config = transformers.GPT2Config(
            vocab_size=48, n_positions=8, n_embd=16, n_layer=1, n_head=2, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config), torch.randint(0, 48, (2, 6))


def resnet() -> tuple[nn.Module, Tensor]:
    with _without_root():
        transformers = pytest.importorskip("transformers")
        from transformers.utils.import_utils import is_kernels_available

        is_kernels_available()
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        )
        return transformers.ResNetModel(config), torch.randn(2, 3, 32, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "gpt2": gpt2,
    "resnet": resnet,
}


@pytest.fixture
def build() -> Callable[[str], tuple[nn.Module, Tensor]]:
    """Return a model by name, with an input."""
    return lambda name: MODELS[name]()


@pytest.fixture
def run_file() -> Callable[..., list[Tensor]]:
    """Run a file in onnxruntime."""

    def run(path: Path, *inputs: Tensor) -> list[Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options)
        names = [entry.name for entry in session.get_inputs()]
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feed)]

    return run


@pytest.fixture
def stored() -> Callable[[Path], dict[str, Tensor]]:
    """Return the tensors in a file, by name."""

    def read(path: Path) -> dict[str, Tensor]:
        proto = onnx.load(str(path))
        return {
            tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            for tensor in proto.graph.initializer
            if tensor.dims
        }

    return read
