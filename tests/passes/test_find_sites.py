"""find_sites: which products there are, whose they are, and which gradient belongs to which."""

from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline as assert_text
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from sparsefx.config import NM, Rule, SparseConfig
from sparsefx.passes import canonicalize, find_sites, select_sites
from sparsefx.testing import capture, plans, run_pass


def sites(model, *args, **options):
    gm = capture(model, *args, **options)
    run_pass(canonicalize, gm)
    first = run_pass(find_sites, gm)
    assert first.modified
    assert first.diff == ""  # only metadata
    again = run_pass(find_sites, gm)
    assert not again.modified
    return [plan.site for plan in plans(gm)]


def table(found):
    """Layer, role and (M, N, K) of each product, in the order of the graph."""
    return "\n".join(f"{s.layer} {s.role} {s.op} {s.shape}" for s in found)


def roles(found):
    """Roles by layer call."""
    groups = {}
    for s in found:
        groups.setdefault((s.group, s.layer), set()).add(s.role)
    return {(layer): r for (_, layer), r in groups.items()}


ALL = {"forward", "grad_input", "grad_weight"}


def test_mlp():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    found = sites(model, torch.randn(5, 8))
    assert_text(
        table(found),
        """\
0 forward addmm (5, 12, 8)
2 forward addmm (5, 4, 12)
2 grad_input mm (5, 12, 4)
2 grad_weight mm (12, 4, 5)
0 grad_weight mm (8, 12, 5)""",
    )
    first = found[0]
    assert first.module_types[0] is nn.Linear
    assert (first.weight, first.weight_name) == ("right", "0.weight")
    assert (first.kind, first.dtype, first.device, first.batch) == ("mm", "float32", "cpu", 1)
    assert [s.is_output for s in found if s.role == "forward"] == [False, True]
    assert first.has_backward


def test_cnn():
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    model.act = nn.ReLU()
    model.down = nn.Conv2d(8, 12, 3, groups=2)
    model.flat = nn.Flatten()
    model.head = nn.Linear(12 * 4, 4)
    found = sites(model, torch.randn(2, 3, 8, 8))
    assert_text(
        table(found),
        """\
stem forward convolution (32, 8, 27)
down forward convolution (8, 12, 36)
head forward addmm (2, 4, 48)
head grad_input mm (2, 48, 4)
head grad_weight mm (48, 4, 2)
down grad_input conv_grad_input (8, 36, 12)
down grad_weight conv_grad_weight (36, 12, 8)
stem grad_weight conv_grad_weight (27, 8, 32)""",
    )
    down = next(s for s in found if s.layer == "down")
    assert down.channels == (4, 6, 2, 2)
    assert (down.depthwise, down.transposed) == (False, False)


def test_attention():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(self.self_attn(x, x, x, need_weights=True)[0])

    found = sites(Block(), torch.randn(2, 3, 8, requires_grad=True))
    assert "self_attn.out_proj" in {s.layer for s in found}
    by_group = {}
    for s in found:
        by_group.setdefault(s.group, []).append(s)
    for group in by_group.values():
        assert {s.role for s in group} == ALL
        assert len(group) == 3
    activations = [g for g in by_group.values() if g[0].weight is None]
    assert all(s.kind == "bmm" and s.batch == 4 for group in activations for s in group)
    assert len(activations) == 2  # scores and values
    assert len(by_group) == 4


def test_names_of_nested_blocks_and_numbers():
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks
            self.heads = nn.ModuleDict({"a": nn.Linear(8, 2)})

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.heads["a"](x)

    found = sites(Model(), torch.randn(3, 8, requires_grad=True))
    assert roles(found) == {"blocks.0.0": ALL, "blocks.1.0": ALL, "heads.a": ALL}


def test_parametrized_weights_are_named_by_their_owner():
    class Half(nn.Module):
        def forward(self, w):
            return w * 0.5

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    parametrize.register_parametrization(model[0], "weight", Half())
    found = sites(model, torch.randn(3, 8, requires_grad=True))
    assert roles(found) == {"0": ALL, "2": ALL}
    assert {s.weight for s in found} == {"right"}
    assert any(issubclass(cls, nn.Linear) for cls in found[0].module_types)


