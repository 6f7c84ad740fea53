"""A folder with a model in it, as a user has one, and the command line called in this process."""

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparsefx.cli import main

NET = """
    import torch
    from torch import nn

    ready = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    number = 3

    def build():
        print("building")
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(96, 16)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.head = nn.Linear(16, 96)

        def forward(self, ids, keep=None):
            x = self.embed(ids) if keep is None else self.embed(ids) * keep[..., None]
            return {"logits": self.head(self.block(x)), "ids": ids}

    class Holder:
        inner = build

    def nothing():
        return None

    def broken():
        raise RuntimeError("no weights\\nand more")

    def takes(x):
        return x

    class Frozen(nn.Module):
        def forward(self, x):
            return x * 2
    """


@dataclass
class Called:
    """What a call left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, holding net.py; what is imported from it is forgotten again."""
    (tmp_path / "net.py").write_text(textwrap.dedent(NET))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    assert str(tmp_path) not in sys.path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Call the command line with these words, in the folder."""

    def called(*words: str) -> Called:
        code = main(words)
        return Called(code, *capsys.readouterr())

    return called
