"""Heads of attention, Hugging Face models, masks of sparsifiers and of torch."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsefx as sfx
from sparsefx.compact.heads import FewerHeads
from sparsefx.sparsifiers import SRSTE

Compact = Callable[..., sfx.Compacted]
Mask = Callable[..., Tensor]


class _Attending(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True, **options)
        self.need_weights = False

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.attention(x, y, y, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 10, "bias": False}])
def test_heads_of_multihead_attention(compact: Compact, mask_smallest: Mask, options: Any):
    model = _Attending(**options)
    kept = mask_smallest(model.attention.out_proj.weight, 0.5, 1, 6)
    y = torch.randn(2, 7, options.get("kdim", 24))
    plan, small = compact(model, torch.randn(2, 5, 24), y)
    assert isinstance(small.attention, FewerHeads)
    assert small.attention.num_heads == 2
    assert {gone.kept for gone in plan.channels} == {tuple(kept.tolist())}
    assert type(model.attention) is nn.MultiheadAttention


def _calls() -> list[dict[str, Any]]:
    causal = torch.ones(5, 5).triu(1).bool()
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    return [
        {},
        {"need_weights": False, "attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "key_padding_mask": padding, "average_attn_weights": False},
        {"attn_mask": torch.randn(5, 5, dtype=torch.float64), "need_weights": False},
    ]


@pytest.mark.parametrize("batch_first", [True, False])
def test_fewer_heads_attends_like_the_original(mask_smallest: Mask, batch_first: bool):
    layer = nn.MultiheadAttention(24, 4, batch_first=batch_first).double().eval()
    kept = mask_smallest(layer.out_proj.weight, 0.5, 1, 6)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    given = x if batch_first else x.transpose(0, 1)
    _, small = sfx.compact_channels(_Self(layer).eval(), given)
    for call in _calls():
        want, weights = layer(given, given, given, **call)
        out, found = small.layer(given, given, given, **call)
        torch.testing.assert_close(out, want)
        if weights is None:
            assert found is None
        elif weights.dim() == 4:
            torch.testing.assert_close(found, weights[:, kept])
        else:  # the mean over the heads that stayed
            assert found.shape == weights.shape
    torch.testing.assert_close(small.layer(x[0], x[0], x[0])[0], layer(x[0], x[0], x[0])[0])
    with pytest.raises(sfx.CompactError, match="attn_mask holds 4 heads, this attention 2"):
        small.layer(given, given, given, attn_mask=torch.zeros(8, 5, 5))


class _Self(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


def test_an_encoder_of_torch(compact: Compact, mask_smallest: Mask):
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    for part in model.layers:
        mask_smallest(part.self_attn.out_proj.weight, 0.25, 1, 6)
        mask_smallest(part.linear1.weight, 0.5)
    plan, small = compact(model, torch.randn(2, 5, 24))
    assert small.layers[1].self_attn.num_heads == 3
    assert small.layers[1].linear1.out_features == 16
    assert "layers.0.linear2" in plan.folded or plan.why("layers.0.linear1.weight") == ""


def test_attention_with_bias_for_keys_keeps_its_heads(compact: Compact, mask_smallest: Mask):
    model = _Attending(add_bias_kv=True)
    mask_smallest(model.attention.out_proj.weight, 0.5, 1, 6)
    plan, _ = compact(model, torch.randn(2, 5, 24), torch.randn(2, 7, 24))
    assert plan.tensors == ()
    assert plan.why("attention.out_proj.weight")


# --- Hugging Face

_BLOCKS = {  # model -> (MLP: layer and dimension, attention: layer, dimension and width of a head)
    "gpt2-small": (("mlp.c_fc", 1), ("attn.c_proj", 0, 8)),
    "bert": (("intermediate.dense", 0), ("attention.output.dense", 1, 8)),
    "llama": (("mlp.gate_proj", 0), ("self_attn.o_proj", 1, 16)),  # both heads of a key
}


@pytest.fixture(scope="module")
def zoo() -> Any:
    pytest.importorskip("transformers")
    path = Path(__file__).parents[1] / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("compact_zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compact_zoo"] = module
    spec.loader.exec_module(module)
    yield module._ZOO
    del sys.modules["compact_zoo"]


def _build(zoo: Any, name: str) -> Any:
    torch.manual_seed(1)
    case = zoo[name]()
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    case.model.eval()
    for module in list(case.model.modules()):  # one block says it all
        for label, part in list(module.named_children()):
            if isinstance(part, nn.ModuleList) and len(part) > 1 and label in ("layer", "layers"):
                setattr(module, label, part[:1])
    return case


@pytest.mark.parametrize("name", _BLOCKS)
def test_heads_and_neurons_of_hugging_face_models(zoo: Any, name: str, mask_smallest: Mask):
    case = _build(zoo, name)
    mlp, attention = _BLOCKS[name]
    masked = {}
    for path, module in case.model.named_modules():
        if path.endswith(mlp[0]):
            masked[path] = len(mask_smallest(module.weight, 0.5, mlp[1])), mlp[1]
        elif path.endswith(attention[0]):
            kept = len(mask_smallest(module.weight, 0.5, *attention[1:]))
            masked[path] = kept * attention[2], attention[1]
    assert masked
    plan, small = sfx.compact_channels(case.model, (), kwargs=case.inputs)
    with torch.no_grad():
        want, got = case.model(**case.inputs).logits, small(**case.inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for path, (size, dim) in masked.items():
        assert small.get_submodule(path).weight.shape[dim] == size, path
        assert plan.why(f"{path}.weight") == ""
    assert plan.error < 1e-10
    assert plan.macs_after < 0.8 * plan.macs_before


def test_a_residual_network_of_hugging_face(zoo: Any, mask_smallest: Mask):
    """The stream dies where both writers are dead, and batch norm leaves nothing."""
    case = _build(zoo, "resnet-small")
    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -0.1)
        elif isinstance(module, nn.Conv2d):
            mask_smallest(module.weight, 0.5)
    plan, small = sfx.compact_channels(case.model, (), kwargs=case.inputs)
    with torch.no_grad():
        want, got = case.model(**case.inputs).logits, small(**case.inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    inner = [m for n, m in small.named_modules() if n.endswith("layer.1.convolution")]
    assert [(m.in_channels, m.out_channels) for m in inner] == [(2, 2)]
    assert small.resnet.embedder.embedder.convolution.out_channels < 16
    assert plan.macs_after < 0.8 * plan.macs_before


# --- masks


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def test_masks_of_a_sparsifier_squashed_or_not():
    x, model = torch.randn(4, 8), _mlp()
    sparsifier = SRSTE(model)
    mask = model[2].parametrizations.weight[0].mask
    with torch.no_grad():
        mask[:, :6] = False  # neurons that nobody reads
    plan, small = sfx.compact_channels(model, x)
    torch.testing.assert_close(small(x), model(x))
    assert small[0].out_features == 10
    assert type(small[2]) is nn.Linear
    assert set(small.state_dict()) == set(_mlp().state_dict())
    sparsifier.squash()
    _, again = sfx.compact_channels(model, x)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert plan.checked == "float64"


def test_masks_of_torch_prune():
    x, model = torch.randn(4, 8), _mlp()
    prune.ln_structured(model[2], "weight", amount=0.5, n=1, dim=1)
    _, small = sfx.compact_channels(model, x)
    torch.testing.assert_close(small(x), model(x))
    assert small[0].out_features == 8
    assert prune.is_pruned(model)
    assert not prune.is_pruned(small)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype):
    model, x = _mlp().to(dtype), torch.randn(4, 8, dtype=dtype)
    with torch.no_grad():
        model[0].weight[:4] = 0  # relu(bias) is folded
    plan, small = sfx.compact_channels(model, x)
    assert small[0].weight.dtype == small[2].bias.dtype == dtype
    assert small[0].out_features == 12
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-10
    torch.testing.assert_close(small(x), model(x), rtol=tolerance, atol=tolerance)
    assert plan.error < 1e-10


def test_the_small_model_compiles_with_the_backend(mask_smallest: Mask):
    model, x = _mlp(), torch.randn(4, 8)
    mask_smallest(model[2].weight, 0.5, 1)
    _, small = sfx.compact_channels(torch.compile(model), x)
    config = sfx.SparseConfig(rules=[], codegen="aot_eager")
    compiled = torch.compile(small, backend="sparsefx", options={"config": config})
    torch.testing.assert_close(compiled(x), model(x))


# --- refusals


class _Random(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.add_(1.0)
        return super().forward(x)


class _Nothing(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).tolist()


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (_mlp, {"round_to": 0}, "round_to=0: give a number of channels, 1 or more"),
        (_mlp, {"round_to": True}, "round_to=True: give"),
        (lambda: _mlp().to("meta"), {}, "'0.weight' has no values yet; load the weights"),
        (lambda: nn.LazyLinear(4), {}, "'weight' has no values yet"),
        (lambda: _Random(8, 4), {}, "differs by .* between two runs on the same inputs"),
        (lambda: _Nothing(8, 4), {}, "returns no tensor .* wrap it in a module"),
    ],
)
def test_what_cannot_be_compacted_is_refused(build: Any, options: Any, message: str):
    with pytest.raises(sfx.CompactError, match=message):
        sfx.compact_channels(build(), torch.randn(3, 8), **options)


def test_a_model_that_no_smaller_one_equals_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The message names the tensors, and nothing was changed."""
    from sparsefx.compact.trial import Reference

    model = _mlp()
    with torch.no_grad():
        model[2].weight[:, :4] = 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    right, calls = Reference.error, []

    def wrong(self: Any, outputs: Any) -> tuple[float, str]:
        calls.append(1)
        return right(self, outputs) if len(calls) == 1 else (0.5, "output 0 [4, 4]")

    monkeypatch.setattr(Reference, "error", wrong)
    with pytest.raises(sfx.CompactError, match=r"differs by 5.0e-01.*1e-05.*nothing was changed"):
        sfx.compact_channels(model, torch.randn(4, 8))
    assert all(torch.equal(model.state_dict()[name], was) for name, was in before.items())
