"""Every example runs as a reader would run it, and says what it promises to say."""

import json
import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest


def run(root: Path, name: str, *arguments: str) -> str:
    """Run an example in a process of its own; return what it printed."""
    done = start(root, name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


SEVERAL = """
import json, runpy, sys
script, *rest = sys.argv[1:]
for line in rest:
    sys.argv = [script, *json.loads(line)]
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    print("RETURNED", code, file=sys.stderr)
"""


def several(root: Path, name: str, *runs: tuple[str, ...]) -> list[tuple[int, str]]:
    """Run an example several times in one process, since its imports take longer than it does.

    Returns what each run returned and what it said on stderr.
    """
    done = call(["-c", SEVERAL, str(root / "examples" / name), *map(json.dumps, runs)])
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"RETURNED (\d+)\n", done.stderr)
    assert len(parts) == 2 * len(runs) + 1, done.stderr
    return [(int(code), said) for said, code in zip(parts[:-1:2], parts[1::2], strict=True)]


def start(root: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return call([str(root / "examples" / name), *arguments])


def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=540,
        check=False,
    )


def test_inspect(root: Path):
    said = run(root, "01_inspect.py")
    assert "channels per group=3 is not a multiple of m=4 (1 product)" in said
    assert "hidden.forward: 2:4 transposable, 4096 FLOPs" in said
    assert "+%13 = nm_mask(%3, 2, 4, 1, True) : bool[32, 16]" in said
    assert "sampled_conv_weight(" in said
    assert "<sparsefx Report: 2 of 8 products sparse, 1 graph" in said


def test_own_rule(root: Path):
    said = run(root, "02_own_rule.py")
    for line in (
        "patches forward: dense: no rule matches",
        "blocks.0.up grad_weight: sampled 0.3",
        "blocks.1.up grad_input: 1:4",
        "blocks.1.down grad_weight: sampled 0.25",
        "head forward: dense: N=30 is not a multiple of m=4 (transposable)",
        "read back and equal: True",
        "Sampled: ratio=1.3 must be in (0, 1]",
    ):
        assert line in said, line
    losses = [float(line.split()[-1]) for line in said.splitlines() if ": loss " in line]
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_own_pass(root: Path):
    said = run(root, "03_own_pass.py")
    assert "+%5 = clamp(%4, -0.001, 0.001) : float32[5, 3]" in said
    assert "lower_vendor > clip_gradients > cleanup" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("  ")]
    found = {row[0]: row[1:] for row in rows if row and row[0].endswith(".weight")}
    assert found["fc1.weight"][1] == found["fc2.weight"][1] == "0.00100"
    assert found["out.weight"][0] == found["out.weight"][1]


