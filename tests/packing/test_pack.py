"""pack and unpack: values, bytes, what stays dense, and nothing changed on an error."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsefx as sfx
from sparsefx import NM, Dense, Masked, PackError, Rule, Sampled, SparseConfig
from sparsefx.packing import modules

CASES = {
    "linear": (lambda: nn.Linear(16, 6), (3, 16)),
    "no bias": (lambda: nn.Linear(16, 6, bias=False), (2, 5, 16)),
    "one row": (lambda: nn.Linear(16, 6), (16,)),
    "no row": (lambda: nn.Linear(16, 6), (0, 4, 16)),
    "conv1d": (lambda: nn.Conv1d(8, 4, 3), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 4, 3, padding="same", padding_mode="circular"), (2, 8, 5, 6)),
    "groups": (lambda: nn.Conv2d(16, 6, (1, 3), groups=2, stride=2, bias=False), (2, 16, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 4, 2, dilation=2), (2, 8, 4, 5, 4)),
}


def masked(layer, n, m):
    """The layer with its weight masked by hand."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(sfx.masks.nm_mask(twin.weight, n, m, 1))
    return twin


def config(pattern):
    return SparseConfig([Rule("*", pattern)])


def near(got, wanted):
    low = got.dtype in (torch.bfloat16, torch.float16)
    torch.testing.assert_close(got, wanted, rtol=2e-2 if low else 1e-5, atol=2e-2 if low else 1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (3, 8)])
@pytest.mark.parametrize("case", CASES)
def test_values_bytes_and_the_way_back(case, n, m):
    make, shape = CASES[case]
    layer, x = make(), torch.randn(shape)
    twin = masked(layer, n, m)
    report = sfx.pack(layer, config(NM(n, m)))
    with torch.no_grad():
        y, wanted = layer(x), twin(x)
    near(y, wanted)
    assert y.stride() == wanted.stride()
    kept = twin.weight.numel() * n // m
    bits = {4: 2, 8: 4}[m]
    taps = twin.weight.shape[0]
    assert kept * 4 + kept * bits / 8 + 4 <= report.after < kept * 4 + kept * bits / 8 + 4 + taps
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held == report.after
    assert report.before == twin.weight.nbytes
    assert [name for name, _ in layer.named_parameters()] == ["bias"] * (layer.bias is not None)
    sfx.unpack(layer)
    assert type(layer) is type(twin)
    assert list(layer.state_dict()) == list(twin.state_dict())
    assert torch.equal(layer.weight, twin.weight)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    layer = nn.Sequential(nn.Linear(32, 8), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 4, 1)).to(dtype)
    twin, x = copy.deepcopy(layer), torch.randn(3, 32, dtype=dtype)
    twin[0], twin[2] = masked(layer[0], 2, 4), masked(layer[2], 2, 4)
    sfx.pack(layer, "2:4")
    with torch.no_grad():
        near(layer(x), twin(x))
    sfx.unpack(layer)
    assert torch.equal(layer[0].weight, twin[0].weight)
    assert layer[2].weight.dtype == dtype


def test_a_packed_model_may_be_cast_and_run_under_autocast():
    layer, x = nn.Linear(32, 8), torch.randn(3, 32)
    twin = masked(layer, 2, 4)
    sfx.pack(layer, "2:4")
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y, wanted = layer(x), twin(x)
        assert y.dtype == wanted.dtype == torch.bfloat16
        near(y, wanted)
        near(layer.bfloat16()(x.bfloat16()), twin.bfloat16()(x.bfloat16()))
    assert layer.weight_codes.dtype == torch.uint8
    sfx.unpack(layer)
    assert torch.equal(layer.weight, twin.weight)


def test_memory_format_and_requires_grad_come_back():
    conv = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    twin, x = masked(conv, 2, 4), torch.randn(1, 8, 5, 5)
    sfx.pack(conv, "2:4")
    with torch.no_grad():
        assert conv(x).stride() == twin(x).stride()
    sfx.unpack(conv)
    assert conv.weight.stride() == twin.weight.stride()
    assert not conv.weight.requires_grad
    assert torch.equal(conv.weight, twin.weight)


