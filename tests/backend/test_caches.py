"""The compile caches across processes: the same is found again, anything else is compiled anew.

Each program below runs in a process of its own; all share one cache folder. A program prints its
numbers, gradients included, and what the caches answered.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsefx as sfx

PROGRAM = """
import json, sys
import torch
from torch import nn
import sparsefx as sfx
from torch._dynamo.utils import counters

torch.manual_seed(0)

class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(16, 16))
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        (_, layer), (_, last) = self._modules.items()
        return last(torch.tanh(layer(x)))

for name, config in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    net, x = Net(name), torch.linspace(-1, 1, 96).view(6, 16).sin().requires_grad_()
    y = torch.compile(net, backend="sparsefx", options={"config": config})(x)
    y.square().sum().backward()
    found = {
        "output": y.tolist(),
        "grads": [t.grad.tolist() for t in (x, *net.parameters())],
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "misses": counters["aot_autograd"]["autograd_cache_miss"],
        "bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
    }
    print("FOUND", json.dumps(found))
"""

SAMPLED = {"rules": [{"match": "fc", "forward": {"kind": "sampled", "ratio": 0.5}}]}
OTHER_RATIO = {"rules": [{"match": "fc", "forward": {"kind": "sampled", "ratio": 0.25}}]}
TWO_OF_FOUR = {"rules": [{"match": "fc", "forward": {"kind": "nm", "n": 2, "m": 4}}]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def copied(root, folder):
    for name in ("sparsefx", "passes", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, folder / name, symlinks=True, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def package(root, tmp_path_factory):
    """Sources that nobody edits while the tests run: an edit must miss the caches."""
    return copied(root, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def launch(package, cache):
    def run(*jobs, package=package):
        environment = {
            **os.environ,
            "PYTHONPATH": str(package),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM, json.dumps(jobs)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        return [json.loads(line.removeprefix("FOUND ")) for line in lines]

    return run


@pytest.fixture(scope="module")
def first(launch):
    """What a process finds that starts with an empty cache."""
    return launch(("fc", SAMPLED), ("fc", TWO_OF_FOUR))


def expected(kit, config, name="fc"):
    """The same program, eagerly and by hand."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(16, 16)
            self.last = torch.nn.Linear(16, 4)

        def forward(self, x):
            return self.last(torch.tanh(self.fc(x)))

    net = Net()
    (rule,) = sfx.SparseConfig.from_dict(config).rules
    twin = kit.by_hand(net, {"fc": rule} if name == rule.match else {})
    x = torch.linspace(-1, 1, 96).view(6, 16).sin().requires_grad_()
    y = twin(x)
    y.square().sum().backward()
    return {"output": y.tolist(), "grads": [t.grad.tolist() for t in (x, *twin.parameters())]}


def close(found, wanted):
    torch.testing.assert_close(torch.tensor(found["output"]), torch.tensor(wanted["output"]))
    for got, grad in zip(found["grads"], wanted["grads"], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(grad), rtol=1e-4, atol=1e-5)


def same_numbers(a, b):
    return a["output"] == b["output"] and a["grads"] == b["grads"]


def test_the_first_process_compiles(kit, first):
    for found, config in zip(first, (SAMPLED, TWO_OF_FOUR), strict=True):
        assert (found["hits"], found["misses"], found["bypasses"]) == (0, 1, 0)
        close(found, expected(kit, config))


def test_a_second_process_hits_and_another_config_misses(kit, launch, first):
    again, ratio, elsewhere = launch(("fc", SAMPLED), ("fc", OTHER_RATIO), ("dense", SAMPLED))
    assert (again["hits"], again["misses"]) == (1, 0)
    assert same_numbers(again, first[0])
    assert (ratio["hits"], ratio["misses"]) == (0, 1)
    close(ratio, expected(kit, OTHER_RATIO))
    # the graph is the same, but the rule speaks of a layer called fc
    assert (elsewhere["hits"], elsewhere["misses"]) == (0, 1)
    close(elsewhere, expected(kit, SAMPLED, "dense"))


def test_another_pass_source_misses(package, launch, first, tmp_path):
    """A pass that rewrites nothing any more: the cache must not answer for it."""
    copy = copied(package, tmp_path / "changed")
    source = Path(copy, "passes", "rewrite_nm.py")
    text = source.read_text("utf-8")
    assert text.count("_planned(mm)") == 1
    source.write_text(text.replace("_planned(mm)", "None"), "utf-8")
    (changed,) = launch(("fc", TWO_OF_FOUR), package=copy)
    assert (changed["hits"], changed["misses"]) == (0, 1)
    assert not same_numbers(changed, first[1])
