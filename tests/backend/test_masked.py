"""Models that mask their weights, compiled: what eager computes, by masked products."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

import sparsefx as sfx
from sparsefx import Rule, Sampled, SparseConfig, masks
from sparsefx.backend import cache_identity
from sparsefx.capture import record_graphs


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, mask):
        return torch.where(mask, w, 0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Mask(nn.Module):
    def __init__(self, mask, straight_through=False):
        super().__init__()
        self.register_buffer("mask", mask)
        self.straight_through = straight_through

    def forward(self, w):
        return (StraightThrough.apply if self.straight_through else select)(w, self.mask)


def select(w, mask):
    return torch.where(mask, w, 0)


def parametrized(layer, straight_through=False, name="weight"):
    weight = getattr(layer, name)
    mask = Mask(masks.nm_mask(weight, 2, 4, 1), straight_through)
    parametrize.register_parametrization(layer, name, mask)
    return layer


def pruned(layer, name="weight"):
    prune.random_unstructured(layer, name, 0.5)
    return layer


def sparsified(layer):
    """As torch.ao.pruning does it."""
    pruning = importlib.import_module("torch.ao.pruning")
    root = nn.Sequential(layer)
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=0.5)
    sparsifier.prepare(root, [{"tensor_fqn": "0.weight"}])
    if layer.weight.dim() == 2:
        sparsifier.step()
    else:  # it has no step for convolutions; their masks are set by hand
        mask = layer.parametrizations.weight[0].mask
        mask.copy_(torch.rand_like(mask) > 0.5)
    return layer


SOURCES = {
    "where": parametrized,
    "straight-through": lambda layer: parametrized(layer, True),
    "prune": pruned,
    "ao": sparsified,
}
LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), (5, 16)),
    "linear, 3d": (lambda: nn.Linear(16, 8, bias=False), (2, 5, 16)),
    "linear, one row": (lambda: nn.Linear(16, 8), (1, 16)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 6, 5)),
    "conv, groups": (lambda: nn.Conv1d(16, 8, 3, groups=2), (1, 16, 7)),
}


CASES = [(layer, source) for layer in ("linear", "conv, groups") for source in SOURCES]
CASES += [(layer, "prune") for layer in ("linear, 3d", "linear, one row", "conv")]


@pytest.mark.parametrize(("layer", "source"), CASES)
def test_values_and_gradients_are_eagers(kit, layer, source):
    build, shape = LAYERS[layer]
    model = nn.Sequential(SOURCES[source](build()), nn.Tanh())
    x = torch.randn(shape, requires_grad=True)
    params = dict(model.named_parameters())
    expected = kit.run(model, params, x)
    compiled = kit.compile(model)
    kit.same(kit.run(compiled, params, x), expected)
    rows = {row.role: row for row in sfx.explain(compiled).sites}
    assert str(rows["forward"].decision) == str(rows["grad_input"].decision) == "stored mask"
    assert rows["grad_input"].derived
    op = "masked_conv" if "conv" in layer else "masked_mm"
    assert rows["forward"].sparse_op == op
    assert rows["grad_weight"].decision is None


def test_the_weight_of_conv1d_of_transformers(kit):
    model = nn.Sequential(pruned(Conv1D(8, 16)), nn.Tanh(), parametrized(Conv1D(8, 8)))
    x = torch.randn(2, 5, 16, requires_grad=True)
    params = dict(model.named_parameters())
    expected = kit.run(model, params, x)
    compiled = kit.compile(model)
    kit.same(kit.run(compiled, params, x), expected)
    assert kit.sparse(compiled) == {(n, r) for n in "02" for r in ("forward", "grad_input")}


@pytest.mark.parametrize("how", [pruned, parametrized])
def test_attention(kit, how):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
            how(self.attn, name="in_proj_weight")
            parametrized(self.attn.out_proj, True)

        def forward(self, x, y):
            return torch.tanh(self.attn(x, y, y)[0] + self.attn(x, x, x)[0])

    model = Block()
    x, y = (torch.randn(2, n, 16, requires_grad=True) for n in (3, 4))
    params = dict(model.named_parameters())
    expected = kit.run(model, params, x, y)
    compiled = kit.compile(model)
    kit.same(kit.run(compiled, params, x, y), expected)
    roles = ("forward", "grad_input")
    masked = {(n, r) for n in ("attn", "attn.out_proj") for r in roles}
    assert kit.sparse(compiled) == masked


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_pruned_out_proj_of_attention(kit):
    """Attention reads its weight without calling it: prune's mask is applied outside the graph."""

    def once(compile_it):
        torch.manual_seed(0)
        model = nn.MultiheadAttention(16, 2, batch_first=True)
        pruned(model.out_proj)
        x = torch.randn(2, 3, 16, requires_grad=True)
        call = kit.compile(model, SparseConfig(rules=[])) if compile_it else model
        (call(x, x, x)[0] * torch.linspace(-1, 1, 16)).sum().backward()
        return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}

    kit.same(once(True), once(False))


class Given(nn.Module):
    """The mask comes from outside."""

    def __init__(self, masked):
        super().__init__()
        self.fc, self.masked = nn.Linear(16, 8), masked

    def forward(self, x, mask):
        return torch.tanh(F.linear(x, self.masked(self.fc.weight, mask), self.fc.bias))


