"""Shapes that real programs have: dynamic batches, graph breaks, shared and foreign weights."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsefx import NM, Rule, Sampled, SparseConfig

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
HALF = Rule("*", forward=NM(2, 4))


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def compiles(kit, compiled):
    return len(kit.records(compiled))


# --- sizes


@pytest.mark.parametrize(
    "rule",
    [
        Rule("*", forward=NM(2, 4, transposable=True)),
        Rule("*", forward=Sampled(0.4)),
        Rule("*", forward=NM(2, 4), grad_weight=Sampled(0.3, min_k=2)),
        # two of the smallest batch: torch itself compiles anew for a size of 1
        Rule("*", grad_input=Sampled(0.3), grad_weight=Sampled(0.7, min_k=2, scores="weight")),
    ],
    ids=["transposable", "sampled", "sampled tokens", "sampled backward"],
)
def test_one_graph_serves_every_batch(kit, rule):
    """The number of sampled tokens follows the batch: k = min(K, max(min_k, int(ratio * K)))."""
    model = kit.MLP().double()
    twin = kit.by_hand(model, {"first": rule, "second": rule})
    compiled = kit.compile(model, SparseConfig(rules=[rule]), dynamic=True, fullgraph=True)
    for tokens in (7, 2, 10, 29, 30, 61):
        kit.agree(compiled, model, twin, double(tokens, 16).requires_grad_(), **TIGHT)
    assert compiles(kit, compiled) == 1
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.3, 0.57, 1 / 3, 0.7, 1.0])
def test_a_symbolic_depth_is_sampled_as_an_int_is(kit, ratio):
    """The count of rows that are not zero gives k away, rounding included."""
    layer = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    pattern = Sampled(ratio, min_k=3)
    config = SparseConfig(rules=[Rule("*", grad_weight=pattern)], keep_output_dense=False)
    compiled = kit.compile(layer, config, dynamic=True)
    for tokens in (2, 3, 10, 50, 93, 100):
        # each token has a gradient of its own direction, so that the result tells which were used
        x = torch.eye(tokens, 4, dtype=torch.float64) + double(tokens, 4)
        layer.zero_grad()
        y = compiled(x)
        y.backward(torch.ones_like(y))
        kept = x.pow(2).sum(1).sqrt().sort(descending=True, stable=True).indices
        wanted = x[kept[: pattern.k(tokens)]].sum(0).expand(4, 4)
        torch.testing.assert_close(layer[0].weight.grad, wanted, **TIGHT)
    assert compiles(kit, compiled) == 1


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("net", ["MLP", "CNN"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("*", forward=NM(2, 4)),
        Rule("*", forward=NM(2, 4, transposable=True), grad_weight=Sampled(0.5)),
        Rule("*", forward=Sampled(0.5)),
        Rule("*", grad_input=Sampled(0.5), grad_weight=Sampled(0.5)),
    ],
    ids=["2:4", "all three", "sampled", "sampled backward"],
)
def test_empty_and_single_batches(kit, batch, net, rule):
    model = getattr(kit, net)().double()
    twin = kit.by_hand(model, {"first": rule, "second": rule}) if batch else model
    x = double(batch, 16) if net == "MLP" else double(batch, 4, 6, 6)
    compiled = kit.compile(model, SparseConfig(rules=[rule]))
    if batch:
        kit.agree(compiled, model, twin, x.requires_grad_(), **TIGHT)
    else:  # eager convolutions refuse some empty backward passes: the gradient of nothing is zero
        got = kit.run(compiled, dict(model.named_parameters()), x.requires_grad_())
        assert got["output"].shape == (0, 4)
        assert all(not grad.any() for name, grad in got.items() if name != "output")


def test_inputs_that_are_not_contiguous(kit):
    model = kit.MLP().double()
    twin = kit.by_hand(model, {"first": HALF, "second": HALF})
    compiled = kit.compile(model, SparseConfig(rules=[HALF]))
    for x in (double(16, 6).t(), double(6, 32)[:, ::2], double(1, 16).expand(6, 16)):
        wanted = twin(x)
        torch.testing.assert_close(compiled(x), wanted, **TIGHT)
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}


def test_weights_that_are_not_contiguous(kit):
    model = kit.MLP().double()
    model.first.weight = nn.Parameter(double(16, 32).t())
    rule = Rule("*", forward=NM(2, 4, decay=0.1), grad_weight=Sampled(0.5))
    twin = kit.by_hand(model, {"first": rule, "second": rule})
    compiled = kit.compile(model, SparseConfig(rules=[rule]))
    kit.agree(compiled, model, twin, double(6, 16).requires_grad_(), **TIGHT)


# --- graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
def test_graph_breaks_make_several_graphs(kit):
    class Broken(kit.MLP):
        def forward(self, x):
            x = torch.tanh(self.first(x))
            torch._dynamo.graph_break()
            x = torch.tanh(self.second(x))
            torch._dynamo.graph_break()
            return self.last(x)

    model = Broken().double()
    # a layer that feeds its graph's output directly would stay dense; here tanh lies between
    twin = kit.by_hand(model, {"first": HALF, "second": HALF})
    compiled = kit.compile(model, SparseConfig(rules=[HALF]))
    kit.agree(compiled, model, twin, double(5, 16).requires_grad_(), **TIGHT)
    assert compiles(kit, compiled) == 3
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}


def test_a_layer_that_is_called_repeatedly(kit):
    class Repeated(kit.MLP):
        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.second(torch.tanh(self.first(x))))
            return self.last(x)

    model = Repeated().double()
    rule = Rule("*", forward=NM(2, 4), grad_weight=Sampled(0.5))
    twin = kit.by_hand(model, {"first": rule, "second": rule})
    compiled = kit.compile(model, SparseConfig(rules=[rule]))
    kit.agree(compiled, model, twin, double(6, 16).requires_grad_(), **TIGHT)
    assert len(kit.records(compiled)[0].outcome.ops) == 18  # two layers, three calls, all products


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 4, transposable=True), Sampled(0.4)], ids=str)
def test_tied_weights(kit, pattern):
    """Two layers share one weight: its gradients add up, each layer has its own name."""
    rule = Rule("*", forward=pattern)
    model = kit.MLP().double()
    model.second = nn.Linear(32, 32).double()
    model.last = nn.Linear(32, 4).double()
    model.first = nn.Linear(32, 32).double()
    model.second.weight = model.first.weight
    twin = kit.by_hand(model, {"first": rule, "second": rule})
    compiled = kit.compile(model, SparseConfig(rules=[rule]))
    kit.agree(compiled, model, twin, double(6, 32).requires_grad_(), **TIGHT)
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}


def test_sr_ste_decays_a_shared_weight_once(kit):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    model = model.double()
    model[2].weight = model[0].weight
    plain, decayed = NM(2, 4), NM(2, 4, decay=0.5)
    grads = []
    for pattern in (plain, decayed):
        config = SparseConfig(rules=[Rule("*", forward=pattern)], keep_output_dense=False)
        compiled = kit.compile(model, config)
        torch.manual_seed(1)
        grads.append(kit.run(compiled, {"w": model[0].weight}, double(3, 8))["w"])
    w = model[0].weight.detach()
    outside = torch.where(kit.mask_of(w, plain), torch.zeros_like(w), w)
    torch.testing.assert_close(grads[1] - grads[0], 0.5 * outside, **TIGHT)


def test_a_buffer_as_weight(kit):
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", double(12, 16))
            self.last = nn.Linear(12, 4).double()

        def forward(self, x):
            return self.last(torch.tanh(F.linear(x, self.table)))

    model = Buffered()
    compiled = kit.compile(model, SparseConfig(rules=[HALF]))
    x = double(5, 16).requires_grad_()
    got = kit.run(compiled, dict(model.named_parameters()), x)
    masked = copy.deepcopy(model)
    masked.table *= kit.mask_of(masked.table, NM(2, 4))
    kit.same(got, kit.run(masked, dict(masked.named_parameters()), x), **TIGHT)
    assert kit.sparse(compiled)


def test_a_plain_function(kit):
    def function(x, w, v):
        return torch.tanh(x @ w) @ v

    config = SparseConfig(rules=[Rule("*", forward=Sampled(0.5))])
    compiled = kit.compile(function, config)
    x, w, v = (double(*s).requires_grad_() for s in ((5, 8), (8, 6), (6, 3)))
    y = compiled(x, w, v)
    k = (x.norm(dim=0) * w.norm(dim=1)).sort(descending=True).indices[:4].sort().values
    torch.testing.assert_close(y, torch.tanh(x[:, k] @ w[k]) @ v, **TIGHT)
    wanted = torch.autograd.grad((torch.tanh(x[:, k] @ w[k]) @ v).sum(), (x, w, v))
    got = torch.autograd.grad(y.sum(), (x, w, v))
    torch.testing.assert_close(got, wanted, **TIGHT)


# --- a model's life


def test_a_copy_of_a_model_that_ran_compiled_goes_its_own_way(kit):
    model = kit.MLP().double()
    compiled = kit.compile(model, SparseConfig(rules=[HALF]))
    x = double(5, 16)
    before = compiled(x).detach()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.weight.mul_(-2)
    torch.testing.assert_close(compiled(x), before, **TIGHT)
    twin = kit.by_hand(other, {"first": HALF, "second": HALF})
    again = kit.compile(other, SparseConfig(rules=[HALF]))
    kit.agree(again, other, twin, x, **TIGHT)


def test_a_deep_copy_of_the_compiled_module_still_runs(kit):
    compiled = kit.compile(kit.MLP().double(), SparseConfig(rules=[HALF]))
    x = double(5, 16)
    wanted = compiled(x)
    torch.testing.assert_close(copy.deepcopy(compiled)(x), wanted, **TIGHT)


def test_state_dict_round_trip(kit):
    """Masks follow the weights: nothing is added to a state dict, nothing is lost from it."""
    model, other = kit.MLP().double(), kit.MLP().double()
    names = list(model.state_dict())
    compiled, fresh = (kit.compile(m, SparseConfig(rules=[HALF])) for m in (model, other))
    x = double(5, 16)
    wanted, before = compiled(x), fresh(x)
    assert not torch.allclose(wanted, before)
    assert list(model.state_dict()) == names
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(fresh(x), wanted, **TIGHT)


def test_module_compile(kit):
    model = kit.MLP().double()
    twin = kit.by_hand(model, {"first": HALF, "second": HALF})
    config = SparseConfig(rules=[HALF], codegen="aot_eager")
    model.compile(backend="sparsefx", options={"config": config})
    kit.agree(model, model, twin, double(5, 16).requires_grad_(), **TIGHT)
    assert {layer for layer, _ in kit.sparse(model)} == {"first", "second"}


def test_two_configs_of_one_model(kit):
    model = kit.MLP().double()
    rules = [HALF, Rule("*", forward=Sampled(0.3))]
    pairs = [
        (kit.compile(model, SparseConfig(rules=[rule])),
         kit.by_hand(model, {"first": rule, "second": rule}))
        for rule in rules
    ]  # fmt: skip
    for _ in range(2):
        for compiled, twin in pairs:
            kit.agree(compiled, model, twin, double(5, 16).requires_grad_(), **TIGHT)


def test_new_values_do_not_recompile(kit):
    model = kit.MLP().double()
    rule = Rule("*", forward=NM(2, 4, transposable=True), grad_weight=Sampled(0.5))
    compiled = kit.compile(model, SparseConfig(rules=[rule]))
    for _ in range(4):
        twin = kit.by_hand(model, {"first": rule, "second": rule})
        kit.agree(compiled, model, twin, double(6, 16), **TIGHT)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p))
    assert compiles(kit, compiled) == 1


def test_gradients_accumulate(kit):
    model = kit.MLP().double()
    rule = Rule("*", forward=Sampled(0.4))
    twin = kit.by_hand(model, {"first": rule, "second": rule})
    compiled = kit.compile(model, SparseConfig(rules=[rule]))
    for _ in range(3):
        x = double(5, 16)
        compiled(x).pow(2).sum().backward()
        twin(x).pow(2).sum().backward()
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (model, twin)]
    kit.same(*grads, **TIGHT)


# --- recomputation: what was sampled is saved, never drawn again


@pytest.mark.parametrize("net", ["MLP", "CNN"])
@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_memory_budget(kit, net, budget):
    model = getattr(kit, net)().double()
    rule = Rule("*", forward=Sampled(0.4))
    twin = kit.by_hand(model, {"first": rule, "second": rule})
    x = double(5, 16) if net == "MLP" else double(5, 4, 6, 6)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = kit.compile(model, SparseConfig(rules=[rule]))
        kit.agree(compiled, model, twin, x.requires_grad_(), **TIGHT)


@pytest.mark.parametrize("rule", [HALF, Rule("*", forward=Sampled(0.4))], ids=["2:4", "sampled"])
def test_activation_checkpointing(kit, rule):
    class Checkpointed(kit.MLP):
        def forward(self, x):
            return self.last(checkpoint(self.block, x, use_reentrant=False))

        def block(self, x):
            return torch.tanh(self.second(torch.tanh(self.first(x))))

    model = Checkpointed().double()
    twin = kit.by_hand(model, {"first": rule, "second": rule})
    compiled = kit.compile(model, SparseConfig(rules=[rule]))
    kit.agree(compiled, model, twin, double(5, 16).requires_grad_(), **TIGHT)
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}
