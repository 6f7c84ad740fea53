"""What a report expects products to take."""

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn

import sparsefx as sfx
from sparsefx import NM, Masked, Rule, Sampled, SparseConfig, cost
from sparsefx.plan import Site


def report(*rules, **changes):
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64))
    config = SparseConfig(rules, False, **changes)
    return sfx.explain(model, config=config)(torch.randn(1024, 512, requires_grad=True))


def test_a_table_of_times(monkeypatch):
    monkeypatch.setitem(cost.PACES, ("mm", "cpu"), cost.Pace(5.0, 50.0, 0.05, 10.0))
    assert_text(
        report(Rule("0", Sampled(0.25)), Rule("2", NM(2, 4))).times(),
        """\
layer  role         runs as          dense  expected
0      forward      gathered GEMM  1.54 ms    801 us  1.92x
0      grad_input   gathered GEMM  1.54 ms    572 us  2.69x
0      grad_weight  gathered GEMM  1.54 ms    474 us  3.24x
2      forward      masked dense    247 us    263 us  0.94x
2      grad_input   masked dense    247 us    263 us  0.94x
2      grad_weight  dense           247 us    247 us  1.00x""",
    )


def test_times_of_products_add_up_to_what_decides():
    rows = report(Rule("0", Sampled(0.25)), Rule("2")).sites
    shapes = {"forward": (1024, 256, 512), "grad_input": (1024, 512, 256)}
    shapes["grad_weight"] = 512, 256, 1024
    sites = [Site("", r, "mm", "mm", s, "float32", "cpu", 0) for r, s in shapes.items()]
    pace = cost.pace_of("mm", "cpu")
    sampled = pace.time(cost.sampled_work(sites, Sampled(0.25)))
    dense = pace.time(cost.total(map(cost.dense_work, sites)))
    assert sum(row.predicted_us for row in rows[:3]) == pytest.approx(sampled)
    assert sum(row.predicted_dense_us for row in rows[:3]) == pytest.approx(dense)
    assert all(row.predicted_us == row.predicted_dense_us for row in rows[3:])
    assert rows[0].to_dict()["predicted_us"] == rows[0].predicted_us


def test_a_mask_costs_more_than_none_and_packing_less():
    site = Site("", "forward", "mm", "mm", (1, 512, 512), "float32", "cpu", 0)
    dense = cost.predicted_dense(site)
    assert cost.predicted(site, NM(2, 4), "nm_packed_mm") < dense
    assert cost.predicted(site, NM(2, 4), "nm_mm") > dense
    assert cost.predicted(site, Masked(), "masked_mm") > dense


def test_sizes_that_depend_on_data_have_no_time():
    def chosen_rows(x, w):
        return x[x[:, 0] > 0] @ w

    x, w = torch.randn(6, 8), nn.Parameter(torch.randn(8, 4))
    config = SparseConfig([Rule("*", Sampled(0.5, inference=True))], False)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = sfx.explain(chosen_rows, config=config)(x, w)
    (row,) = found.sites
    assert (row.predicted_us, row.predicted_dense_us, row.note) == (None, None, "")
    assert found.times().splitlines()[1].split()[-2:] == ["?", "?"]
