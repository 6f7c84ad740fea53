"""Tables, plain data and pictures of rows that were made by hand."""

import json
import math
import sys
from pathlib import Path

import pytest
from expecttest import assert_expected_inline as assert_text

import sparsefx as sfx
from sparsefx.diagnostics import GradientErrors, ProductErrors, Tuning, printing
from sparsefx.diagnostics.meter import GradientError, LayerError
from sparsefx.diagnostics.products import ProductError
from sparsefx.diagnostics.tuning import Tuned
from sparsefx.errors import DiagnosticsError

FIGURES = {
    "norm": 12.0, "mean": -1e-4, "std": 0.25, "max": 3.0, "relative": 0.5, "cosine": 0.875,
    "bias": 0.3, "noise": 0.4,
}  # fmt: skip
NOTHING = dict.fromkeys(FIGURES, 0.0) | {"cosine": 1.0, "norm": 1.5e-7}
WILD = dict.fromkeys(FIGURES, math.inf) | {"cosine": math.nan}


def errors(draws: int = 8) -> GradientErrors:
    return GradientErrors(
        rows=(
            GradientError(**FIGURES, parameter="fc.weight"),
            GradientError(**NOTHING, parameter="fc.bias"),
        ),
        draws=draws,
        total=GradientError(**WILD, parameter="all"),
        isolated=(LayerError(**FIGURES, layer="fc", pattern="sampled 0.5"),),
        loss_exact=1.25,
        loss=1.5,
    )


def tuning(error: float = 0.5, uniform: float | None = 0.6) -> Tuning:
    curve = ((0.5, 1000, 0.25), (1.0, 2000, 0.0))
    rows = (
        Tuned("a", "grad_input", 0.5, 2000, 1000, 0.25, curve),
        Tuned("a", "grad_weight", 1.0, 2000, 2000, 0.0, curve),
    )
    ratio = None if uniform is None else 0.755
    config = sfx.SparseConfig([sfx.Rule("a", grad_weight=sfx.Sampled(0.5))])
    return Tuning(config, rows, 4000, 3000, "scaled", error, ratio, uniform)


def products(layer: str = "fc") -> ProductErrors:
    rows = [
        ProductError(**FIGURES, layer=layer, role="forward", pattern="sampled 0.5", derived=False,
                     flops_dense=10, flops_sparse=5),
        ProductError(**FIGURES, layer=layer, role="grad_input", pattern="sampled 0.5", derived=True,
                     flops_dense=10, flops_sparse=5),
    ]  # fmt: skip
    return ProductErrors(tuple(rows), 1)


def test_gradient_errors():
    assert_text(
        str(errors()),
        """\
gradients against exact ones, 8 draws
parameter     norm  relative  cosine  bias  noise      mean   std  max
──────────────────────────────────────────────────────────────────────
fc.weight       12       0.5   0.875   0.3    0.4  -1.0e-04  0.25    3
fc.bias    1.5e-07         0       1     0      0         0     0    0
all            inf       inf     nan   inf    inf       inf   inf  inf

all gradients, this layer alone changed
layer  decision     norm  relative  cosine  bias  noise      mean   std  max
────────────────────────────────────────────────────────────────────────────
fc     sampled 0.5    12       0.5   0.875   0.3    0.4  -1.0e-04  0.25    3

loss 1.25 exact, 1.5 changed

legend:
  norm: of what is exact; relative: norm of (approximate - exact) over it, root mean square of draws
  mean, std, max: of the entries of (approximate - exact)
  bias: of the mean over draws; an unbiased estimate is left with about noise / sqrt(8)""",
    )


def test_products():
    assert_text(
        str(products()),
        """\
products against exact ones, operands exact
layer  role        decision           norm  relative  cosine  bias  noise      mean   std  max
──────────────────────────────────────────────────────────────────────────────────────────────
fc     forward     sampled 0.5          12       0.5   0.875   0.3    0.4  -1.0e-04  0.25    3
       grad_input  sampled 0.5 (fwd)    12       0.5   0.875   0.3    0.4  -1.0e-04  0.25    3

legend:
  norm: of what is exact; relative: norm of (approximate - exact) over it, root mean square of draws
  mean, std, max: of the entries of (approximate - exact)""",
    )


def test_ratios():
    assert_text(
        str(tuning()),
        """\
ratios under a budget of FLOPs: 75.0% of the tuned products' are left
layer  role         ratio    FLOPs        error of gradients
────────────────────────────────────────────────────────────
a      grad_input     0.5  2K → 1K   50%                0.25
       grad_weight      1  2K → 2K  100%                   0

relative error of all gradients, every layer changed, on this batch:
  these ratios       0.5
  0.755 for all      0.6""",
    )
    assert "one ratio for all is better here" in str(tuning(0.7))
    assert "for all" not in str(tuning(0.7, None))


def test_a_long_name_is_cut_in_its_middle():
    shown = str(products("encoder." * 20 + "fc"))
    assert max(map(len, shown.splitlines())) <= printing.WIDTH
    assert "encoder.enc" in shown
    assert ".fc " in shown
    assert "…" in shown


@pytest.mark.parametrize("made", [errors(), products(), tuning()], ids=lambda m: type(m).__name__)
def test_plain_data(made: GradientErrors | ProductErrors | Tuning):
    read = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert len(read["rows"]) == 2
    if isinstance(made, GradientErrors):
        assert read["total"]["relative"] is None
        assert read["rows"][0]["noise"] == 0.4
        assert read["isolated"][0]["layer"] == "fc"
    if isinstance(made, Tuning):
        assert sfx.SparseConfig.from_dict(read["config"]) == made.config
        assert read["rows"][0]["curve"][0] == {"ratio": 0.5, "flops": 1000, "relative": 0.25}


def test_a_config_without_a_plain_form_is_text():
    own = sfx.SparseConfig([sfx.Rule(lambda site: True)])
    made = Tuning(own, (), 0, 0, "scaled", 0.0, None, None)
    assert "Rule(match=<function" in made.to_dict()["config"]


@pytest.mark.parametrize("made", [errors(), products(), tuning()], ids=lambda m: type(m).__name__)
def test_pictures(made: GradientErrors | ProductErrors | Tuning, tmp_path: Path):
    made.plot(tmp_path / "found.svg")
    made.plot(str(tmp_path / "found.PNG"))
    assert (tmp_path / "found.PNG").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "found.svg").read_text()
    with pytest.raises(DiagnosticsError, match=r"found.gif' must end in .png, .svg, .pdf"):
        made.plot(tmp_path / "found.gif")


def test_many_rows_are_cut_in_a_picture(tmp_path: Path):
    rows = tuple(GradientError(**FIGURES, parameter=f"p{i}") for i in range(200))
    many = GradientErrors(rows, 1, rows[0], (), 0.0, 0.0)
    many.plot(tmp_path / "many.svg")
    assert "the 60 largest of 200" in (tmp_path / "many.svg").read_text()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DiagnosticsError, match=r"needs matplotlib: pip install 'sparsefx\[exa"):
        errors().plot(tmp_path / "found.png")
