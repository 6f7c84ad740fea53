"""What a user may pass to torch.compile, what is refused and how, and how the backend is found."""

import subprocess
import sys

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import sparsefx as sfx
from sparsefx import NM, Rule, SparseConfig
from sparsefx.registration import register_backend

BAD = {
    "unknown key": ({"confg": "2:4"}, r"unknown key 'confg' \(value '2:4'\); allowed: config, ind"),
    "bad preset": ({"config": "2:5"}, r"'2:5' is not a preset; there are: 2:4, "),
    "bad dict key": ({"config": {"ruls": []}}, r"unknown key 'ruls' .*allowed: rules, "),
    "bad value": ({"config": {"select": "some"}}, r"select='some' is not one of 'all', 'prof"),
    "bad pattern": (
        {"config": {"rules": [{"match": "*", "forward": {"kind": "nm", "n": 4, "m": 4}}]}},
        r"n=4 must be between 1 and m-1=3",
    ),
    "bad type": ({"config": 3}, r"config=3 must be a SparseConfig, a preset's name"),
    "unknown Inductor option": ({"inductor": {"max_tune": 1}}, r"unknown key 'max_tune'"),
    "Inductor options of a wrong type": ({"inductor": 1}, r"inductor=1 must be a dict"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_nonsense_is_a_config_error_at_the_first_run(kit, options, message):
    compiled = torch.compile(kit.MLP(), backend="sparsefx", options=options)
    with pytest.raises(sfx.ConfigError, match=message):
        compiled(torch.randn(2, 16))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_error_is_the_users_own_in_every_form(kit, fullgraph):
    options, message = BAD["bad preset"]

    def function(x):
        return x @ x

    model = kit.MLP()
    model.compile(backend="sparsefx", options=options, fullgraph=fullgraph)
    compiled = torch.compile(function, backend="sparsefx", options=options, fullgraph=fullgraph)
    with pytest.raises(sfx.ConfigError, match=message) as caught:
        model(torch.randn(2, 16))
    assert type(caught.value) is sfx.ConfigError
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(sfx.ConfigError, match=message):
            compiled(torch.randn(3, 3))


def test_a_model_recovers_from_a_bad_option(kit):
    model, x = kit.MLP(), torch.randn(2, 16)
    with pytest.raises(sfx.ConfigError):
        torch.compile(model, backend="sparsefx", options={"config": "nope"})(x)
    config = SparseConfig(rules=[], codegen="aot_eager")
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("config", [None, "sampled-0.3", {"keep_output_dense": False}], ids=str)
def test_a_config_a_name_and_a_dict_are_taken(kit, config):
    compiled = kit.compile(kit.MLP().double(), config)
    compiled(torch.randn(4, 16, dtype=torch.float64)).sum().backward()
    layers = {layer for layer, _ in kit.sparse(compiled)}
    assert layers == {"first", "second"} | ({"last"} if isinstance(config, dict) else set())


# --- how the backend is found


def test_the_backend_is_listed_after_an_import(root):
    code = "import sparsefx, torch; print('sparsefx' in torch._dynamo.list_backends())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


def test_registering_twice_is_harmless():
    register_backend()
    register_backend()
    assert torch._dynamo.list_backends().count("sparsefx") == 1


# --- a joint pass of the user's own


class Counting(CustomGraphPass):
    """Count how often it runs, and on what."""

    def __init__(self, identity):
        self.identity, self.seen = identity, []

    def __call__(self, graph):
        self.seen.append([str(n.target) for n in graph.nodes])

    def uuid(self):
        return self.identity


@pytest.mark.parametrize("kind", ["function", "pass", "pass without uuid"])
def test_a_joint_pass_that_was_set_before_still_runs(kit, kind):
    counting = Counting("counting" if kind == "pass" else None)
    mine = counting.__call__ if kind == "function" else counting
    rule = Rule("*", forward=NM(2, 4))
    model = kit.MLP().double()
    twin = kit.by_hand(model, {"first": rule, "second": rule})
    torch._dynamo.utils.counters.clear()
    with inductor_config.patch(joint_custom_pre_pass=mine):
        options = {"config": SparseConfig(rules=[rule])}
        compiled = torch.compile(model, backend="sparsefx", options=options)
        kit.agree(compiled, model, twin, torch.randn(4, 16, dtype=torch.float64))
    assert len(counting.seen) == 1
    assert "aten.addmm.default" in counting.seen[0]  # it runs first, on the dense graph
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}
    bypasses = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_bypass"]
    assert bypasses == (0 if kind == "pass" else 1)
