"""Whole networks: convolutions with batch norm, attention, Hugging Face models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx

Permute = Callable[..., sfx.PermutationReport]


class ConvNet(nn.Module):
    """A stem, a residual block with depthwise and grouped convolutions, branches, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 32, 1, bias=False)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.depth_norm = nn.BatchNorm2d(32)
        self.project = nn.Conv2d(32, 16, 1)
        self.before_groups = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Conv2d(32, 16, 3, padding=1, groups=2)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 12, 1)
        self.joined = nn.Conv2d(20, 8, 3)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.fc, self.out = nn.Linear(8 * 9, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        inner = torch.relu(self.depth_norm(self.depthwise(self.expand(x))))
        x = x + self.project(inner)
        x = nn.functional.max_pool2d(self.grouped(torch.relu(self.before_groups(x))), 2)
        x = torch.cat([torch.relu(self.left(x)), torch.tanh(self.right(x))], 1)
        x = self.up(torch.relu(self.joined(x)))
        return self.out(torch.relu(self.fc(x.flatten(1))))


def test_a_convolutional_network(permute: Permute):
    model = ConvNet()
    report = permute(model, torch.randn(4, 3, 8, 8))
    blocks = {one.layers: (one.size, one.blocks) for one in report.classes}
    assert blocks[("expand", "before_groups")] == (16, 1)
    assert blocks[("project",)] == (32, 1)
    assert blocks[("grouped",)] == (16, 2)
    assert {"left", "right"} <= {name for names in blocks for name in names}
    joined = [one.size for one in report.classes if one.layers == ("joined",)]
    assert sorted(joined) == [8, 12]
    stream = next(one for one in report.classes if "expand" in one.layers)
    assert ("stem_norm.running_var", 0) in stream.tensors
    assert ("project.weight", 0) in stream.tensors
    assert "not a multiple of m=4" in report.why("stem")
    assert "1 channels" in report.why("depthwise")
    assert "transposed convolution" in report.why("up")
    assert "scattered" in report.why("fc")
    for name in ("expand", "project", "grouped", "joined"):
        (row,) = (row for row in report.layers if row.layer == name)
        assert row.after > row.before, name


def test_training_goes_on_as_before(permute: Permute):
    """Batch statistics, gradients and the updates of buffers are those of the model as it was."""
    model = ConvNet().double()
    before = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8).double()
    report = sfx.permute_channels(model, (x,))
    (stream,) = (one for one in report.classes if "expand" in one.layers)
    order = torch.tensor(stream.order[0])
    assert model.training
    for net in (before, model):
        net.train()
        net(x).square().mean().backward()
    torch.testing.assert_close(model(x), before(x))
    for name in ("running_mean", "running_var"):
        was, now = getattr(before.stem_norm, name), getattr(model.stem_norm, name)
        torch.testing.assert_close(now, was[order])
    torch.testing.assert_close(model.stem.weight.grad, before.stem.weight.grad[order])


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_encoder_layer(batch_first: bool, permute: Permute):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, dropout=0.1)
    model = nn.Sequential(nn.Linear(8, 32), layer, nn.Linear(32, 4))
    report = permute(model, torch.randn(3, 5, 8))
    sizes = {one.layers: (one.size, one.blocks) for one in report.classes}
    assert sizes[("1.self_attn.out_proj",)] == (8, 4)
    assert sizes[("1.linear2",)] == (64, 1)
    assert (32, 1) in sizes.values()


