"""find_zeros: where masks belong in stored parameters, and what stored zeros can't express."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import sparsefx as sfx
from sparsefx import masks
from sparsefx.onnx.facts import check, locate
from sparsefx.onnx.zeros import find_zeros

ROW = sfx.NM(2, 4)


def config(*rules: sfx.Rule, **options: bool) -> sfx.SparseConfig:
    return sfx.SparseConfig(rules=rules or (sfx.Rule("*", forward=ROW),), **options)


def kept(model: nn.Module, x: Tensor, settings: sfx.SparseConfig) -> dict[str, Tensor]:
    weights = find_zeros(model.eval(), (x,), settings).weights
    return {weight.name: weight.kept() for weight in weights}


class Tied(nn.Module):
    """One matrix in two linear layers, and perhaps as an embedding."""

    def __init__(self, embed: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)
        self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.second.weight = self.first.weight
        if embed:
            self.table.weight = self.first.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.second(torch.relu(self.first(self.table(ids)))))


IDS = torch.arange(8)


def test_layers_that_share_a_weight_share_its_zeros():
    model = Tied()
    found = kept(model, IDS, config())
    assert list(found) == ["first.weight"]
    assert torch.equal(found["first.weight"], masks.nm_mask(model.first.weight, 2, 4, 1))


@pytest.mark.parametrize("turned", [False, True])
def test_a_batch_of_weights_has_groups_along_each_matrix_k(turned):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 4))
            self.last = nn.Linear(8, 8)

        def forward(self, x):
            w = self.weight.mT if turned else self.weight
            return self.last(torch.bmm(x, w).sum(-1, keepdim=True).expand(-1, -1, 8))

    model = Experts()
    found = kept(model, torch.randn(3, 2, 4 if turned else 8), config())
    assert torch.equal(found["weight"], masks.nm_mask(model.weight, 2, 4, 2 if turned else 1))


def test_layers_that_share_a_weight_and_want_other_zeros():
    rules = sfx.Rule("first", forward=ROW), sfx.Rule("second", forward=sfx.NM(1, 4))
    message = (
        r"parameter 'first\.weight' is read by (first|second) \(addmm, [12]:4\) and by "
        r"(first|second) \(addmm, [12]:4\).*one pattern, or put a rule with forward=Dense\(\)"
    )
    with pytest.raises(sfx.ExportError, match=message):
        kept(Tied(), IDS, config(*rules))


def test_a_dense_layer_that_shares_the_weight():
    rules = sfx.Rule("first", forward=sfx.Dense()), sfx.Rule("*", forward=ROW)
    with pytest.raises(sfx.ExportError, match=r"by second \(addmm, 2:4\) and by first \(addmm, de"):
        kept(Tied(), IDS, config(*rules))


def test_an_embedding_that_shares_the_weight():
    message = r"by first \(addmm, 2:4\) and by table \(embedding, dense\).*for 'first' first"
    with pytest.raises(sfx.ExportError, match=message):
        kept(Tied(embed=True), IDS, config())
    rules = [sfx.Rule(name, forward=sfx.Dense()) for name in ("first", "second")]
    assert kept(Tied(embed=True), IDS, config(*rules, sfx.Rule("*", forward=ROW))) == {}


class Slices(nn.Module):
    """Two products of one parameter, as cross attention has; the last stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(20, 8))
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.both[:8])
        return self.last(F.linear(torch.relu(x), self.both[8:]))


def test_slices_of_one_parameter():
    model, x = Slices(), torch.randn(5, 8)
    found = kept(model, x, config())
    assert torch.equal(found["both"], masks.nm_mask(model.both, 2, 4, 1))


def test_a_slice_that_is_in_no_product_stays_whole():
    model, x = Slices(), torch.randn(5, 8)
    model.last = nn.Linear(8, 3)
    model.forward = lambda x: model.last(F.linear(x, model.both[4:12])) * model.both[0, :3]
    found = kept(model, x, config())["both"]
    assert found[:4].all()
    assert found[12:].all()
    assert torch.equal(found[4:12], masks.nm_mask(model.both[4:12], 2, 4, 1))


@pytest.mark.parametrize("transposable", [False, True])
def test_a_weight_that_is_cast_is_ranked_as_it_is_multiplied(transposable):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8)
    with torch.no_grad():  # in bfloat16 all of these tie
        model[0].weight.copy_(1 + torch.rand(8, 8) * 1e-4)
    nm = sfx.NM(2, 4, transposable=transposable)
    with torch.autocast("cpu", torch.bfloat16):
        found = kept(model, x, config(sfx.Rule("*", forward=nm)))["0.weight"]
    cast = model[0].weight.bfloat16()
    wanted = masks.transposable_mask(cast, 2, 4) if transposable else masks.nm_mask(cast, 2, 4, 1)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, masks.nm_mask(model[0].weight, 2, 4, 1))


