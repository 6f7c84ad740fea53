"""What must stay as it is, what is asked of the arguments, and the guard behind it all."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import sparsefx as sfx
from sparsefx.errors import MaskError, PermutationError
from sparsefx.permutation import maths, propagate

Permute = Callable[..., sfx.PermutationReport]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def refused(report: sfx.PermutationReport, layer: str, reason: str) -> None:
    assert re.search(reason, report.why(layer)), report.why(layer)
    assert all(layer not in one.layers for one in report.classes)


def test_an_output_is_left_alone(permute: Permute):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            hidden = self.net[0](x)
            return self.net[1:](hidden), hidden

    refused(permute(Two(), torch.randn(3, 8)), "net.2", "it reaches an output of the model")


def test_an_input_is_left_alone(permute: Permute):
    report = permute(mlp(), torch.randn(3, 8))
    refused(report, "0", "it comes from an input of the model")
    refused(report, "4", r"it feeds the model's output \(keep_output_dense=True\)")


def test_only_the_layers_that_are_asked_for_count(permute: Permute):
    report = permute(mlp(), torch.randn(3, 8), layers="0", keep_output_dense=False)
    refused(report, "2", r"no pattern of layers=\['0'\] matches its name")
    assert report.classes == ()


def test_a_pruned_weight_is_left_alone(permute: Permute):
    model = mlp()
    prune.l1_unstructured(model[2], "weight", 0.5)
    refused(permute(model, torch.randn(3, 8)), "2", "masked by|computed, not read as it is stored")


def test_a_parametrized_weight_is_left_alone(permute: Permute):
    model = mlp()
    parametrizations.weight_norm(model[2])
    refused(permute(model, torch.randn(3, 8)), "2", "parametrized|computed, not read")


def test_masks_of_a_sparsifier_are_left_alone(permute: Permute):
    model = mlp()
    sfx.sparsifiers.SRSTE(model, 2, 4)
    refused(permute(model, torch.randn(3, 8)), "2", "computed, not read as it is stored|parametri")


def test_a_weight_that_holds_the_zeros_is_left_alone(permute: Permute):
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(sfx.masks.nm_mask(model[2].weight, 2, 4))
    refused(permute(model, torch.randn(3, 8)), "2", "the weight of 2 holds 2:4 zeros already")


def test_a_mask_beside_the_weight_is_not_left_behind(permute: Permute):
    model = mlp()
    model[2].register_buffer("kept", torch.ones(8, 16, dtype=torch.bool))
    refused(permute(model, torch.randn(3, 8)), "2", "buffer '2.kept' has its shape and no graph")


def test_a_buffer_that_is_not_saved(permute: Permute):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(16), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = mlp()
    model[1] = Scaled()
    refused(permute(model, torch.randn(3, 8)), "2", "'1.scale' isn't saved with the model")


def test_parameters_that_share_memory(permute: Permute):
    model = mlp()
    model[1] = nn.PReLU(16)
    model.double()
    storage = torch.randn(32).double()
    model[0].bias.data, model[1].weight.data = storage[:16], storage[16:]
    report = sfx.permute_channels(model, (torch.randn(3, 8).double(),))
    refused(report, "2", "shares its memory with")


class Tied(nn.Module):
    """An autoencoder: the second product reads the transpose of the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.fc, self.out = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(16, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(self.into(x)))
        x = nn.functional.linear(x, self.fc.weight.T)
        return self.last(torch.relu(self.out(x)))


def test_a_weight_read_twice_is_permuted_for_both(permute: Permute):
    report = permute(Tied(), torch.randn(3, 8))
    tensors = {one.size: one.tensors for one in report.classes}
    assert ("fc.weight", 0) in tensors[32]
    assert {("fc.weight", 1), ("into.weight", 0), ("out.weight", 1)} <= set(tensors[16])


def test_a_module_used_twice(permute: Permute):
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU())
    model = nn.Sequential(nn.Linear(8, 16), block, block, nn.Linear(16, 4))
    report = permute(model, torch.randn(3, 8))
    (one,) = report.classes
    assert {("1.1.weight", 0), ("1.1.weight", 1), ("1.0.weight", 0)} <= set(one.tensors)


def test_what_only_training_reads_must_agree(permute: Permute):
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            hidden = self.net[0](x)
            out = self.net[1:](hidden)
            return out + hidden.cumsum(-1)[:, :4] if self.training else out

    refused(permute(Auxiliary(), torch.randn(3, 8)), "net.2", "cumsum .* tells their places apart")
    model = Auxiliary().double()
    report = sfx.permute_channels(model, (torch.randn(3, 8).double(),), training=False)
    assert report.why("net.2") == ""


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_what_dynamo_does_not_trace(permute: Permute):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.middle, self.two = mlp(), Untraced(), mlp()
            self.between = nn.Linear(4, 16)
            self.after = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.middle(self.between(self.one(x)))
            return self.two(self.after(x))

    report = permute(Broken(), torch.randn(3, 8))
    refused(report, "middle.fc", "no graph of the model reads its weight")
    refused(report, "after", "it comes from an input of the model")
    assert report.why("one.2") == ""
    assert report.why("two.2") == ""