class CrossAttention(nn.Module):
    """A decoder's attention: keys and values of another width, a mask, weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.tell = nn.Linear(8, 32), nn.Linear(8, 16)
        self.attn = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=True)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        told = self.tell(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, weights = self.attn(self.ask(x), told, told, attn_mask=mask)
        return self.out(y) + weights.sum(-1, keepdim=True)


def test_attention_across(permute: Permute):
    report = permute(CrossAttention(), torch.randn(3, 5, 8))
    sizes = {one.layers: (one.size, one.blocks) for one in report.classes}
    assert sizes[("attn.out_proj",)] == (8, 4)
    assert sizes[("attn", "attn")] == (16, 1)  # keys and values


class FusedAttention(nn.Module):
    """One product for queries, keys and values, viewed as [3, heads, channels]."""

    def __init__(self, norm: bool = False, talk: bool = False) -> None:
        super().__init__()
        self.into, self.qkv, self.proj = nn.Linear(8, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()
        self.talk = nn.Parameter(torch.randn(4, 4)) if talk else None
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.talk is not None:  # heads read each other's values
            v = v + torch.einsum("gh,bhnd->bgnd", self.talk, v)
        scores = self.norm(q) @ self.norm(k).mT
        return self.out(x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("options", "blocks"), [({}, 4), ({"norm": True}, 1), ({"talk": True}, 1)], ids=str
)
def test_heads_move_apart_only_where_nothing_ties_them(
    options: dict[str, bool], blocks: int, permute: Permute
):
    report = permute(FusedAttention(**options), torch.randn(2, 5, 8))
    sizes = {one.layers: (one.size, one.blocks) for one in report.classes}
    assert sizes[("proj",)] == (8, blocks)
    assert ("qkv.weight", 0) in {pair for one in report.classes for pair in one.tensors}


class GroupedQueries(nn.Module):
    """Two heads of keys and values for four of queries."""

    def __init__(self, flag: bool) -> None:
        super().__init__()
        self.into, self.out, self.flag = nn.Linear(8, 32), nn.Linear(32, 4), flag
        self.q, self.kv, self.proj = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        if not self.flag:  # in the other order than enable_gqa repeats them
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.flag)
        return self.out(torch.relu(self.proj(y.transpose(1, 2).flatten(2))))


@pytest.mark.parametrize("flag", [True, False])
def test_grouped_queries(flag: bool, permute: Permute):
    report = permute(GroupedQueries(flag), torch.randn(2, 5, 8))
    assert {one.layers: (one.size, one.blocks) for one in report.classes} == {
        ("q", "kv"): (32, 1),
        ("proj",): (8, 2),
    }


class Experts(nn.Module):
    """Stacked weights, as [experts, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.up, self.down = (nn.Parameter(torch.randn(3, *s)) for s in ((16, 32), (32, 16)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(x + (torch.relu(x.expand(3, *x.shape) @ self.up) @ self.down).sum(0))


def test_stacked_experts(permute: Permute):
    """Hidden channels move apart in each expert; the stream is one for all."""
    report = permute(Experts(), torch.randn(5, 8))
    sizes = {one.layers: (one.size, one.blocks) for one in report.classes}
    assert sizes == {("up",): (16, 1), ("down",): (32, 3)}


def zoo() -> dict[str, Callable[[Any], Any]]:
    """Hugging Face models, by name: what makes them of the package."""
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "GPT2LMHeadModel": lambda tf: tf.GPT2Config(
            **text, n_positions=16, n_embd=32, n_layer=1, n_head=4, use_cache=False
        ),
        "BertForSequenceClassification": lambda tf: tf.BertConfig(
            **small, vocab_size=64, intermediate_size=64, max_position_embeddings=16
        ),
        "LlamaForCausalLM": lambda tf: tf.LlamaConfig(
            **small, **text, num_key_value_heads=2, intermediate_size=64, use_cache=False
        ),
        "ViTForImageClassification": lambda tf: tf.ViTConfig(
            **small, intermediate_size=64, image_size=12, patch_size=4, num_channels=4
        ),
        "ResNetForImageClassification": lambda tf: tf.ResNetConfig(
            embedding_size=16, hidden_sizes=[32], depths=[2], layer_type="bottleneck"
        ),
    }


CLASSES = {  # the sizes of classes, with their blocks, that have to be found
    "GPT2LMHeadModel": {(32, 1), (128, 1), (8, 4)},
    "BertForSequenceClassification": {(32, 1), (64, 1), (8, 4)},
    "LlamaForCausalLM": {(32, 1), (64, 1), (8, 2)},
    "ViTForImageClassification": {(32, 1), (64, 1), (8, 4)},
    "ResNetForImageClassification": {(32, 1), (16, 1), (8, 1)},
}


class Logits(nn.Module):
    """A Hugging Face model that returns a tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x).logits


@pytest.mark.parametrize("name", CLASSES)
def test_hugging_face(name: str, permute: Permute):
    transformers = pytest.importorskip("transformers")
    model = Logits(getattr(transformers, name)(zoo()[name](transformers)))
    if "Image" in name:
        x = torch.randn(2, 3 if "ResNet" in name else 4, 12, 12)
    else:
        x = torch.randint(3, 64, (2, 7))
    report = permute(model, x, **({"rtol": 1e-5} if "Llama" in name else {}))
    assert {(one.size, one.blocks) for one in report.classes} == CLASSES[name], report
    counted = [row for row in report.layers if row.total]
    assert sum(row.after > row.before for row in counted) >= len(counted) / 2
    assert report.after > report.before
