"""The command line as a whole: help, exit codes, errors of one line, JSON."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sparsefx import cli
from sparsefx.cli import entry
from sparsefx.cli.parser import build_parser
from sparsefx.cli.results import Result

X = ("--input", "float32[4,16]")


@pytest.mark.parametrize("command", ["doctor", "explain", "bench", "export"])
def test_help_has_examples(command: str, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: sparsefx {command}" in shown
    assert f"examples:\n  sparsefx {command}" in shown
    assert "%" not in shown


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in ("doctor", "explain", "bench", "export"))
    assert "exit codes: 0; 1 after a failure" in shown


@pytest.mark.parametrize("line", [
    "explain net.py:build --input float32[4,16] --config 2:4",
    "bench a.b:C --input x=int64[2]:0..5 --input bool[] --rounds 3 --inference --json",
    "export a:b m.onnx --weights coo --sampled exact --no-verify --force --seed 3",
    "--json --debug doctor --quick",
])  # fmt: skip
def test_words_that_are_understood(line: str):
    words = line.split()
    options = build_parser().parse_args(words)
    assert options.json is ("--json" in words)
    assert options.debug is ("--debug" in words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: command; see sparsefx --help"),
        (("frob",), "invalid choice: 'frob'"),
        (("explain",), "arguments are required: model; see sparsefx explain --help"),
        (("explain", "a:b", "--tims"), "unrecognized arguments: --tims"),
        (("bench", "a:b", "--rounds", "x"), "--rounds: invalid int value: 'x'; see sparsefx bench"),
        (("bench", "a:b", "--rounds", "1"), "--rounds 1 must be at least 2"),
        (("bench", "a:b", "--warmup", "0"), "--warmup 0 must be at least 1"),
        (("explain", "a:b"), "the model's inputs are missing: --input float32[4,16], once for"),
        (("explain", "net", *X), "model 'net' must be MODULE:NAME or FILE.py:NAME"),
        (("explain", ":b", *X), "model ':b' must be MODULE:NAME"),
        (("explain", "no.py:b", *X), "model 'no.py:b': there is no file 'no.py'"),
        (("explain", "nowhere.at:b", *X), "there is no module 'nowhere' in"),
        (("explain", "net.at:b", *X), "there is no module 'net.at' in"),
        (("explain", "..net:b", *X), "model '..net:b': '..net' is no module's name"),
        (("explain", "net:biuld", *X), "has no attribute 'biuld'; there are: ready, build, Words"),
        (("explain", "net:number", *X), "model 'net:number' is 'int'; name a torch.nn.Module"),
        (("explain", "net:nothing", *X), "model 'net:nothing': it returned a NoneType, no nn.M"),
        (("explain", "net:build", *X, "--config", "3:4"), "--config '3:4' is neither a preset (2:"),
        (("explain", "net:build", *X, "--config", "no.json"), "--config no.json: can't be read"),
        (("explain", "net:build", *X, "--device", "abacus"), "--device 'abacus' can't be used"),
        (("export", "net:Words", "m.onnx", *X, *X, *X), "--input: the model's forward: too many"),
        (("export", "net:Words", "m.onnx", "--input", "keep=bool[2]"), "missing a required arg"),
        (("export", "net:build", "m.onnx", *X, "--weights", "w"), "weights='w' is not one of"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_code_2(words, message: str, call):
    done = call(*words)
    assert done.code == 2
    assert done.err.startswith("sparsefx: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.out in ("", "building\n")


def test_a_bad_config_file_is_usage_with_its_line(call, folder: Path):
    pytest.importorskip("yaml")
    (folder / "c.yaml").write_text("rules:\n- match: x\n  forward: {kind: nm, n: 5, m: 4}\n")
    done = call("explain", "net:build", *X, "--config", "c.yaml")
    assert done.code == 2
    assert "error: --config c.yaml:3: rules[0].forward.n: NM: n=5 must be between" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("explain", "net:broken", *X), "RuntimeError: no weights (--debug shows where)"),
        (("explain", "net:takes", *X), "TypeError: takes() missing 1 required positional argument"),
        (("explain", "net:build", "--input", "float32[4,17]"), "RuntimeError: mat1 and mat2 shap"),
        (("bench", "net:Frozen", *X), "no output of the model has a gradient, so there is no back"),
        (("export", "net:build", "no/m.onnx", *X), "the folder 'no' doesn't exist; create it"),
    ],
)
def test_a_failure_is_one_line_and_code_1(words, message: str, call):
    done = call(*words)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("sparsefx: error: ")]
    assert message in line
    assert "Traceback" not in done.err


def test_a_module_that_lacks_one_of_its_own_is_a_failure(call, folder: Path):
    (folder / "lacks.py").write_text("import nowhere_at_all")
    done = call("explain", "lacks:build", *X)
    assert done.code == 1
    assert "ModuleNotFoundError: No module named 'nowhere_at_all'" in done.err


def test_debug_shows_the_traceback(call):
    for words in (("--debug", "explain", "net:broken", *X), ("explain", "net", *X, "--debug")):
        done = call(*words)
        assert "Traceback (most recent call last)" in done.err
        assert done.err.splitlines()[-1].startswith("sparsefx: error: ")
        assert "--debug shows" not in done.err


def test_errors_are_objects_under_json(call):
    done = call("--json", "explain", "net:broken", *X)
    assert (done.code, done.data) == (
        1,
        {"error": {"kind": "RuntimeError", "message": "RuntimeError: no weights"}},
    )
    assert call("frob", "--json").data["error"]["kind"] == "UsageError"


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: object) -> Result:
        raise error

    monkeypatch.setattr(entry, "_run", run)


def test_an_interrupt_is_130(call, monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    done = call("doctor")
    assert (done.code, done.err) == (130, "sparsefx: error: interrupted\n")


def test_an_error_without_words_has_its_name(call, monkeypatch):
    raising(monkeypatch, NotImplementedError())
    assert "sparsefx: error: NotImplementedError (--debug" in call("doctor").err


def test_the_script_is_this_main(root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"sparsefx": "sparsefx.cli:main"}
    assert project["optional-dependencies"]["yaml"] == ["pyyaml>=6"]


def test_a_process_of_its_own(root: Path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sparsefx", "doctor", "--quick"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("training works\n")
    assert not done.stderr


def test_a_reader_that_went_away_is_no_traceback(capfd, monkeypatch):
    raising(monkeypatch, BrokenPipeError())
    assert cli.main(["doctor"]) == 1
    print("lost", flush=True)  # goes nowhere: what is left in the buffer can't fail once more
    assert capfd.readouterr() == ("", "")