def test_tune_ratios(root: Path, tmp_path: Path):
    said = run(root, "04_tune_ratios.py", "--plot", str(tmp_path))
    assert "sampled 0.3 systematic: gradients against exact ones, 8 draws" in said
    one, own = map(float, re.findall(r"(\d\.\d{3}) with", said))
    assert own < one
    for name in ("errors.png", "ratios.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_generate_packed(root: Path):
    said = run(root, "05_generate_packed.py", "--quick", "--no-compile")
    assert "7 of 8 layers packed: 184320 -> 97948 bytes (53%)" in said
    rows = [line.split() for line in said.splitlines() if ", eager" in line]
    assert [row[:2] for row in rows[1:]] == [["packed", "2:4,"], ["packed", "1:4,"]]
    assert [row[-4:] for row in rows[1:]] == [["first", "6", "of", "6"]] * 2  # tokens agree


def test_compare_methods(root: Path, tmp_path: Path):
    picture = tmp_path / "methods.png"
    quick = ("--quick", "--only", "dense", "sampled", "--plot", str(picture))
    said = run(root, "compare_methods.py", *quick)
    rows = [line.split() for line in said.splitlines() if "±" in line]
    dense, sampled = (row[row.index("±") - 1 :] for row in rows)
    assert float(dense[0]) > 85  # a short run
    assert float(sampled[0]) > 80
    assert dense[4:9] == ["3.34", "2.09", "3.34", "8.76", "3.34"]  # three products, kept, serving
    assert sampled[4:9] == ["1.67", "1.04", "1.67", "4.38", "3.34"]
    assert "A short run: accuracy is not judged." in said
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quickstart(root: Path):
    # without Inductor, which takes minutes to compile eight graphs: `make demo` runs it with
    said = run(root, "quickstart.py", "--quick", "--codegen", "aot_eager")
    rows = [line for line in said.splitlines() if " ms" in line]
    assert len(rows) == 8, said  # two models, four configs
    for products in ("dense", "2:4 transposable", "sampled 0.3", "all three"):
        assert sum(products in row for row in rows) == 2, said
    assert "MLP, sampled 0.3: fc2 (all three)" in said
    assert "channels per group=1 is not a multiple of m=4" in said  # the report of the CNN
    assert "A quick run: accuracy is not judged." in said


def test_recipes(root: Path, tmp_path: Path):
    """A recipe on files that the user points to; bad arguments are told, not traced."""
    parts = {"train-images-idx3": (60, 28, 28), "train-labels-idx1": (60,)}
    parts |= {"t10k-images-idx3": (20, 28, 28), "t10k-labels-idx1": (20,)}
    for name, shape in parts.items():
        sizes = bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4) for size in shape)
        (tmp_path / f"{name}-ubyte").write_bytes(sizes + bytes(i % 10 for i in range(prod(shape))))
    quickly = ("--epochs", "1", "--codegen", "aot_eager", "--data", str(tmp_path))
    said = run(root, "recipes", *quickly, "--sampling", "black-box", "--ratio", "0.25")
    assert "mlp: 0.65 M parameters; MNIST: 60 images of [1, 28, 28]" in said
    assert "fc1: the rule says Dense()" in said
    assert "fc3: feeds the model's output (keep_output_dense=True)" in said
    rows = [line.split("│") for line in said.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["dense", "black-box, sampled 0.25"]
    full, sampled = ([cell.strip() for cell in row[4:7]] for row in rows)
    assert sampled[1:] == full[1:]
    assert full[0] == "64.7M"
    assert sampled[0] in ("45.9M (71%)", "46.0M (71%)")  # 3/4 of fc2's 25 M are left out

    wrong = {
        "gone: not a folder; expected train-images-idx3-ubyte": ("--data", str(tmp_path / "gone")),
        "--batch 61: there are 60 training images; give less": (*quickly, "--batch", "61"),
        "depth=27: a WideResNet has 6 n + 4 layers": ("--recipe", "wideresnet", "--depth", "27"),
    }
    for told, (code, stderr) in zip(wrong, several(root, "recipes", *wrong.values()), strict=True):
        assert code == 2
        assert told in stderr
        assert "Traceback" not in stderr


GPT = ("--batch", "2", "--context", "32", "--width", "32", "--depth", "1", "--every", "2")


@pytest.mark.slow
def test_train_gpt_goes_on_where_it_stopped(root: Path, tmp_path: Path):
    runs = ["2:4-sampled"]
    tiny = ("train_gpt_on_stdlib.py", *GPT, "--codegen", "aot_eager", "--runs", *runs)
    stopped = ("--out", str(tmp_path / "stopped"))
    run(root, *tiny, "--steps", "2", *stopped)
    said = run(root, *tiny, "--steps", "4", *stopped)
    (done, _), (refused, why) = several(
        root,
        tiny[0],
        (*tiny[1:], "--steps", "4", "--out", str(tmp_path / "straight")),
        (*tiny[1:], "--steps", "4", "--batch", "4", *stopped),
    )
    assert (done, refused) == (0, 1)
    assert "give the same options, or another --out" in why
    stopped, straight = (
        json.loads((tmp_path / name / "curves.json").read_text())
        for name in ("stopped", "straight")
    )
    assert stopped == straight  # to the last bit
    assert list(straight) == runs
    assert [[step for step, _ in curve] for curve in straight.values()] == [[0, 2, 4]]
    assert len({loss for _, loss in straight["2:4-sampled"]}) == 3
    assert (tmp_path / "stopped" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Not judged: that takes the runs dense and 4:8-transposable" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo")
def test_ddp_sampled(root: Path):
    alone = start(root, "ddp_sampled.py")
    assert alone.returncode == 1
    assert alone.stderr == (
        "run it with torchrun: torchrun --nproc_per_node 2 examples/ddp_sampled.py\n"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, "-P", *torchrun, str(root / "examples" / "ddp_sampled.py"),
         "--codegen", "aot_eager", "--epochs", "3"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert "module.fc2.weight  128 of 256 slices along axis 1" in done.stdout
    assert "buckets sent again" in done.stdout
    dense, sampled = (line.split() for line in done.stdout.splitlines()[-2:])
    assert (dense[0], sampled[0]) == ("dense", "sampled")
    megabytes = [float(row[row.index("MB") - 1]) for row in (dense, sampled)]
    assert 0.5 < megabytes[1] / megabytes[0] < 0.65
    assert done.stdout.count("weights the same on all ranks") == 2