def test_a_transposable_rule_and_the_first_match_decides():
    model = nn.ModuleDict({name: nn.Linear(16, 8) for name in "abcd"})
    weight = model["a"].weight.detach().clone()
    rules = [
        Rule("a", NM(2, 4, transposable=True)),
        Rule("b", Dense()),
        Rule(lambda target: target.name == "c", NM(1, 4)),
        Rule(nn.Linear, Sampled(0.5)),
    ]
    report = sfx.pack(model, SparseConfig(rules))
    assert {name: layer.pattern for name, layer in report.packed.items()} == {
        "a": "2:4",
        "c": "1:4",
    }
    assert report.skipped == {
        "b": "the rule says Dense()",
        "d": "the rule says sampled 0.5; only N:M weights can be packed",
    }
    mask = sfx.masks.transposable_mask(weight, 2, 4)
    assert torch.equal(model["a"].weight, weight * mask)
    assert str(report).splitlines() == [
        "a: 2:4, 512 -> 276 bytes",
        "b: dense: the rule says Dense()",
        "c: 1:4, 512 -> 140 bytes",
        "d: dense: the rule says sampled 0.5; only N:M weights can be packed",
        "2 of 4 layers packed: 1024 -> 416 bytes (41%)",
    ]


def test_what_stays_dense_says_why():
    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.abs(), self.bias)

    model = nn.ModuleDict(
        {
            "fits": nn.Linear(8, 8),
            "own": Own(8, 8),
            "odd": nn.Linear(6, 8),
            "transposed": nn.ConvTranspose1d(8, 8, 3),
            "depthwise": nn.Conv1d(8, 8, 3, groups=8),
            "attention": nn.MultiheadAttention(8, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "integer": nn.Linear(8, 8),
        }
    )
    model["integer"].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    twin, x = masked(model["own"], 2, 4), torch.randn(3, 8)
    report = sfx.pack(model, "2:4")
    assert list(report.packed) == ["fits", "own"]
    assert report.packed["own"].note == "unpacked at each call"
    assert report.skipped == {
        "odd": "weight (8, 6): in_features=6 is not a multiple of m=4",
        "transposed": "transposed convolution",
        "depthwise": "weight (8, 1, 3): input channels per group=1 is not a multiple of m=4",
        "attention.in_proj_weight": "nn.MultiheadAttention reads this weight itself",
        "attention.out_proj": "nn.MultiheadAttention reads this weight itself",
        "normed": "its weight is parametrized by _WeightNorm: remove that first",
        "integer": "dtype torch.int8 is not a real floating-point type",
    }
    with torch.no_grad():
        near(model["own"](x), twin(x))
    assert isinstance(model["own"], Own)
    again = sfx.pack(model, SparseConfig([Rule("normed"), Rule("odd", NM(1, 2))]))
    assert list(again.packed) == ["odd"]
    assert again.skipped["fits"] == "no rule matches"


def test_without_a_config_patterns_are_found():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Linear(16, 2))
    model[0], model[2] = masked(model[0], 1, 4), masked(model[2], 4, 8)
    weights = [layer.weight.detach().clone() for layer in model]
    report = sfx.pack(model)
    assert {name: layer.pattern for name, layer in report.packed.items()} == {
        "0": "1:4",
        "2": "4:8",
    }
    assert report.skipped["1"] == "its weight holds no N:M pattern"
    for layer, weight in zip(sfx.unpack(model), weights, strict=True):
        assert torch.equal(layer.weight, weight)
    held = sfx.pack(model, SparseConfig([Rule("*", Masked())]))
    assert {name: layer.pattern for name, layer in held.packed.items()} == {"0": "1:4", "2": "4:8"}


def test_a_pattern_that_saves_nothing_stays_dense():
    layer = nn.Linear(16, 8).bfloat16()
    with pytest.raises(PackError, match=r"7:8 would take \d+ bytes, dense takes 256"):
        sfx.pack(layer, config(NM(7, 8)))


# --- tied weights


