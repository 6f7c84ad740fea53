"""state_dict, copies, pickles; models that carry masks; compiled models; those of transformers."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparsefx as sfx
from sparsefx import NM, PackError, Rule, SparseConfig, SparsifierError


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))


@torch.no_grad()
def outputs(model, seed=7):
    return model(torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)))


def test_a_state_dict_goes_into_another_packed_model():
    one, two = small(0), small(1)
    for model in (one, two):
        sfx.pack(model, "2:4")
    assert list(one.state_dict()) == [
        "0.bias",
        "0.weight_values",
        "0.weight_codes",
        "0.weight_pattern",
        "2.weight_values",
        "2.weight_codes",
        "2.weight_pattern",
    ]
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(outputs(two), outputs(one))
    sfx.unpack(one)
    sfx.unpack(two)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_another_pattern_or_a_dense_checkpoint_is_refused():
    model, other, dense = small(), nn.Linear(48, 2), small()
    sfx.pack(model, "2:4")
    before = outputs(model)
    with pytest.raises(RuntimeError, match=r"0.weight is dense, but the layer is packed"):
        model.load_state_dict(dense.state_dict(), strict=False)
    assert torch.equal(outputs(model), before)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_values"):
        dense.load_state_dict(model.state_dict())
    twin = copy.deepcopy(other)
    sfx.pack(other, SparseConfig([Rule("*", NM(3, 6))]))
    sfx.pack(twin, SparseConfig([Rule("*", NM(4, 8))]))
    assert other.weight_codes.shape == twin.weight_codes.shape  # only the pattern tells them apart
    with pytest.raises(RuntimeError, match="weight is packed 4:8, but the layer is packed 3:6"):
        other.load_state_dict(twin.state_dict())


def test_copies_and_pickles():
    model = small()
    sfx.pack(model, "2:4")
    wanted = outputs(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), copy.copy(model), torch.load(file, weights_only=False)):
        assert torch.equal(outputs(again), wanted)
        assert type(again[0]) is type(model[0])
        assert isinstance(again[0], nn.Linear)
        assert type(sfx.unpack(copy.deepcopy(again))[0]) is nn.Linear
    assert type(model[0]).__name__ == "PackedLinear"


# --- masks that a model carries


def sr_ste(model):
    sfx.sparsifiers.SRSTE(model, 2, 4)


def transposable(model):
    sfx.sparsifiers.TransposableNM(model, 2, 4)


def squashed(model):
    sfx.sparsifiers.SRSTE(model, 2, 4).squash()


def wanda(model):
    sfx.sparsifiers.Wanda(model, 2, 4).calibrate([torch.randn(16, 16)])


def pruned(model):
    for layer in (model[0], model[2]):
        mask = sfx.masks.nm_mask(torch.randn_like(layer.weight), 2, 4)
        prune.custom_from_mask(layer, "weight", mask)


@pytest.mark.parametrize("cfg", [None, "2:4"])
@pytest.mark.parametrize("mask", [sr_ste, transposable, squashed, wanda, pruned])
def test_masks_are_packed_as_they_are(mask, cfg):
    model = small()
    mask(model)
    wanted = outputs(model)
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    report = sfx.pack(model, cfg)
    assert [layer.pattern for layer in report.layers] == ["2:4", "2:4"]
    torch.testing.assert_close(outputs(model), wanted)
    assert {key.rpartition(".")[2] for key in model.state_dict()} == {
        "bias",
        "weight_values",
        "weight_codes",
        "weight_pattern",
    }
    sfx.unpack(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight"]
    assert all(map(torch.equal, (model[0].weight, model[2].weight), weights))
    assert not model[0]._forward_pre_hooks


def test_a_mask_acts_whatever_the_rule_says():
    model = small()
    prune.custom_from_mask(model[0], "weight", torch.arange(8).view(8, 1).expand(8, 16) > 3)
    mask = sfx.masks.nm_mask(torch.randn(8, 8), 1, 8)
    prune.custom_from_mask(model[2], "weight", mask)
    report = sfx.pack(model, SparseConfig([Rule("*", NM(4, 8))]))
    assert report.skipped == {"0": "the zeros of its mask follow no N:M pattern"}
    assert report.packed["2"].pattern == "4:8"
    assert not (model[2].weight * ~mask).any()


def test_a_sparsifier_whose_mask_was_packed_says_so():
    model = small()
    sparsifier = sfx.sparsifiers.SRSTE(model, 2, 4)
    sfx.pack(model)
    for call in (sparsifier.step, sparsifier.squash, sparsifier.attach, sparsifier.report):
        with pytest.raises(
            SparsifierError, match=r"mask of layer '0' is no longer .*sparsefx.pack"
        ):
            call()
    model.load_state_dict(model.state_dict())


# --- compiled


@pytest.mark.parametrize("backend", ["aot_eager", "sparsefx"])
def test_a_packed_model_compiles_as_one_graph(backend):
    conv = nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 4, 1))
    model = nn.Sequential(small(), conv)
    sfx.pack(model, "2:4")
    wanted = outputs(model)
    options = {"config": {"rules": [], "codegen": "aot_eager"}} if backend == "sparsefx" else None
    compiled = torch.compile(model, backend=backend, fullgraph=True, options=options)
    torch.testing.assert_close(outputs(compiled), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(outputs(compiled), outputs(model), rtol=2e-2, atol=2e-2)


def test_rules_leave_packed_layers_as_they_are():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(32, 8))
    x = torch.randn(2, 8, 6)
    sfx.pack(model, "2:4")
    with torch.no_grad():
        report = sfx.explain(model, config="2:4-transposable")(x)
        assert [(row.layer, row.decision) for row in report.sites] == [("0", None)]
        assert "its weight is packed" in report.sites[0].reason
        options = {"config": {"codegen": "aot_eager"}}
        compiled = torch.compile(model, backend="sparsefx", options=options)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_compiled_model_follows_packing_and_unpacking():
    model = small()
    compiled = torch.compile(model, backend="aot_eager")
    dense = outputs(compiled)
    sfx.pack(model, "2:4")
    packed = outputs(compiled)
    assert not torch.equal(packed, dense)
    torch.testing.assert_close(packed, outputs(model))
    with pytest.raises(PackError, match="has no gradient"):
        compiled(torch.randn(3, 16))
    sfx.unpack(model)
    torch.testing.assert_close(outputs(compiled), packed)


# --- transformers


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            pad_token_id=0,
        )
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=32,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_models_of_transformers(make):
    model, ids = make().eval(), torch.arange(10).view(2, 5)
    sfx.sparsifiers.SRSTE(model, 2, 4, rules=["*layer*", "*.h.*"][make is gpt2 :][:1]).squash()
    with torch.no_grad():
        wanted = model(ids).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = sfx.pack(model)
    assert len(report.packed) == {llama: 7, gpt2: 4, bert: 6}[make]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted)
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, wanted)
    if make is gpt2:
        assert model.lm_head.weight is model.transformer.wte.weight
    if make is not bert:
        made = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert made.shape == (1, 9)
    sfx.unpack(model)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
