"""str(report): golden text, 120 columns whatever the names, each reason once."""

# ruff: noqa: RUF001  # sizes are written with a multiplication sign

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn

import sparsefx as sfx
from sparsefx import NM, Rule, Sampled, SparseConfig
from sparsefx.report.table import number, share, shorten


def test_text():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    rule = Rule("*", forward=NM(2, 4), grad_weight=Sampled(0.5))
    report = sfx.explain(model, config=SparseConfig(rules=[rule]))(torch.randn(8, 16))
    assert_text(
        str(report),
        """\
layer  role         M×N×K    dtype    decision     runs as               FLOPs
──────────────────────────────────────────────────────────────────────────────
0      forward      8×32×16  float32  2:4          masked dense   8.19K → 4.1K
       grad_weight  16×32×8  float32  sampled 0.5  gathered GEMM  8.19K → 4.1K
2      forward      8×8×32   float32  dense [1]    dense                  4.1K
       grad_input   8×32×8   float32  dense [1]    dense                  4.1K
       grad_weight  32×8×8   float32  dense [1]    dense                  4.1K

why dense:
  [1] feeds the model's output (keep_output_dense=True) (3 products)

totals                  dense  sparse        executed
FLOPs, forward          12.3K   8.19K   67%     12.3K
FLOPs, grad_input        4.1K    4.1K  100%      4.1K
FLOPs, grad_weight      12.3K   8.19K   67%     8.19K
FLOPs, all              28.7K   20.5K   71%     24.6K
weight bytes, packed    3.07K   2.11K   69%
saved activation bytes  1.02K   1.02K  100%

legend:
  FLOPs: of the full product, then what the pattern leaves
  masked dense: the full product runs with a masked operand: right, but no faster
  gathered: the sampled rows and columns are copied together, and a smaller dense product runs""",
    )
    assert repr(report) == "<sparsefx Report: 2 of 5 products sparse, 1 graph>"


class Deep(nn.Module):
    """Layers with names of any length, repeated."""

    def __init__(self, name: str, depth: int) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"{name}_{i}", nn.Linear(64, 64))

    def forward(self, x):
        for layer in self.children():
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("name", ["a", "a_layer_with_quite_a_name_" * 6])
def test_no_line_is_wider_than_120(name):
    rule = Rule("*", forward=NM(10, 20), grad_input=Sampled(0.123456, scores="weight"))
    rules = [rule, Rule("*", forward=NM(2, 4, transposable=True))]
    report = sfx.explain(Deep(name, 3), config=SparseConfig(rules=rules))(torch.randn(8, 64))
    text = str(report)
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text
    for i in range(3):  # both ends of a long name are kept
        assert sum(line.startswith(name[:3]) and f"{name[-3:]}_{i} " in line
                   for line in text.splitlines()) == 1  # fmt: skip


def test_long_reasons_stand_once_below_the_table():
    report = sfx.explain(Deep("fc", 4), config=SparseConfig(rules=[]))(torch.randn(2, 64))
    assert str(report).count("no rule matches") == 1
    assert "  [1] no rule matches (11 products)" in str(report).splitlines()


def test_failures_are_told():
    def breaks(gm):
        raise KeyError("nothing here")

    cfg = SparseConfig(rules=[Rule("*", forward=NM(2, 4))], passes=[breaks])
    with pytest.warns(sfx.SparsefxWarning, match="nothing here"):
        report = sfx.explain(Deep("fc", 2), config=cfg)(torch.randn(4, 64))
    (failure,) = report.failures
    assert failure.startswith("breaks failed: KeyError: 'nothing here'")
    assert "failures:\n  breaks failed: KeyError: 'nothing here'" in str(report)
    assert report.to_dict()["failures"] == list(report.failures)


def test_nothing_to_list():
    report = sfx.explain(lambda x: x + 1)(torch.randn(3))
    assert str(report) == "<sparsefx Report: 0 of 0 products sparse, 1 graph>: nothing to list"


def test_text_prints_no_graph(monkeypatch):
    report = sfx.explain(Deep("fc", 2), config="2:4")(torch.randn(4, 64))
    monkeypatch.setattr("sparsefx.report.graphs.format_graph", lambda gm: pytest.fail("printed"))
    assert "fc_0" in str(report)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1K"), (1234, "1.23K"), (999_600, "1M"),
     (6.5e9, "6.5G"), (2e15, "2P"), (None, "?")],
)  # fmt: skip
def test_number(count, text):
    assert number(count) == text


def test_share():
    assert (share(1, 3), share(1, 0)) == ("33%", "")


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [("abcdef", 6, "abcdef"), ("abcdefg", 6, "abc…fg"), ("abcdefgh", 5, "ab…gh")],
)
def test_shorten(text, width, short):
    assert shorten(text, width) == short
    assert len(short) <= width