def test_a_tied_weight_is_packed_once_or_not_at_all():
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "abc"})
    model["b"].weight = model["a"].weight
    embedded = nn.ModuleDict({"embed": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
    embedded["head"].weight = embedded["embed"].weight
    model["embedded"] = embedded
    report = sfx.pack(model, "2:4")
    tied = "one parameter for embedded.embed.weight and embedded.head.weight (tied weights)"
    assert report.skipped == {"embedded.head": tied}
    assert embedded["head"].weight is embedded["embed"].weight
    assert model["a"].weight_values is model["b"].weight_values
    assert report.packed["b"].after == 0
    assert report.before == 2 * 256
    held = {id(buffer): buffer.nbytes for buffer in model.buffers()}
    assert sum(held.values()) == report.after
    moved = copy.deepcopy(model).double()  # which gives each module a buffer of its own
    for packed in (model, moved):
        sfx.unpack(packed)
        assert packed["a"].weight is packed["b"].weight
        assert packed["a"].weight is not packed["c"].weight


def test_tied_weights_under_different_rules_stay_dense():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    model["b"].weight = model["a"].weight
    rules = [Rule("a", NM(1, 4)), Rule("*", NM(2, 4))]
    report = sfx.pack(model, SparseConfig(rules))
    assert list(report.packed) == ["c"]
    assert "tied weights" in report.skipped["a"]


def test_tied_layers_that_no_longer_hold_the_same_come_apart():
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "ab"})
    model["b"].weight = model["a"].weight
    sfx.pack(model, "2:4")
    model["b"].weight_values = model["b"].weight_values * 2
    sfx.unpack(model)
    assert torch.equal(2 * model["a"].weight, model["b"].weight)


# --- errors


def test_a_gradient_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 4, 1))
    sfx.pack(model, "2:4")
    model.requires_grad_(False)
    x = torch.randn(2, 8)
    model(x)  # nothing asks for a gradient
    for layer, value in ((model[0], x), (model[2], x.unsqueeze(-1))):
        said = (
            rf"layer '{layer.packing.layer}' is packed \(2:4\) and has no gradient: run the model"
        )
        with pytest.raises(PackError, match=said):
            layer(value.requires_grad_())
        layer.bias.requires_grad_()
        with pytest.raises(PackError, match=said):
            layer(value.detach())
        with torch.inference_mode():
            layer(value)


@torch.no_grad()
def test_other_misuses_are_told():
    layer = nn.Linear(8, 8)
    sfx.pack(layer, "2:4")
    with pytest.raises(PackError, match=r"takes \[..., 8\], but was given \(2, 16\)"):
        layer(torch.randn(2, 16))
    with pytest.raises(PackError, match=r"takes \[..., 8\], but was given \(\)"):
        layer(torch.tensor(1.0))
    for value in (nn.Parameter(torch.zeros(8, 8)), torch.zeros(8, 8)):
        with pytest.raises(PackError, match=r"takes no weight: call sparsefx.unpack"):
            layer.weight = value
    with pytest.raises(PackError, match=r"packed already \(2:4\)"):
        sfx.pack(layer, "2:4")
    assert "packed 2:4" in repr(layer)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "there is no linear or conv layer"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8)), "layer '1' is lazy"),
        (lambda: nn.Linear(8, 8, device="meta"), "on the meta device: load its weights first"),
        (lambda: torch.compile(nn.Linear(8, 8)), "pack the plain model, then compile it"),
        (lambda: torch.zeros(8, 8), "model is Tensor; pass an nn.Module"),
        (lambda: nn.Linear(6, 8), r"no layer can be packed \(weight: .*=6 is not a multiple of"),
    ],
)
def test_a_model_that_cannot_be_packed(model, said):
    with pytest.raises(PackError, match=said):
        sfx.pack(model(), "2:4")


def test_an_error_half_way_changes_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    nn.utils.prune.l1_unstructured(model[1], "weight", 0.75)
    sfx.sparsifiers.SRSTE(model, 2, 4, rules=["0"])
    rules = [Rule("2", NM(2, 4)), Rule("*", NM(2, 4))]
    before = [(type(layer), dict(vars(layer))) for layer in model]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    calls = []

    def fails(cls):
        calls.append(cls)
        if len(calls) == 2:
            raise MemoryError("injected")
        return modules.packed_class(cls)

    monkeypatch.setattr("sparsefx.packing.swap.packed_class", fails)
    with pytest.raises(MemoryError):
        sfx.pack(model, SparseConfig(rules))
    assert [type(layer) for layer in model] == [cls for cls, _ in before]
    assert [list(vars(layer)) for layer in model] == [list(held) for _, held in before]
    assert [id(parameter) for parameter in model.parameters()] == parameters
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