def test_tied_weights_are_two_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x).tanh())

    found = sites(Tied(), torch.randn(3, 8, requires_grad=True))
    assert roles(found) == {"one": ALL, "two": ALL}
    assert len(found) == 6


def test_calls_of_one_module_are_apart():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.fc(self.fc(x).tanh()).tanh())

    found = sites(Again(), torch.randn(3, 8, requires_grad=True))
    assert {s.layer for s in found} == {"fc"}
    by_group = {}
    for s in found:
        by_group.setdefault(s.group, set()).add(s.role)
    assert list(by_group.values()) == [ALL] * 3
    assert [s.is_output for s in found if s.role == "forward"] == [False, False, True]


def test_a_functional_call_is_named_after_its_parameter():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            return F.linear(x, self.proj).tanh()

    (forward, *_) = sites(Functional(), torch.randn(3, 8))
    assert forward.weight_name == "proj"
    assert forward.weight == "right"


@pytest.mark.parametrize(
    ("make", "shape", "weight"),
    [
        (lambda: Conv1D(6, 8), (3, 8), "right"),
        (lambda: nn.Linear(8, 6), (2, 3, 8), "right"),
        (lambda: nn.Linear(8, 6), (8,), "right"),
    ],
)
def test_stored_and_transposed_weights(make, shape, weight):
    found = sites(make(), torch.randn(shape, requires_grad=True))
    assert {s.weight for s in found} == {weight}
    rows = max(1, torch.Size(shape).numel() // 8)
    assert {s.role: s.shape for s in found} == {
        "forward": (rows, 6, 8),
        "grad_input": (rows, 8, 6),
        "grad_weight": (8, 6, rows),
    }


def test_a_weight_on_the_left():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            return self.weight @ x.mT

    found = sites(Left(), torch.randn(3, 8, requires_grad=True))
    assert {s.weight for s in found} == {"left"}
    assert {s.role: s.shape for s in found}["forward"] == (6, 3, 8)
    assert len(found) == 3


def test_a_product_with_itself():
    class Gram(nn.Module):
        def forward(self, x):
            return (x @ x.mT).tanh()

    for shape in ((5, 8), (2, 5, 8)):
        found = sites(Gram(), torch.randn(shape, requires_grad=True))
        assert sorted(s.role for s in found) == sorted(ALL)


def test_depthwise_and_transposed_convolutions_are_marked():
    found = sites(nn.Conv2d(4, 8, 3, groups=4), torch.randn(1, 4, 5, 5, requires_grad=True))
    assert all(s.depthwise for s in found)
    assert len(found) == 3
    found = sites(nn.ConvTranspose2d(4, 6, 3), torch.randn(1, 4, 5, 5, requires_grad=True))
    assert all(s.transposed for s in found)
    assert found[0].channels == (4, 6, 1, 1)


def test_only_gradients_that_are_asked_for_are_there():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    found = sites(model, torch.randn(3, 8))
    assert roles(found) == {"0": {"forward"}, "1": {"forward", "grad_weight"}}


def test_an_inference_graph_has_no_backward():
    with torch.no_grad():
        found = sites(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8))
    assert [(s.layer, s.role, s.has_backward) for s in found] == [
        ("0", "forward", False),
        ("1", "forward", False),
    ]


