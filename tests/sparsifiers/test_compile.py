"""Under torch.compile: one compilation, however masks change, and the values of eager."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func

import sparsefx as sfx
from sparsefx.sparsifiers import SRSTE, Cubic, Sparsifier, TransposableNM

# Dynamo makes an instance of the class that it warns about.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
DENSE = sfx.SparseConfig(rules=[], codegen="aot_eager")

MAKE = {
    "srste": lambda model: SRSTE(model, decay=0.1),
    "dynamic": lambda model: TransposableNM(
        model, 2, 8, refresh=2, ramp=Cubic(1, 0, 4), start={"2": 2}, dense_tail=7, decay=0.1
    ),
    "static": lambda model: TransposableNM(model, 4, 8, static=True),
    "masked": lambda model: TransposableNM(model, 4, 8, refresh=1, weight_grad="masked"),
}


def run(model: nn.Module, forward: Any, make: Any, fit: Any) -> Sparsifier:
    sparsifier = make(model)
    fit(forward, sparsifier, torch.optim.Adam(model.parameters(), 0.05), 8)
    return sparsifier


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MAKE)
def test_one_compilation_and_the_same_values(mlp, fit, backend, name):
    plain = mlp()
    expected = run(plain, plain, MAKE[name], fit)
    model, counter = mlp(), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        sparsifier = run(model, compiled, MAKE[name], fit)
    assert counter.frame_count == 1
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    if name != "static":
        assert sparsifier.sad(total=True)["0"] > 0
    assert sparsifier.sad(total=True) == expected.sad(total=True)


@pytest.mark.parametrize("name", ["srste", "dynamic"])
def test_our_backend_compiles_once(mlp, fit, name):
    plain = mlp()
    expected = run(plain, plain, MAKE[name], fit)
    model = mlp()
    compiled = torch.compile(model, backend="sparsefx", fullgraph=True, options={"config": DENSE})
    with torch._dynamo.config.patch(error_on_recompile=True):
        sparsifier = run(model, compiled, MAKE[name], fit)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    assert sparsifier.sad(total=True) == expected.sad(total=True)
    text = str(sfx.explain(compiled))
    assert text.count("stored mask 2:4" if name == "srste" else "stored mask 100%") == 3, text


def test_accumulation_autocast_and_scaling_under_compilation(mlp):
    """The hooks run outside the compiled graph: once per step, in the parameter's precision."""
    results = []
    for compiled in (False, True):
        model = mlp()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        sparsifier = SRSTE(model, decay=0.1, grad_scaler=scaler)
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    out = forward(torch.randn(4, 16))
                scaler.scale(out.float().square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            sparsifier.step()
        results.append(model.state_dict())
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key


def test_the_graph_holds_a_where_of_the_mask(mlp):
    """The form that the compiler recognises: where(mask, w, 0), no other operator on the way."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    model = mlp()
    SRSTE(model)
    w = model[0].parametrizations.weight
    compiled = torch.compile(w, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    assert torch.equal(compiled(), w.original * w[0].mask)
    compiled().sum().backward()
    forward, backward = (
        [node.target for node in gm.graph.nodes if node.op == "call_function"] for gm in graphs
    )
    assert forward[-1] == torch.ops.aten.where.self
    assert set(forward[:-1]) <= {torch.ops.aten.full.default, torch.ops.aten.scalar_tensor.default}
    assert backward == []


@pytest.mark.slow
def test_inductor():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(16, 8)
        sparsifier = SRSTE(model, 1, 4, decay=0.1)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        counter = CompileCounterWithBackend("inductor")
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        for _ in range(4):
            optimizer.zero_grad()
            forward(torch.randn(32, 16)).square().mean().backward()
            optimizer.step()
            sparsifier.step()
        assert sparsifier.sad(total=True)["weight"] > 0
        assert counter.frame_count == compiled
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-5)
