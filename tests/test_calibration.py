"""What is measured on a device: files, what is wrong with them, and who goes by them."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparsefx as sfx
from sparsefx import ConfigError, Sampled, SparseConfig, SparsefxWarning, calibration, cost
from sparsefx.backend import cache_identity
from sparsefx.capture import record_graphs
from sparsefx.cost import calibrated
from sparsefx.plan import Site

PACE = cost.Pace(5.0, 50.0, 0.05, 10.0)
CONV = cost.Pace(7.0, 70.0, 0.05, 12.0)
TIMES = cost.Measured("mm", "float32", "linear 4x8x8", "forward", 0.5, 100.0, 80.0, 110.0, 60.0)


def made(device="cpu", **changes):
    fits = {("mm", "float32"): cost.Fit(PACE, 200.0), ("conv", "float32"): cost.Fit(CONV, 500.0)}
    name = calibrated.device_name(device)
    known = cost.Calibration(device, name, fits, (TIMES,), "2.13.0", "inductor")
    return replace(known, **changes)


@pytest.fixture(autouse=True)
def forgotten():
    """Every test is told anew of what is wrong."""
    calibrated._read.cache_clear()
    calibrated._warn_once.cache_clear()


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Put a calibration, or any text, where it is found."""
    path = tmp_path / "here.json"

    def put(content):
        monkeypatch.setenv("SPARSEFX_CALIBRATION", str(path))
        path.write_text(content if isinstance(content, str) else json.dumps(content.to_dict()))
        calibrated._read.cache_clear()
        return path

    return put


# --- files


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = made().save(tmp_path / "new" / "folder" / "cpu.json")
    assert cost.Calibration.load(path) == made()
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]
    assert json.loads(path.read_text())["version"] == 1


def test_it_prints_what_was_predicted_beside_what_was_measured():
    assert str(made(name="cpu x")) == (
        "calibration of cpu x, torch 2.13.0, inductor\n"
        "  conv float32: us flops 7, moved 70, ranked 0.05, calls 12; 500 us a step\n"
        "  mm float32: us flops 5, moved 50, ranked 0.05, calls 10; 200 us a step\n"
        "layer                              sampled      ratio   dense us  predicted  sparse us"
        "  predicted\n"
        "linear 4x8x8                       forward        0.5      100.0      110.0       80.0"
        "       60.0\n"
        "worst error 25%: linear 4x8x8, forward 0.5"
    )


WRONG = [
    ({"version": 2}, "calibration: version=2, this sparsefx reads 1; run sparsefx.calibrate()"),
    ({"name": 3}, "calibration: name=3 must be a string"),
    ({"paces": 3}, "calibration: paces=3 must be a list of dicts"),
    ({"paces": [{"kind": "bmm", "dtype": "float32"}]}, "paces of kind='bmm', dtype='float32': a k"),
    (
        {"paces": [{"kind": "mm", "dtype": "float32", "flops": -1}]},
        "calibration: flops=-1 must be a number of at least 0",
    ),
    ({"measured": [{"kind": "mm"}]}, "calibration: dtype=None must be a string"),
]


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_what_is_wrong_in_a_file_is_told_with_its_name(change, said, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**made().to_dict(), **change}))
    with pytest.raises(ConfigError) as raised:
        cost.Calibration.load(path)
    assert str(path) in str(raised.value)
    assert said in str(raised.value)


# --- who goes by them


def test_measured_paces_take_the_place_of_those_built_in(use):
    assert cost.pace_of("mm", "cpu") == cost.PACES["mm", "cpu"]
    use(made())
    assert cost.pace_of("mm", "cpu") == cost.pace_of("bmm", "cpu", "bfloat16") == PACE
    assert cost.table("cpu")["conv", "cpu", "float16"] == CONV
    assert cost.pace_of("mm", "cuda") == cost.PACES["mm", "cuda"]
    half = cost.Fit(replace(PACE, flops=1.0), 0.0)
    use(made(fits={("mm", "bfloat16"): half}))
    assert cost.pace_of("mm", "cpu", "bfloat16") == half.pace
    assert cost.pace_of("mm", "cpu", "float32") == cost.PACES["mm", "cpu"]


def test_decisions_follow(use):
    shapes = {"forward": (512, 512, 512), "grad_input": (512, 512, 512)}
    sites = [Site("", r, "mm", "mm", s, "float32", "cpu", 0) for r, s in shapes.items()]
    assert cost.unprofitable(sites, Sampled(0.3)) == ""
    slow = cost.Fit(replace(PACE, calls=1e6), 0.0)
    use(made(fits={("mm", "float32"): slow}))
    assert "not profitable at 512 rows" in cost.unprofitable(sites, Sampled(0.3))


