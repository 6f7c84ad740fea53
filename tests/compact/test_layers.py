"""What goes and what stays, layer by layer, and what a plan says of it."""

import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsefx as sfx

Compact = Callable[..., sfx.Compacted]


def _shapes(plan: sfx.CompactPlan) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.after for tensor in plan.tensors}


def _zero(weight: Tensor, *rows: int, dim: int = 0) -> None:
    with torch.no_grad():
        weight.movedim(dim, 0)[list(rows)] = 0


def _conv_net(bias: float, padding: int) -> nn.Sequential:
    """A dead filter whose batch norm leaves ``relu(bias)``."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=padding, bias=False), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(5),
    )  # fmt: skip
    model(torch.randn(2, 3, 8, 8))
    _zero(model[0].weight, 1, 4)
    nn.init.constant_(model[1].bias, bias)
    return model


def test_filters_that_relu_silences_go(compact: Compact):
    plan, small = compact(_conv_net(-1.0, 1), torch.randn(2, 3, 8, 8))
    assert _shapes(plan)["0.weight"] == (6, 3, 3, 3)
    assert _shapes(plan)["3.weight"] == (6, 6, 3, 3)
    assert _shapes(plan)["1.running_var"] == (6,)
    assert small[0].out_channels == small[1].num_features == small[3].in_channels == 6
    assert plan.folded == ()
    (gone,) = plan.channels
    assert gone.kept == (0, 2, 3, 5, 6, 7)
    assert ("3.weight", 1) in gone.tensors


def test_a_constant_is_folded_where_nothing_is_padded(compact: Compact):
    plan, small = compact(_conv_net(0.7, 0), torch.randn(2, 3, 8, 8))
    assert plan.folded == ("3",)
    assert _shapes(plan)["0.weight"] == (6, 3, 3, 3)
    assert small[3].bias is not None, "a bias that the layer hadn't"
    assert small[3].bias.abs().min() > 0


def test_a_constant_stays_where_padding_would_tell(compact: Compact):
    plan, _ = compact(_conv_net(0.7, 1), torch.randn(2, 3, 8, 8))
    assert plan.tensors == ()
    assert plan.parameters_after == plan.parameters_before
    assert "3.weight still needs them" in plan.why("0.weight")


def test_numbers_of_a_plan_are_those_of_the_shapes(compact: Compact):
    plan, small = compact(_conv_net(-1.0, 1), torch.randn(2, 3, 8, 8))
    assert plan.parameters_before == 3 * 8 * 9 + 16 + 8 * 6 * 9 + (6 * 36 + 1) * 5
    assert plan.parameters_after == sum(p.numel() for p in small.parameters())
    assert plan.macs_before == 2 * (36 * 9 * (3 * 8 + 8 * 6) + 6 * 36 * 5)
    assert plan.macs_after == 2 * (36 * 9 * (3 * 6 + 6 * 6) + 6 * 36 * 5)
    text = str(plan)
    for part in ("0.weight", "8x3x3x3", "6x3x3x3"):
        assert part in text
    assert "parameters: 1,749 -> 1,583" in text
    assert plan.to_dict()["tensors"][0]["name"] == "0.weight"


def test_dead_readers_free_their_writers(compact: Compact):
    """What only a removed neuron reads goes with it, layer by layer."""
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    _zero(model[4].weight, 0, 1, 2, dim=1)
    with torch.no_grad():
        model[2].weight[3:, :5] = 0  # neurons 0-4 are read by the three that die, only
    plan, small = compact(model, torch.randn(4, 6))
    assert [small[i].out_features for i in (0, 2, 4)] == [3, 5, 3]
    assert plan.why("0.weight") == plan.why("2.weight") == ""


class _Stream(nn.Module):
    """A residual stream with two writers, then concatenated, chunked and gated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.writer = nn.Linear(5, 8), nn.Linear(8, 8)
        self.side = nn.Linear(5, 6)
        self.both = nn.Linear(14, 12)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        stream = stream + self.writer(torch.tanh(stream))
        joined = torch.cat([stream, F.gelu(self.side(x))], -1)
        gate, value = self.both(joined).chunk(2, -1)
        return self.out(torch.sigmoid(gate) * value)


def test_a_stream_loses_what_no_writer_writes(compact: Compact):
    model = _Stream()
    for layer in (model.stem, model.writer):
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(model.side.bias)
    _zero(model.stem.weight, 1, 2, 3)
    _zero(model.writer.weight, 2, 3, 4)  # together: 2 and 3
    _zero(model.side.weight, 0)
    _zero(model.both.weight, 7, 8)  # of the values, not of the gates
    nn.init.zeros_(model.both.bias)
    plan, _ = compact(model, torch.randn(3, 5))
    shapes = _shapes(plan)
    assert shapes["stem.weight"] == (6, 5)
    assert shapes["writer.weight"] == (6, 6)
    assert shapes["side.weight"] == (5, 5)
    assert shapes["both.weight"] == (8, 11)
    assert shapes["out.weight"] == (2, 4)
    assert "still needs them" in plan.why("stem.weight")