class Broken(nn.Module):
    """A weight of the name that Dynamo gives to all weights behind the break."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.first(x), self.weight)
        torch._dynamo.graph_break()
        return self.second(x.relu())


def test_a_graph_break_hides_names_but_not_parameters():
    model = Broken()
    found = kept(model, torch.randn(2, 8), config(keep_output_dense=False))
    assert set(found) == {"weight", "first.weight", "second.weight"}
    for name, mask in found.items():
        assert torch.equal(mask, masks.nm_mask(model.get_parameter(name), 2, 4, 1))


def test_uses_behind_a_graph_break_count():
    model = Tied()
    first = model.first.forward
    model.first.forward = lambda x: torch._dynamo.graph_break() or first(x)
    # the first graph ends in the product that reads the weight first: it stays dense there
    with pytest.raises(sfx.ExportError, match=r"'first\.weight' is read by \w+ \(addmm, 2:4\) and"):
        kept(model, IDS, config())
    assert set(kept(model, IDS, config(keep_output_dense=False))) == {"first.weight", "last.weight"}


def test_a_weight_from_elsewhere():
    other = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].forward = lambda x: F.linear(x, other.weight)
    with pytest.raises(sfx.ExportError, match=r"is no parameter of this model"):
        kept(model, torch.randn(2, 8), config())


def test_what_stays_dense_when_compiling_gets_no_zeros():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    assert set(kept(model, torch.randn(2, 6), config())) == {"1.weight"}  # 6 % 4; the output
    found = kept(model, torch.randn(2, 6), config(keep_output_dense=False))
    assert set(found) == {"1.weight", "2.weight"}


def test_a_weight_that_is_computed():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 3))
    message = r"the weight of '0' \(2:4\) is computed while the model runs \(by \w+\).*Dense\(\)"
    with pytest.raises(sfx.ExportError, match=message):
        kept(model, torch.randn(2, 8), config())
    parametrize.remove_parametrizations(model[0], "weight")
    assert set(kept(model, torch.randn(2, 8), config())) == {"0.weight"}


def test_sampling_at_inference():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    pattern = sfx.Sampled(0.5, inference=True)
    zeros = find_zeros(model.eval(), (torch.randn(2, 8),), config(sfx.Rule("*", forward=pattern)))
    assert zeros.weights == []
    assert [(p.parameter, p.layer, p.pattern, p.weight_left) for p in zeros.products] == [
        ("0.weight", "0", pattern, False),
        ("2.weight", "2", None, False),  # the output stays dense
    ]


# --- finding them in a file


def weights_of(model: nn.Module, x: Tensor, *rules: sfx.Rule) -> list:
    return find_zeros(model.eval(), (x,), config(*rules)).weights


def test_known_by_name_by_zeros_and_by_transposed_zeros():
    (weight,) = weights_of(Slices(), torch.randn(5, 8))
    nonzero = weight.kept()
    stored = {
        "both": nonzero,
        "first": nonzero[:8],
        "second": nonzero[8:].t(),
        "other": torch.ones(20, 8, dtype=torch.bool),
    }
    found = {name: str(fact) for name, fact in locate([weight], stored).items()}
    along = {"both": 1, "first": 1, "second": 0}
    assert found == {name: f"2:4 along dim {dim}" for name, dim in along.items()}


def test_slices_with_patterns_of_their_own_have_no_common_one():
    seen = []
    rule = sfx.Rule(lambda site: seen.append(site.shape) or len(seen) == 1, forward=sfx.NM(1, 4))
    (weight,) = weights_of(Slices(), torch.randn(5, 8), rule, sfx.Rule("*", forward=ROW))
    nonzero = weight.kept()
    assert {use.pattern.n for use in weight.masked} == {1, 2}
    assert locate([weight], {"both": nonzero}) == {}
    found = locate([weight], {"a": nonzero[:8], "b": nonzero[8:]})
    assert {fact.pattern.n for fact in found.values()} == {1, 2}


def test_zeros_that_do_not_hold_are_named():
    (weight,) = weights_of(Slices(), torch.randn(5, 8))
    (fact,) = locate([weight], {"both": weight.kept()}).values()
    check("both", weight.kept(), fact)
    with pytest.raises(sfx.ExportError, match=r"tensor 'both' of the file, .* keeps 4 of m=4"):
        check("both", torch.ones(20, 8), fact)