@pytest.mark.parametrize(
    "masked",
    [select, lambda w, m: w * m, lambda w, m: w.masked_fill(~m, 0), lambda w, m: w * m.float()],
    ids=["where", "product", "masked_fill", "float"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_mask_that_is_an_input_may_change_from_call_to_call(kit, masked, dtype):
    model, x = Given(masked), torch.randn(5, 16, requires_grad=True)
    compiled, params = kit.compile(model), dict(model.named_parameters())
    for _ in range(2):
        mask = torch.rand(8, 16) > 0.5
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected = kit.run(model, params, x, mask)
            kit.same(kit.run(compiled, params, x, mask), expected)
    assert len(kit.records(compiled)) == 1
    assert kit.sparse(compiled) == {("fc", "forward"), ("fc", "grad_input")}


@pytest.mark.parametrize("source", SOURCES)
def test_bits_that_flip_act_at_once_and_nothing_is_compiled_again(kit, source):
    model = nn.Sequential(SOURCES[source](nn.Linear(16, 8)), nn.Tanh())
    x, params = torch.randn(5, 16, requires_grad=True), dict(model.named_parameters())
    compiled = kit.compile(model)
    before = kit.run(compiled, params, x)
    count = len(kit.records(compiled))
    (mask,) = (b for name, b in model.named_buffers() if name.endswith("mask"))
    mask.copy_(mask == 0)
    expected = kit.run(model, params, x)
    kit.same(kit.run(compiled, params, x), expected)
    assert not torch.allclose(before["output"], expected["output"])
    assert len(kit.records(compiled)) == count == 1


def test_all_three_on_a_masked_model(kit):
    model = kit.MLP()
    pruned(model.first)
    parametrized(model.second, True)
    x = torch.randn(20, 16, requires_grad=True)
    compiled = kit.compile(model, "all-three")
    params = dict(model.named_parameters())
    got, expected = kit.run(compiled, params, x), kit.run(model, params, x)
    for name in ("output", "input 0", "last.weight", "first.bias"):
        torch.testing.assert_close(got[name], expected[name])
    assert kit.sparse(compiled) == {
        (layer, role)
        for layer in ("first", "second")
        for role in ("forward", "grad_input", "grad_weight")
    }
    assert not torch.allclose(got["first.weight_orig"], expected["first.weight_orig"])
    assert not got["first.weight_orig"][model.first.weight_mask == 0].any()


def test_a_rule_that_samples_takes_the_masked_weight(kit):
    model = nn.Sequential(pruned(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 4))
    twin = copy.deepcopy(prune.remove(model[0], "weight"))
    pruned(model[0])
    model[0].weight_mask.copy_(twin.weight != 0)
    config = SparseConfig(rules=[Rule("0", forward=Sampled(0.5, inference=True))])
    compiled = kit.compile(model, config)
    x = torch.randn(5, 16)
    by_hand = kit.by_hand(nn.Sequential(twin, nn.Tanh(), model[2]), {"0": config.rules[0]})
    torch.testing.assert_close(compiled(x), by_hand(x))
    (row, *_) = sfx.explain(compiled).sites
    assert (str(row.decision), row.mask) == ("sampled 0.5", "0.weight_mask")


def test_weights_that_hold_zeros_change_nothing(kit):
    model, x = kit.MLP(), torch.randn(5, 16)
    with torch.no_grad():
        model.first.weight.mul_(masks.nm_mask(model.first.weight, 2, 4, 1))
    compiled = kit.compile(model, SparseConfig(rules=[]))
    expected = kit.run(model, dict(model.named_parameters()), x)
    kit.same(kit.run(compiled, dict(model.named_parameters()), x), expected)
    assert kit.sparse(compiled) == set()
    assert {(r.layer, r.holds) for r in sfx.explain(compiled).sites if r.holds} == {
        ("first", "2:4")
    }


def test_what_values_decide_is_in_the_cache_key_and_nothing_else():
    class Scaled(nn.Module):
        def __init__(self, buffer):
            super().__init__()
            self.fc = nn.Linear(16, 8)
            self.register_buffer("factor", buffer)

        def forward(self, x):
            return F.linear(x, self.fc.weight * self.factor)

    def key(buffer, weight=1.0):
        model = Scaled(buffer)
        with torch.no_grad():
            model.fc.weight.mul_(weight)
        (record,) = record_graphs(model, SparseConfig(), (torch.randn(5, 16),), {})
        return cache_identity(record, {})

    some = torch.rand(8, 16)
    scattered, other = (some > 0.5).float(), (some > 0.9).float()
    assert key(scattered) == key(other) == key(scattered, masks.nm_mask(some, 2, 4, 1))
    assert key(scattered) != key(some + 1)  # which is no mask


@pytest.mark.slow
@pytest.mark.parametrize("source", ["straight-through", "prune"])
def test_inductor(kit, source):
    model = nn.Sequential(SOURCES[source](nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 4))
    x, params = torch.randn(5, 16, requires_grad=True), dict(model.named_parameters())
    compiled = torch.compile(model, backend="sparsefx", options={"config": SparseConfig(rules=[])})
    for _ in range(2):
        expected = kit.run(model, params, x)
        kit.same(kit.run(compiled, params, x), expected)
        (mask,) = (b for name, b in model.named_buffers() if name.endswith("mask"))
        mask.copy_(mask == 0)
    assert kit.sparse(compiled) == {("0", "forward"), ("0", "grad_input")}