class _Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.norm = nn.GroupNorm(4, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(F.relu(self.depth(F.relu(self.expand(x)))))
        x = F.max_pool2d(self.norm(self.grouped(x)), 2)
        return self.up(F.relu(x)).mean((2, 3))


def test_depthwise_and_whole_groups(compact: Compact):
    model = _Groups()
    for layer in (model.expand, model.depth, model.project, model.grouped):
        nn.init.zeros_(layer.bias)
    _zero(model.expand.weight, 0, 5)
    _zero(model.depth.weight, 5, 6)
    _zero(model.up.weight, 2, 3)  # the second group is read by nobody
    _zero(model.grouped.weight, 4)  # half of the third
    plan, small = compact(model, torch.randn(2, 4, 8, 8))
    assert (small.depth.groups, small.depth.in_channels, small.expand.out_channels) == (9, 9, 9)
    assert (small.grouped.groups, small.grouped.in_channels) == (3, 6)
    assert (small.norm.num_groups, small.norm.num_channels) == (3, 6)
    assert _shapes(plan)["up.weight"] == (6, 4, 2, 2)
    assert "as a whole" in plan.why("grouped.weight")


def test_layer_norm_is_a_barrier_with_its_line(compact: Compact):
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(4, 4))
    _zero(model[0].weight, 1, 2)
    _zero(model[3].weight, 1)
    plan, _ = compact(model, torch.randn(3, 5))
    assert plan.tensors == ()
    assert "depends on how many channels there are" in plan.why("0.weight")
    assert "reaches an output of the model" in plan.why("3.weight")


def test_one_channel_of_each_stays(compact: Compact):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.zeros_(model[2].weight)
    plan, small = compact(model, torch.randn(3, 5))
    assert small[0].out_features == 1
    assert plan.why("2.weight")


def test_rounding_keeps_a_multiple(compact: Compact):
    model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 4))
    _zero(model[2].weight, *range(11), dim=1)
    _, small = compact(model, torch.randn(3, 5), round_to=8)
    assert small[0].out_features == 16


def test_rounding_counts_heads_with_their_width(compact: Compact):
    model = _Numbers()
    _zero(model.out.weight, *range(9), dim=1)  # three heads of width 3
    _, small = compact(model, torch.randn(2, 5, 10), round_to=6)
    assert (small.heads, small.qkv.out_features) == (2, 18)


class _HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).view(-1, 3, 4)
        return self.out(torch.relu(self.second(x.flatten(1))))


def test_sizes_in_the_code_pin_and_the_rest_goes(compact: Compact):
    model = _HardCoded()
    _zero(model.second.weight, *range(4), dim=1)  # a whole row of the view
    _zero(model.out.weight, 0, 1, dim=1)
    plan, small = compact(model, torch.randn(3, 6))
    assert (small.first.out_features, small.second.out_features) == (12, 6)
    assert "doesn't run without" in plan.why("second.weight")


class _Numbers(nn.Module):
    """Attention by hand, with its sizes in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width, self.parts = 4, 3, (12, 12, 12)
        self.qkv, self.out = nn.Linear(10, 36), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.view(*x.shape[:2], self.heads, self.width).transpose(1, 2)
            for t in self.qkv(x).split(self.parts, -1)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(out.reshape(*x.shape[:2], self.heads * self.width))


def test_numbers_of_modules_follow(compact: Compact, mask_smallest: Callable[..., Tensor]):
    model = _Numbers()
    kept = mask_smallest(model.out.weight, 0.5, 1, 3)
    plan, small = compact(model, torch.randn(2, 5, 10))
    assert (small.heads, small.width, small.parts) == (2, 3, (6, 6, 6))
    assert small.qkv.out_features == 18
    assert {gone.kept for gone in plan.channels} == {tuple(kept.tolist())}
    assert (model.heads, model.parts) == (4, (12, 12, 12))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.inner, self.back = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.back(torch.relu(self.inner(x))))


def test_tied_weights_stay_tied(compact: Compact):
    model = _Tied()
    _zero(model.embed.weight, 0, 3, dim=1)
    _zero(model.back.weight, 3, 5)
    nn.init.zeros_(model.back.bias)
    _zero(model.embed.weight, 7)
    plan, small = compact(model, torch.randint(0, 20, (3, 4)))
    assert small.head.weight is small.embed.weight
    assert small.embed.weight.shape == (20, 6)  # 3 is dead, 0 isn't read
    assert small.embed.embedding_dim == small.head.in_features == 6
    assert "looks rows up" in plan.why("embed.weight")


def test_the_small_model_trains_saves_and_exports(compact: Compact):
    x = torch.randn(2, 3, 8, 8)
    _, small = compact(_conv_net(-1.0, 1), x)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    small.load_state_dict(torch.load(file, weights_only=True))
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
