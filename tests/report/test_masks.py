"""What a report says of stored masks and of weights that hold zeros: text, rows, plain data."""

# ruff: noqa: RUF001  # sizes are written with a multiplication sign

import json
from collections import OrderedDict

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn.utils import prune

import sparsefx as sfx
from sparsefx import NM, Masked, Rule, SparseConfig, masks


def model():
    """A scattered mask, a 2:4 one, a transposable one, zeros without a mask, the output."""
    torch.manual_seed(0)
    names = ("mixed", "rows", "tiles", "plain", "out")
    layers = nn.Sequential(OrderedDict((name, nn.Linear(16, 16)) for name in names))
    prune.random_unstructured(layers.mixed, "weight", 0.75)
    prune.custom_from_mask(layers.rows, "weight", masks.nm_mask(layers.rows.weight, 2, 4, 1))
    tiles = masks.transposable_mask(layers.tiles.weight, 1, 4)
    prune.custom_from_mask(layers.tiles, "weight", tiles)
    with torch.no_grad():
        layers.plain.weight.mul_(masks.nm_mask(layers.plain.weight, 2, 4, 1))
    return layers


@pytest.fixture(scope="module")
def report():
    rules = [Rule("tiles", Masked()), Rule("plain", Masked()), Rule("*", NM(2, 4, decay=2e-4))]
    return sfx.explain(model(), config=SparseConfig(rules=rules))(torch.randn(8, 16))


def test_text(report):
    assert_text(
        str(report),
        """\
layer  role         M×N×K    dtype    decision                            runs as              FLOPs
────────────────────────────────────────────────────────────────────────────────────────────────────
mixed  forward      8×16×16  float32  stored mask 25%                     masked dense  4.1K → 1.02K
       grad_weight  16×16×8  float32  dense [1]                           dense                 4.1K
rows   forward      8×16×16  float32  stored mask 2:4                     masked dense  4.1K → 2.05K
       grad_input   8×16×16  float32  stored mask 2:4 (fwd)               masked dense  4.1K → 2.05K
       grad_weight  16×16×8  float32  dense [1]                           dense                 4.1K
tiles  forward      8×16×16  float32  stored mask 1:4 transposable        masked dense  4.1K → 1.02K
       grad_input   8×16×16  float32  stored mask 1:4 transposable (fwd)  masked dense  4.1K → 1.02K
       grad_weight  16×16×8  float32  dense [1]                           dense                 4.1K
plain  forward      8×16×16  float32  dense [2]                           dense                 4.1K
       grad_input   8×16×16  float32  dense [3]                           dense                 4.1K
       grad_weight  16×16×8  float32  dense [3]                           dense                 4.1K
out    forward      8×16×16  float32  dense [4]                           dense                 4.1K
       grad_input   8×16×16  float32  dense [4]                           dense                 4.1K
       grad_weight  16×16×8  float32  dense [4]                           dense                 4.1K

why dense:
  [1] the gradient that the model gives its masked weight, masked or straight-through (3 products)
  [2] no stored mask was found in the graph (1 product)
  [3] the derivative of a dense forward (2 products)
  [4] feeds the model's output (keep_output_dense=True) (3 products)

notes:
  mixed, rows: the rule's 2:4 (decay=0.0002) does not act on a weight with a stored mask
  plain: holds 2:4 zeros; nothing is changed by that

totals                  dense  sparse        executed
FLOPs, forward          20.5K   12.3K   60%     20.5K
FLOPs, grad_input       16.4K   11.3K   69%     16.4K
FLOPs, grad_weight      20.5K   20.5K  100%     20.5K
FLOPs, all              57.3K     44K   77%     57.3K
weight bytes, packed    5.12K   3.17K   62%
saved activation bytes   4.1K    4.1K  100%

legend:
  FLOPs: of the full product, then what the pattern leaves
  masked dense: the full product runs with a masked operand: right, but no faster
  stored mask: the model's own, with what it was when this was compiled; its values may change
  (fwd): follows the forward's pattern""",
    )


def test_why(report):
    assert report.why("rows") == [
        "rows forward: stored mask 2:4 "
        "(the rule's 2:4 (decay=0.0002) does not act on a weight with a stored mask)",
        "rows grad_input: stored mask 2:4",
        "rows grad_weight: dense: the gradient that the model gives its masked weight, masked or "
        "straight-through",
    ]
    assert report.why("plain")[0] == "plain forward: dense: no stored mask was found in the graph"


def test_rows(report):
    rows = {row.layer: row for row in report.sites if row.role == "forward"}
    found = {n: (r.mask, r.mask_pattern, r.mask_density, r.holds) for n, r in rows.items()}
    assert found == {
        "mixed": ("mixed.weight_mask", "", 0.25, ""),
        "rows": ("rows.weight_mask", "2:4", 0.5, ""),
        "tiles": ("tiles.weight_mask", "1:4 transposable", 0.25, ""),
        "plain": ("", "", None, "2:4"),
        "out": ("", "", None, ""),
    }
    mixed = rows["mixed"]
    assert mixed.decision == Masked()
    assert mixed.weight == "mixed.weight_orig"
    assert (mixed.lowering, mixed.sparse_op) == ("masked dense", "masked_mm")
    assert mixed.flops_sparse * 4 == mixed.flops_dense == mixed.flops_executed


def test_plain_data(report):
    data = json.loads(json.dumps(report.to_dict()))
    row = next(r for r in data["sites"] if r["layer"] == "tiles")
    assert row["decision"] == {"kind": "Masked", "text": "stored mask"}
    kept = {"mask": "tiles.weight_mask", "mask_pattern": "1:4 transposable", "mask_density": 0.25}
    assert {key: row[key] for key in kept} == kept
    assert (row["holds"], row["note"]) == ("", "")


def test_a_mask_without_values_has_no_share():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x, mask):
            return nn.functional.linear(x, self.fc.weight * mask)

    report = sfx.explain(Given())(torch.randn(8, 16), torch.rand(16, 16))
    row = report.sites[0]
    assert (row.decided, row.flops_sparse) == ("stored mask", row.flops_dense)
    assert "fc     forward      8×16×16  float32  stored mask" in str(report)


def test_a_compiled_model_is_told_alike():
    layers, x = model(), torch.randn(8, 16)
    config = SparseConfig(rules=[], codegen="aot_eager")
    compiled = torch.compile(layers, backend="sparsefx", options={"config": config})
    compiled(x).sum().backward()
    told, asked = sfx.explain(compiled).sites, sfx.explain(layers, config=config)(x).sites
    assert [r.to_dict() for r in told] == [r.to_dict() for r in asked]
    assert sum(r.decision == Masked() for r in told) == 5  # the first layer has no grad_input


def test_notes_about_many_layers_keep_the_width():
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)), nn.Linear(8, 4))
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(masks.nm_mask(layer.weight, 1, 4, 1))
    text = str(sfx.explain(layers, config=SparseConfig(rules=[]))(torch.randn(2, 8)))
    assert "  0 and 40 more: holds 1:4 zeros; nothing is changed by that" in text.splitlines()
    assert max(map(len, text.splitlines())) <= 120
