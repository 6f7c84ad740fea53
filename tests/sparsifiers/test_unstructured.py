"""Masks without groups: the common life of sparsifiers, rules and checkpoints with them."""

import pytest
import torch
from torch import nn

from sparsefx import NM, Dense, Masked, Rule
from sparsefx.errors import ConfigError, SparsifierError
from sparsefx.sparsifiers import Sparsifier, Unstructured
from sparsefx.sparsifiers.unstructured import numbers_of, written


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def half(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.rand(model[int(name)].weight.shape) < 0.5 for name in ("0", "2")}


def test_one_life_with_masks_that_are_given():
    model = net()
    masks = half(model)
    owner = Sparsifier(model, Unstructured(0.5), masks=masks)
    assert "unstructured 0.5" in str(owner.report())
    assert "unstructured 0.5, straight_through=True" in str(model)
    x = torch.randn(4, 5)
    kept = nn.functional.linear(x, model[0].parametrizations.weight.original * masks["0"])
    torch.testing.assert_close(model[0](x), kept + model[0].bias)
    owner.step()
    assert owner.steps == 1
    owner.squash()
    assert torch.equal(model[2].weight != 0, masks["2"])


def test_a_method_without_a_mask_of_its_own_says_so():
    model = net()
    with pytest.raises(SparsifierError, match=r"makes no mask for unstructured 0.5: pass masks="):
        Sparsifier(model, Unstructured(0.5), masks={"0": half(model)["0"]})
    assert type(model[0]) is nn.Linear


def test_rules_say_masked_or_dense():
    model = net()
    rules = [Rule("0", forward=Dense()), Rule("*", forward=Masked())]
    owner = Sparsifier(model, Unstructured(0.5), rules, masks={"2": half(model)["2"]})
    assert list(owner.layers) == ["2"]
    assert owner.skipped == {"0": "the rule says Dense()"}
    with pytest.raises(SparsifierError, match=r"says 2:4; this sparsifier has masks of its own"):
        Sparsifier(net(), Unstructured(0.5), [Rule("*", forward=NM(2, 4))])


def test_a_checkpoint_of_another_density_is_refused():
    one, other, model = net(), net(), net()
    Sparsifier(one, Unstructured(0.5), masks=half(one))
    Sparsifier(other, Unstructured(0.25), masks=half(other))
    with pytest.raises(SparsifierError, match=r"is unstructured 0.5, this sparsifier's is .* 0.25"):
        other.load_state_dict(one.state_dict())
    Sparsifier(model, Unstructured(0.5), masks=half(model))
    model.load_state_dict(one.state_dict())
    assert torch.equal(model[0].weight, one[0].weight)


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(), Unstructured(1 / 3), Unstructured(0.1, "filter"), NM(2, 4, transposable=True)],
    ids=str,
)
def test_three_numbers_hold_a_pattern(pattern):
    assert written(list(numbers_of(pattern))) == str(pattern)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), r"density=0.0 must be in \(0, 1\]"),
        ((1.5,), r"density=1.5 must be in \(0, 1\]"),
        ((0.5, "row"), "unit='row' is not one of"),
    ],
)
def test_what_is_no_pattern(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Unstructured(*arguments)


def test_a_squash_brings_several_weights_of_a_module_back_in_their_order():
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    names = list(model._parameters)
    targets = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    masks = {name: torch.rand(getattr(model, name).shape) < 0.5 for name in targets}
    masks["out_proj"] = torch.rand(8, 8) < 0.5
    Sparsifier(model, Unstructured(0.5), masks=masks).squash()
    assert list(model._parameters) == names