def test_a_broken_file_is_told_of_once_and_ignored(use):
    path = use("{")
    with pytest.warns(SparsefxWarning) as told:
        found = [cost.pace_of("mm", "cpu") for _ in range(3)]
    assert found == [cost.PACES["mm", "cpu"]] * 3
    (only,) = told
    assert str(only.message).startswith(f"sparsefx: calibration ignored: {path}: Expecting")


def test_so_are_a_missing_one_and_another_machine_s(use, monkeypatch):
    path = use(made(name="cpu of old"))
    with pytest.warns(SparsefxWarning, match="is of 'cpu of old', this is 'cpu "):
        assert cost.pace_of("mm", "cpu") == cost.PACES["mm", "cpu"]
    path.unlink()
    with pytest.warns(SparsefxWarning, match="SPARSEFX_CALIBRATION names it"):
        assert cost.digest().strip() == ""


def test_the_user_s_cache_is_looked_into_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPARSEFX_CALIBRATION")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cost.pace_of("mm", "cpu") == cost.PACES["mm", "cpu"]
    path = made().save(calibrated.default_path("cpu"))
    assert tmp_path in path.parents
    assert cost.pace_of("mm", "cpu") == PACE
    monkeypatch.setenv("SPARSEFX_CALIBRATION", "")
    assert cost.pace_of("mm", "cpu") == cost.PACES["mm", "cpu"]


def test_another_calibration_is_another_key(use):
    config = SparseConfig(select="profitable")
    (record,) = record_graphs(nn.Linear(8, 4), config, (torch.randn(3, 8),), {})

    def key():
        return cache_identity(record, {})

    use(made())
    first = key()
    use(made(measured=()))  # the same paces: the same decisions
    assert key() == first
    use(made(fits={("mm", "float32"): cost.Fit(replace(PACE, calls=11.0), 200.0)}))
    assert key() != first


# --- measuring


def test_layers_are_what_the_passes_find():
    for layer in (calibration.Layer(6, 4, 10), calibration.Layer(2, 6, 8, 5, 3)):
        module, x = layer.make()
        config = SparseConfig([sfx.Rule("*")], False)
        rows = sfx.explain(module, config=config)(x.requires_grad_()).sites
        sites = layer.sites("float32", "cpu")
        assert {row.role: row.shape for row in rows} == {r: s.shape for r, s in sites.items()}
        assert {row.flops_dense for row in rows} == set(map(cost.dense_flops, sites.values()))


@pytest.fixture
def small(monkeypatch):
    two = calibration.Layer(16, 8, 16), calibration.Layer(2, 4, 4, 6, 3)
    monkeypatch.setattr(calibration, "QUICK", two)
    monkeypatch.setattr(calibration, "_ASKED", calibration._ASKED[1:])
    monkeypatch.setattr(calibration, "_MOST_SPREAD", 1e9)
    monkeypatch.setattr(calibration, "_MOST_OFF", 1e9)


def test_a_sweep_is_measured_fitted_and_found_again(small, tmp_path, monkeypatch):
    state = torch.get_rng_state()
    path = tmp_path / "measured.json"
    monkeypatch.setenv("SPARSEFX_CALIBRATION", str(path))
    found = sfx.calibrate(quick=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(one.layer, one.role) for one in found.measured[:2]] == [
        ("linear 16x8x16", "forward"),
        ("linear 16x8x16", "grad_input"),
    ]
    assert set(found.fits) == {("mm", "float32"), ("conv", "float32")}
    assert len(found.measured) == 2 * 3
    assert all(one.dense_us > 0 and one.predicted_us > 0 for one in found.measured)
    assert cost.Calibration.load(path) == found
    assert cost.pace_of("mm", "cpu") == found.fits["mm", "float32"].pace


def test_a_disturbed_measurement_is_told_of_and_not_written():
    assert not calibration._disturbed([1.1, 1.2, 9.0], made())
    with pytest.warns(SparsefxWarning, match=r"took 2\.0 times as long .* off by up to 25%"):
        assert calibration._disturbed([1.0, 2.0, 3.0], made())
    off = made(measured=(replace(TIMES, predicted_us=200.0),))
    with pytest.warns(SparsefxWarning, match="off by up to 150%.* Nothing was written"):
        assert calibration._disturbed([1.0], off)


@pytest.mark.parametrize("device", ["xpu", "cuda"])
def test_devices_that_are_not_here(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is here")
    with pytest.raises(ConfigError, match=f"calibrate: device='{device}' must be 'cpu', or 'cuda'"):
        sfx.calibrate(device)


def test_too_few_times_can_not_be_fitted():
    with pytest.raises(ConfigError, match="fit: 1 samples are too few"):
        cost.fit([cost.Sample(cost.Work(1, 1, 1, 1), cost.Work(1, 1, 1, 1), 1.0, 1.0)])
