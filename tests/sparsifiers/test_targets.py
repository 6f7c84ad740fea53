"""find_targets: what is masked, skipped and why, or an error that leaves the model untouched."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparsefx import NM, ConfigError, Dense, Rule, Sampled, SparsifierError
from sparsefx.masks import is_valid
from sparsefx.sparsifiers import SRSTE, Sparsifier, Target, find_targets

PATTERN = NM(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=1)
        self.body = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 12)})
        self.head = nn.Linear(12, 6)


def names(found: list[tuple[Target, NM]]) -> list[str]:
    return [target.name for target, _ in found]


def test_without_rules_all_supported_layers_take_the_pattern():
    found, skipped = find_targets(Net(), None, PATTERN)
    assert names(found) == ["conv", "body.a", "body.b", "head"]
    assert {pattern for _, pattern in found} == {PATTERN}
    assert skipped == {}


def test_the_first_matching_rule_decides():
    wide = NM(1, 4, transposable=True)
    rules = [
        Rule("body.a", forward=wide),
        Rule(lambda target: target.kind == "conv", forward=Dense()),
        nn.ModuleDict,
        "head",
    ]
    found, skipped = find_targets(Net(), rules, PATTERN)
    assert [(t.name, p) for t, p in found] == [
        ("body.a", wide),
        ("body.b", PATTERN),
        ("head", PATTERN),
    ]
    assert skipped == {"conv": "the rule says Dense()"}


def test_layers_without_a_rule_are_left_alone():
    found, skipped = find_targets(Net(), ["body.*"], PATTERN)
    assert names(found) == ["body.a", "body.b"]
    assert skipped == {"conv": "no rule matches", "head": "no rule matches"}


def test_the_root_itself_may_be_the_layer():
    (target, _), *others = find_targets(nn.Linear(8, 8), None, PATTERN)[0]
    assert (target.name, others) == ("weight", [])


@pytest.mark.parametrize(
    ("module", "axis", "kind"),
    [
        (nn.Linear(8, 6), 1, "linear"),
        (nn.Conv1d(8, 6, 3), 1, "conv"),
        (nn.Conv2d(16, 6, (3, 1), groups=2), 1, "conv"),
        (nn.Conv3d(8, 6, (1, 2, 3)), 1, "conv"),
    ],
)
def test_layouts(module: nn.Module, axis: int, kind: str):
    sparsifier = SRSTE(nn.Sequential(module))
    layer = sparsifier.layers["0"]
    assert (layer.target.kind, layer.target.axis) == (kind, axis)
    mask = sparsifier.masks()["0"]
    assert mask.shape == layer.weight.shape
    assert is_valid(mask, 2, 4, dim=axis)
    assert mask.float().mean() == 0.5
    assert layer.target.matrix(layer.weight).shape == layer.weight.shape


def test_hugging_face_conv1d_is_stored_transposed():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(transformers.Conv1D(6, 8))  # weight [in=8, out=6]
    sparsifier = SRSTE(model)
    layer = sparsifier.layers["0"]
    assert (layer.target.kind, layer.target.axis) == ("conv1d", 0)
    assert layer.target.matrix(layer.weight).shape == (6, 8)
    assert torch.equal(layer.target.unmatrix(layer.target.matrix(layer.weight)), layer.weight)
    assert is_valid(sparsifier.masks()["0"], 2, 4, dim=0)
    x = torch.randn(3, 8)
    expected = x @ (layer.weight * layer.mask.mask) + model[0].bias
    torch.testing.assert_close(model(x), expected)


def test_attention_projections():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    sparsifier = SRSTE(nn.ModuleDict({"mha": model}))
    assert list(sparsifier.layers) == ["mha.in_proj_weight", "mha.out_proj"]
    x = torch.randn(2, 5, 8)
    got = model(x, x, x)[0]
    assert is_valid(model.in_proj_weight, 2, 4)
    model.eval()
    with torch.no_grad():  # the fused path
        torch.testing.assert_close(model(x, x, x)[0], got)


def test_attention_with_other_key_sizes():
    model = nn.MultiheadAttention(8, 2, kdim=4, vdim=12)
    found, _ = find_targets(nn.ModuleDict({"mha": model}), None, PATTERN)
    stems = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert names(found) == [*(f"mha.{stem}" for stem in stems), "mha.out_proj"]


def test_skips_give_their_reason():
    model = nn.ModuleDict(
        {
            "odd": nn.Linear(6, 8),
            "wide": nn.Linear(8, 6),
            "conv": nn.Conv2d(6, 8, 1, groups=2),
            "outs": nn.Conv2d(8, 12, 1, groups=2),
            "depth": nn.Conv1d(8, 8, 3, groups=8),
            "up": nn.ConvTranspose2d(8, 8, 2),
            "whole": nn.Linear(8, 8),
            "pruned": prune.l1_unstructured(nn.Linear(8, 8), "weight", 3),
            "normed": parametrizations.weight_norm(nn.Linear(8, 8)),
            "cplx": nn.Linear(8, 8, dtype=torch.complex64),
            "left": nn.Linear(8, 8),
        }
    )
    model["tied"] = nn.Linear(8, 8)
    model["tied"].weight = model["left"].weight
    tied = "one parameter for left.weight and tied.weight (tied weights)"
    found, skipped = find_targets(model, None, NM(2, 4, transposable=True))
    assert names(found) == ["whole"]
    assert skipped == {
        "odd": "weight (8, 6): in_features=6 is not a multiple of m=4",
        "wide": "weight (6, 8): out_features=6 is not a multiple of m=4 (transposable)",
        "conv": "weight (8, 3, 1, 1): input channels per group=3 is not a multiple of m=4",
        "outs": "weight (12, 4, 1, 1): output channels per group=6 is not a multiple of m=4 "
        "(transposable)",
        "depth": "depthwise convolution: one input channel per group",
        "up": "transposed convolution",
        "pruned": "weight is no parameter: something else computes it (torch.nn.utils.prune, "
        "weight_norm, spectral_norm); remove that first",
        "normed": "its weight is already parametrized by _WeightNorm",
        "cplx": "dtype torch.complex64 is not a real floating-point type",
        "left": tied,
        "tied": tied,
    }


def test_an_embedding_tied_to_the_head_is_named():
    model = nn.ModuleDict({"emb": nn.Embedding(12, 8), "head": nn.Linear(8, 12)})
    model["head"].weight = model["emb"].weight
    model["fc"] = nn.Linear(8, 8)
    sparsifier = SRSTE(model)
    assert sparsifier.skipped == {
        "head": "one parameter for emb.weight and head.weight (tied weights)"
    }


def test_one_module_under_two_names_is_masked_once():
    layer = nn.Linear(8, 8)
    found, skipped = find_targets(nn.ModuleList([layer, layer]), None, PATTERN)
    assert (names(found), skipped) == (["0"], {})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("body.*", r"rules='body.\*' must be None or a list"),
        ([3], r"rules holds 3; pass a Rule, a glob on names or a type"),
        ([Rule("head", forward=Sampled(0.5))], r"rule 'head' says sampled 0.5; a sparsifier takes"),
        ([Rule("head", forward=NM(2, 4, decay=0.1))], r"rule 'head' says NM\(.*give decay"),
        (["nothing.*"], r"rule 'nothing.\*' matches no layer; there are: conv, body.a"),
        (["*", nn.LSTM], r"LSTM.* matches no layer"),
        ([Rule("*")], r"no layer is left to sparsify \(conv: the rule says Dense\(\); body.a"),
        ([], r"no layer is left to sparsify \(conv: no rule matches"),
    ],
)
def test_bad_rules(rules, message, snapshot):
    model = Net()
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=message):
        SRSTE(model, rules=rules)
    before.assert_same()


def test_bad_models(snapshot):
    with pytest.raises(SparsifierError, match=r"model is dict; pass an nn.Module"):
        SRSTE({})
    with pytest.raises(SparsifierError, match=r"the model has no linear or conv layer"):
        SRSTE(nn.ReLU())
    with pytest.raises(SparsifierError, match=r"layer 'head' is lazy and has no weight yet"):
        SRSTE(nn.ModuleDict({"head": nn.LazyLinear(8)}))
    model = Net()
    with torch.no_grad():
        model.head.weight[3, 4] = math.nan
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=r"layer 'head' holds NaN in its weight \(6, 12\)"):
        SRSTE(model)
    before.assert_same()


def test_a_meta_tensor_is_an_error():
    model = Net().to("meta")
    types = [type(module) for module in model.modules()]
    with pytest.raises(SparsifierError, match=r"layer 'conv' is on the meta device: materialise"):
        SRSTE(model)
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 4), (0, 4), (2, 1000), (2.0, 4)])
def test_a_bad_pattern_is_a_config_error(n, m, snapshot):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"NM: [nm]="):
        SRSTE(model, n, m)
    before.assert_same()


def test_a_second_sparsifier_is_an_error(snapshot):
    model = Net()
    SRSTE(model, rules=["body.*"])
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=r"already on layer 'body.a': squash\(\) it first"):
        SRSTE(model)
    before.assert_same()
    others = SRSTE(model, rules=["conv", "head"])  # on layers that carry none
    assert list(others.layers) == ["conv", "head"]


def test_a_mask_of_another_shape_is_an_error(snapshot):
    model = Net()
    before = snapshot(model)
    with pytest.raises(
        SparsifierError,
        match=r"'head' is torch.bool \(12, 6\); pass torch.bool \(6, 12\)",
    ):
        Sparsifier(model, PATTERN, masks={"head": torch.ones(12, 6, dtype=torch.bool)})
    before.assert_same()


def test_known_masks_are_taken():
    mask = torch.rand(6, 12) > 0.5
    sparsifier = Sparsifier(Net(), PATTERN, ["head"], masks={"head": mask})
    assert torch.equal(sparsifier.masks()["head"], mask)
    mask.zero_()
    assert sparsifier.density() > 0
