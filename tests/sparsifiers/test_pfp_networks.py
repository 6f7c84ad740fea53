"""Provable filter pruning of whole networks: who reads a filter, budgets, smaller models."""

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx.sparsifiers import ProvableFilterPruner


def examples(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """A residual stream, grouped convolutions, a flattened image and a layer norm."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.two, self.norm2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, groups=groups)
        self.again = nn.Conv2d(16, 8, 2, groups=groups)
        self.wide, self.scale = nn.Linear(8 * 9, 24), nn.LayerNorm(24)
        self.mid, self.head = nn.Linear(24, 12), nn.Linear(12, 5)
        for norm in (self.norm0, self.norm1, self.norm2):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm0(self.stem(x)).relu()
        h = (h + self.norm2(self.two(self.norm1(self.one(h)).relu()))).relu()
        h = self.again(self.grouped(h).relu()).relu().flatten(1)
        return self.head(self.mid(self.scale(self.wide(h))).relu())


@pytest.mark.parametrize(("budget", "keep"), [("parameters", 0.8), ("flops", 0.3)])
def test_the_budget_is_met_from_below(budget, keep):
    model, x = Residual(), examples(16, 3, 6, 6)
    pruner = ProvableFilterPruner(model, [x], keep, budget=budget)
    places = {"stem": 36, "one": 36, "two": 36, "grouped": 16, "again": 9}
    kept = total = 0
    for name, mask in pruner.masks().items():
        price = places.get(name, 1) if budget == "flops" else 1
        kept += price * int(mask.sum())
        total += price * mask.numel()
    assert keep - 0.2 < kept / total <= keep  # one channel of the stream is a tenth of all
    assert len({row.eps for row in pruner.report().filters}) == 1


class Branches(nn.Module):
    """Concatenation, a gate by channel, halves of one layer, attention by hand, other readers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(11, 4), nn.Linear(4, 11)
        self.norm, self.mix = nn.BatchNorm2d(11), nn.Conv2d(11, 8, 1)
        self.halves, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
        self.query, self.key, self.value = (nn.Linear(8, 6) for _ in range(3))
        self.out, self.slope, self.spread = nn.Linear(6, 7), nn.PReLU(7), nn.Linear(7, 5)
        self.wider, self.last = nn.ConvTranspose1d(5, 6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.left(x).relu()
        h = torch.cat([h, self.right(h).relu()], 1)
        h = h * self.excite(self.squeeze(h.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        h = self.mix(self.norm(h)).flatten(2).mT
        one, two = self.halves(h).chunk(2, -1)
        h = self.down(one * two.sigmoid())
        h = (self.query(h) @ self.key(h).mT).softmax(-1) @ self.value(h)
        h = self.spread(self.slope(self.out(h).mT).mT)
        return self.last(self.wider(h.mT).relu().mT), h.amax(1)


@pytest.mark.parametrize(
    ("make", "variant"), [(Residual, "deterministic"), (Residual, "random"), (Branches, "hybrid")]
)
def test_filters_and_vectors_that_nobody_reads_are_zero_and_change_nothing(make, variant):
    """Filters that were dropped, with any values and biases, make the same outputs."""
    model, x = make().eval(), examples(16, 3, 6, 6)
    with torch.no_grad():
        pruner = ProvableFilterPruner(model, [x], 0.4, variant=variant, seed=3)
        assert variant == "random" or 0.2 < pruner.density() <= 0.4
        pruned = model(x)
        for layer in pruner.layers.values():
            by_group = layer.mask.mask.unflatten(0, (layer.target.groups, -1))
            columns = by_group.any(1, keepdim=True).expand_as(by_group).flatten(0, 1)
            dead = ~layer.mask.mask.flatten(1).any(1)
            dropped = (columns.movedim(0, -1) & dead).movedim(-1, 0)
            layer.mask.mask.copy_(columns)
            layer.weight[dropped] = 5.0
        for name, gone in pruner.gone.items():
            model.get_parameter(name)[gone] = 3.0
        for got, wanted in zip(model(x), pruned, strict=True):
            torch.testing.assert_close(got, wanted)
    dead = {name for name, gone in pruner.gone.items() if gone.any()}
    if make is Residual:
        assert {"norm1.weight", "norm1.bias", "mid.bias"} <= dead
        assert not {"wide.bias", "scale.weight", "head.bias"} & pruner.gone.keys()
    else:
        assert {"right.bias", "norm.weight", "slope.weight", "out.bias", "down.bias"} <= dead
        assert not {"query.bias", "key.bias", "spread.bias", "wider.bias"} & dead


def test_a_channel_goes_from_everything_that_writes_or_reads_it():
    model = Residual()
    masks = ProvableFilterPruner(model, [examples(16, 3, 6, 6)], 0.3).masks()
    by_channel = masks["wide"].view(24, 8, 9)
    assert torch.equal(by_channel.any(2), by_channel.all(2))  # positions of a channel together
    assert torch.equal(masks["again"].any(3).any(2).any(1), by_channel[0].any(1))
    assert torch.equal(masks["one"].flatten(1).any(1), masks["two"].any(3).any(2).any(0))
    stream = masks["one"].any(3).any(2).any(0)
    both = masks["grouped"].view(2, 8, 4, 9).any(3).any(1).flatten()
    for name in ("stem", "two"):
        assert torch.equal(masks[name].flatten(1).any(1), stream | both)
    assert torch.equal(stream, both)
    assert masks["wide"].any(1).all()


def test_the_model_really_shrinks():
    """Ragged groups would stay: here there are none."""
    model, x = Residual(groups=1).eval(), examples(16, 3, 6, 6)
    pruner = ProvableFilterPruner(model, [x], 0.4)
    report, masks = pruner.report(), pruner.masks()
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    with torch.no_grad():
        expected = pruner.squash()(x)
        _, small = sfx.compact_channels(model, x)
        assert (small(x) - expected).abs().max() <= 1e-5
    for row in report.filters[1:]:
        weight = small.get_submodule(row.layer).weight
        inside = 24 if row.layer == "mid" else row.kept_inputs  # a layer norm reads those, too
        assert weight.shape[:2] == (row.kept_filters, inside), row.layer
        assert row.layer == "mid" or weight.numel() == kept[row.layer]


def test_attention_embeddings_and_other_kinds_of_layers():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.line = nn.Conv1d(8, 6, 2, dilation=2)
            self.out = nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.line(self.encoder(self.words(ids)).mT).mean(2))

    torch.manual_seed(0)
    model, ids = Net().eval(), torch.arange(22).view(2, 11) % 11
    pruner = ProvableFilterPruner(model, [{"ids": ids}], 0.5)
    assert {"encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj"} <= set(pruner.layers)
    assert pruner.gone["encoder.linear1.bias"].any()
    assert 0.3 < pruner.density() <= 0.5
    assert model(ids).isfinite().all()


def test_a_weight_that_is_also_read_along_its_rows_keeps_them():
    class Autoencoder(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.inner, self.tied = nn.Linear(6, 10), nn.Linear(10, 4), tied

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            return torch.cat([self.inner(h), h @ self.first.weight if self.tied else x], 1)

    rows = []
    for tied in (False, True):
        pruner = ProvableFilterPruner(Autoencoder(tied), [examples(9, 6)], 0.5)
        rows.append({row.layer: row for row in pruner.report().filters}["first"])
    assert rows[0].kept_filters < 10
    assert rows[1].kept_filters == 10


def test_attention_across_two_sequences_stays_dense():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attention(x, y, y)[0]

    pruner = ProvableFilterPruner(Cross(), [(examples(2, 3, 8), examples(2, 5, 8))], 0.6)
    assert set(pruner.layers) == {"attention.out_proj"}
    assert "different tensors" in pruner.skipped["attention.in_proj_weight"]


def test_layers_stored_the_other_way_round_and_in_half_precision():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    conv1d = transformers.pytorch_utils.Conv1D
    model = nn.Sequential(conv1d(10, 6), nn.ReLU(), conv1d(4, 10)).bfloat16()
    pruner = ProvableFilterPruner(model, [examples(9, 6).bfloat16()], 0.5, variant="random")
    masks = pruner.masks()
    assert masks["0"].shape == (6, 10)
    assert torch.equal(masks["0"].any(0), masks["2"].any(1))
    assert model(examples(9, 6).bfloat16()).isfinite().all()
