"""Training and inference modes: outputs and every gradient equal the reference by hand."""

import pytest
import torch

from sparsefx import NM, Dense, Rule, Sampled, SparseConfig

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
PATTERNS = {
    "2:4": {"forward": NM(2, 4)},
    "transposable": {"forward": NM(2, 4, transposable=True)},
    "1:2 masked": {"forward": NM(1, 2, weight_grad="masked")},
    "decay": {"forward": NM(2, 4, decay=0.1)},
    "masks apart": {"forward": NM(2, 4), "grad_input": NM(1, 4)},
    "dense grad_input": {"forward": NM(2, 4), "grad_input": Dense()},
    "sampled": {"forward": Sampled(0.4)},
    "sampled by weight": {"forward": Sampled(0.4, scores="weight")},
    "sampled backward": {"grad_input": Sampled(0.3), "grad_weight": Sampled(0.6)},
    "black box": {"forward": Sampled(0.5), "grad_input": Dense(), "grad_weight": Dense()},
    "all three": {"forward": NM(2, 4, transposable=True), "grad_weight": Sampled(0.5)},
}


def rule(pattern):
    return Rule("*", **PATTERNS[pattern])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_mlp_trains_like_the_reference(kit, pattern):
    model = kit.MLP().double()
    twin = kit.by_hand(model, dict.fromkeys(["first", "second"], rule(pattern)))
    compiled = kit.compile(model, SparseConfig(rules=[rule(pattern)]), fullgraph=True)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    kit.agree(compiled, model, twin, x, **TIGHT)
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}
    dense = kit.run(model, dict(model.named_parameters()), x)
    assert not torch.allclose(dense["input 0"], kit.run(compiled, {}, x)["input 0"])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cnn_trains_like_the_reference(kit, pattern):
    model = kit.CNN().double()
    twin = kit.by_hand(model, dict.fromkeys(["first", "second"], rule(pattern)))
    compiled = kit.compile(model, SparseConfig(rules=[rule(pattern)]), fullgraph=True)
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    kit.agree(compiled, model, twin, x, **TIGHT)
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("pattern", ["2:4", "transposable", "sampled"])
def test_inference_modes_mask_weights_and_sample_nothing(kit, mode, pattern):
    model = kit.MLP().double().eval()
    names = [] if pattern == "sampled" else ["first", "second"]
    twin = kit.by_hand(model, dict.fromkeys(names, rule(pattern)))
    compiled = kit.compile(model, SparseConfig(rules=[rule(pattern)]))
    x = torch.randn(5, 16, dtype=torch.float64)
    with mode():
        torch.testing.assert_close(compiled(x), twin(x), **TIGHT)
    assert {layer for layer, _ in kit.sparse(compiled)} == set(names)


def test_inference_samples_where_asked(kit):
    asked = Rule("*", forward=Sampled(0.4, inference=True))
    model = kit.MLP().double().eval()
    compiled = kit.compile(model, SparseConfig(rules=[asked]))
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        got, wanted = compiled(x), kit.by_hand(model, {"first": asked, "second": asked})(x)
    torch.testing.assert_close(got, wanted, **TIGHT)


def test_training_then_evaluation_then_training(kit):
    """Each mode gets graphs of its own; batch norm's state stays the model's."""
    net = torch.nn.Sequential(kit.CNN(), torch.nn.BatchNorm1d(4)).double()
    asked = Rule("0.first", forward=NM(2, 4))
    twin = kit.by_hand(net, {"0.first": asked})
    compiled = kit.compile(net, SparseConfig(rules=[asked]))
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    for training in (True, False, True):
        net.train(training), twin.train(training)
        torch.testing.assert_close(compiled(x), twin(x), **TIGHT)
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean, **TIGHT)


def test_frozen_parameters_get_no_gradient(kit):
    model = kit.MLP().double()
    model.first.requires_grad_(False)
    model.second.weight.requires_grad_(False)
    asked = Rule("*", forward=NM(2, 4, decay=0.1), grad_weight=Sampled(0.5))
    twin = kit.by_hand(model, {"first": asked, "second": asked})
    compiled = kit.compile(model, SparseConfig(rules=[asked]))
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    kit.agree(compiled, model, twin, x, **TIGHT)
    assert model.first.weight.grad is None
    assert model.second.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "transposable", "decay", "sampled", "all three"])
def test_autocast(kit, dtype, pattern):
    """Bounded by eager autocast's own distance from a float64 twin.

    Weights and inputs are representable in 16 bits, so masks and samples are the same in all.
    """
    model = kit.MLP().to(dtype).float()
    asked = rule(pattern)
    names = ["first"] if "grad_weight" in PATTERNS[pattern] or pattern == "sampled" else [
        "first", "second"]  # fmt: skip
    config = SparseConfig(rules=[Rule(name, **PATTERNS[pattern]) for name in names])
    x = torch.randn(8, 16).to(dtype).float().requires_grad_()
    eager = kit.by_hand(model, dict.fromkeys(names, asked))
    exact = kit.by_hand(model.double(), dict.fromkeys(names, asked))
    model.float()
    compiled = kit.compile(model, config)
    wanted = kit.run(exact, dict(exact.named_parameters()), x.double().detach().requires_grad_())
    with torch.autocast("cpu", dtype=dtype):
        got = kit.run(compiled, dict(model.named_parameters()), x)
        usual = kit.run(eager, dict(eager.named_parameters()), x)
    assert {layer for layer, _ in kit.sparse(compiled)} == set(names)
    for name, value in wanted.items():
        scale = torch.finfo(dtype).eps * value.abs().max()
        allowed = 2 * (usual[name] - value).abs().max() + 2 * scale
        assert (got[name] - value).abs().max() <= allowed, name
        assert got[name].dtype == usual[name].dtype, name


@pytest.mark.parametrize("pattern", ["2:4", "transposable", "sampled", "sampled backward"])
def test_channels_last(kit, pattern):
    model = kit.CNN().double().to(memory_format=torch.channels_last)
    twin = kit.by_hand(model, dict.fromkeys(["first", "second"], rule(pattern)))
    compiled = kit.compile(model, SparseConfig(rules=[rule(pattern)]), fullgraph=True)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    kit.agree(compiled, model, twin, x.requires_grad_(), **TIGHT)
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}


def test_channels_last_outputs_keep_their_layout(kit):
    conv = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    config = SparseConfig(rules=[Rule("*", forward=NM(2, 4))], keep_output_dense=False)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    compiled = kit.compile(conv, config)
    assert compiled(x).stride() == conv(x).stride()
    assert kit.sparse(compiled) == {("0", "forward")}