def test_views_lead_to_the_output_arithmetic_does_not():
    class Out(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.fc, self.last = nn.Linear(8, 8), last

        def forward(self, x):
            return self.last(self.fc(x))

    x = torch.randn(3, 8)
    for last, expected in [
        (lambda y: y, True),
        (lambda y: y.view(3, 2, 4).transpose(1, 2), True),
        (lambda y: y[:, :4], True),
        (lambda y: y.float(), True),
        (lambda y: y.tanh(), False),
        (lambda y: y + 1, False),
    ]:
        assert sites(Out(last), x)[0].is_output is expected


class First(nn.Module):
    """A layer behind what a model may do before it."""

    def __init__(self, before):
        super().__init__()
        self.fc, self.before, self.scale = nn.Linear(8, 8), before, nn.Parameter(torch.ones(8))
        self.table, self.last = nn.Embedding(8, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x):
        return self.last(self.fc(self.before(self, x)).tanh())


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (lambda net, x: x, True),
        (lambda net, x: (x - net.mean).flip(1).float() / 2, True),
        (lambda net, x: x * net.scale, False),
        (lambda net, x: net.table(x.argmax(1)), False),
        (
            lambda net, x: torch.nn.functional.batch_norm(x, None, None, net.scale, training=True),
            False,
        ),
    ],
)
def test_the_first_layer_reads_what_no_parameter_made(before, expected):
    found = sites(First(before), torch.randn(5, 8))
    roles = {role: [s.is_input for s in found if s.role == role] for role in ALL}
    assert roles["forward"] == [expected, False]
    assert sum(roles["grad_weight"]) == expected


def test_a_weight_on_the_left_and_a_frozen_one_read_inputs_too():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8))
            self.register_buffer("frozen", torch.randn(8, 8))

        def forward(self, x):
            return (self.w @ x.t()).sum() + (self.w @ x.t() @ (x @ self.frozen)).sum()

    found = [s for s in sites(Left(), torch.randn(5, 8)) if s.role == "forward"]
    assert [(s.weight, s.is_input) for s in found] == [
        ("left", True), ("left", True), ("right", True), (None, False),
    ]  # fmt: skip


def test_a_symbolic_batch():
    found = sites(nn.Linear(8, 6), torch.randn(3, 8), dynamic=True)
    (m, n, k) = found[0].shape
    assert isinstance(m, torch.SymInt)
    assert (n, k) == (6, 8)
    assert isinstance(k, int)


def test_autocast_keeps_the_parameter_s_name():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 6)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(x).tanh()

    found = sites(Cast(), torch.randn(3, 8, requires_grad=True))
    assert roles(found) == {"fc": ALL}
    assert {(s.weight_name, s.dtype) for s in found} == {("fc.weight", "bfloat16")}


def test_sources_are_lines_of_the_user_s_code():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            return (x @ self.w).tanh()

    assert sites(Model(), torch.randn(3, 8))[0].source.startswith("test_find_sites.py:")


def test_decisions_outlive_a_second_run():
    gm = capture(nn.Linear(8, 8), torch.randn(3, 8))
    config = SparseConfig(rules=[Rule("*", NM(2, 4))], keep_output_dense=False)
    for function in (canonicalize, find_sites, partial(select_sites, config=config)):
        run_pass(function, gm)
    before = plans(gm)
    assert not run_pass(find_sites, gm).modified
    assert plans(gm) == before
    assert before[0].decision.pattern == NM(2, 4)


class _Scaled(torch.autograd.Function):
    """A product whose backward is its author's, not the product's derivative."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ (w * 1.5), grad.t() @ x


# Dynamo itself instantiates the Function that it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_forward_with_a_backward_of_its_own_stays_dense():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.w = nn.Parameter(torch.randn(8, 8))
            self.last = nn.Linear(8, 4)

        def forward(self, x):
            return self.last(_Scaled.apply(self.first(x).relu(), self.w).relu())

    gm = capture(Model(), torch.randn(6, 8))
    run_pass(canonicalize, gm)
    run_pass(find_sites, gm)
    rules = [Rule("*", forward=NM(2, 4))]
    run_pass(partial(select_sites, config=SparseConfig(rules=rules)), gm)
    decided = {(p.site.layer, p.site.role): p.decision for p in plans(gm)}
    assert str(decided["first", "forward"].pattern) == "2:4"
    (own,) = (d for (layer, role), d in decided.items() if layer not in ("first", "last")
              and role == "forward")  # fmt: skip
    assert own.dense
    assert own.reason == "its gradient may be a product that was not recognised"