# --- the guard


def test_a_wrong_rule_is_caught_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(propagate._RULES, torch.ops.aten.cumsum.default, maths.pointwise)
    model = nn.Sequential(nn.Linear(8, 16), Cumsum(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PermutationError, match=r"0\.weight \(dim 0\).*changes the model's outputs"):
        sfx.permute_channels(model, (torch.randn(3, 8),))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training


class Cumsum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


def test_a_scale_of_ones_that_was_missed_is_caught(monkeypatch: pytest.MonkeyPatch):
    """In a fresh model it would change nothing: the copy that is checked holds noise."""
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 4))
    understand = propagate.understand

    def forgetful(*args: Any) -> propagate.Model:
        known = understand(*args)
        for state in known.states.values():
            state.read = state.read and state.name != "1.weight"
        return known

    monkeypatch.setattr("sparsefx.permutation.transform.understand", forgetful)
    with pytest.raises(PermutationError, match="changes the model's outputs"):
        sfx.permute_channels(model, (torch.randn(3, 8),))


# --- arguments, and what is permuted beside the parameters


def test_bad_arguments():
    model, x = mlp(), torch.randn(3, 8)
    with pytest.raises(MaskError, match="n=4 of every m=4 prunes nothing"):
        sfx.permute_channels(model, x, 4, 4)
    with pytest.raises(MaskError, match="budget=0 is no number of rounds"):
        sfx.permute_channels(model, x, budget=0)
    with pytest.raises(PermutationError, match=r"'0\.weight' has no values yet"):
        sfx.permute_channels(mlp().to("meta"), x)


class Opaque(nn.Module):
    """Counts its calls, scales by a number, and returns what torch can't look into."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.net, self.scale, self.opaque = mlp(), nn.Parameter(torch.tensor(2.0)), opaque
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        out = self.scale * self.net(x) + self.calls
        return {out} if self.opaque else out


def test_outputs_that_can_not_be_compared():
    with pytest.raises(PermutationError, match="Opaque returns no tensor"):
        sfx.permute_channels(Opaque(opaque=True), torch.randn(3, 8))


def test_a_model_that_counts_its_calls():
    model = Opaque(opaque=False)
    report = sfx.permute_channels(model, torch.randn(3, 8))
    assert report.why("net.2") == ""
    assert float(model.calls) == 0


def test_nan_and_sizes(permute: Permute):
    report = permute(mlp(), torch.randn(3, 8), n=3, m=32)
    refused(report, "2", "run over 16 channels, which is not a multiple of m=32")
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    refused(sfx.permute_channels(model, torch.randn(3, 8)), "2", "its weight holds NaN or infinity")
    with torch.no_grad():
        model[2].weight.zero_()
    refused(sfx.permute_channels(model, torch.randn(3, 8)), "2", "its weight is all zeros")


def test_gradients_and_optimizer_state_follow():
    model, x = mlp().double(), torch.randn(5, 8).double()
    with torch.no_grad():
        model[2].weight.mul_(torch.randn(16).double().exp())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        two.grad = one.grad.clone()
    report = sfx.permute_channels(model, x, optimizer=optimizer)
    assert report.why("2") == ""
    order = torch.tensor(report.classes[0].order[0])
    for _ in range(2):
        optimizer.step()
        other.step()
    torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(model[0].weight, twin[0].weight[order])


def test_a_compiled_model_and_inputs_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, *, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.net(x)}

    model, x = Named().double(), torch.randn(3, 8).double()
    expected = model(x=x)["y"]
    compiled = torch.compile(model, backend="eager")
    report = sfx.permute_channels(compiled, (), kwargs={"x": x})
    assert len(report.classes) == 1
    torch.testing.assert_close(compiled(x=x)["y"], expected)


def test_the_report():
    torch.manual_seed(0)
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(torch.randn(16).exp())
    report = sfx.permute_channels(model, torch.randn(3, 8))
    text = str(report)
    assert "kept by 2:4" in text
    assert "why not permuted:\n  [1] it comes from an input of the model" in text
    assert "1 classes of channels permuted, in 3 tensors" in text
    data = report.to_dict()
    assert data["after"] > data["before"]
    assert data["classes"][0]["tensors"] == (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
    with pytest.raises(KeyError, match="no layer 'head'"):
        report.why("head")
    again = sfx.permute_channels(model, torch.randn(3, 8))
    assert again.before == pytest.approx(report.after)
