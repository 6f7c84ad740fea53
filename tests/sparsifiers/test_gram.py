"""Gram matrices: rows in the weight's own order, sums over chunks, and inputs of attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers import gram as gram_file
from sparsefx.sparsifiers.gram import Gram, empty_gram, input_rows
from sparsefx.sparsifiers.taps import tapped
from sparsefx.sparsifiers.targets import Target, all_targets


def gram_of(target: Target, *inputs: Tensor) -> Gram:
    gram = empty_gram(target)
    for groups, rows in input_rows(target, inputs):
        gram.add(rows, groups)
    return gram


def energies(target: Target, gram: Gram) -> Tensor:
    """|w X|^2 of each row."""
    w = target.matrix(target.weight.detach()).flatten(1).double()
    w = w.unflatten(0, (len(gram.sum), -1))
    return ((w @ gram.sum) * w).sum(-1).flatten()


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,), (3, 0)], ids=str)
def test_linear_rows_are_all_leading_dimensions(lead: tuple[int, ...]):
    x = torch.randn(*lead, 8)
    gram = gram_of(Target("fc", nn.Linear(8, 4), "weight", "linear"), x)
    rows = x.reshape(-1, 8).double()
    torch.testing.assert_close(gram.sum, (rows.T @ rows)[None])
    assert gram.count == len(rows)


CONVS = [
    pytest.param(lambda: nn.Conv2d(8, 6, 3, bias=False), (4, 8, 5, 7), id="2d"),
    pytest.param(lambda: nn.Conv2d(8, 6, 3, bias=False), (8, 5, 7), id="unbatched"),
    pytest.param(lambda: nn.Conv2d(8, 6, 1, 2, bias=False), (2, 8, 4, 4), id="1x1 stride"),
    pytest.param(
        lambda: nn.Conv2d(8, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=False),
        (3, 8, 9, 7),
        id="grouped",
    ),
    pytest.param(
        lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2, bias=False), (2, 4, 20), id="same"
    ),
    pytest.param(lambda: nn.Conv1d(4, 6, 3, padding="valid", bias=False), (2, 4, 9), id="valid"),
    pytest.param(
        lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular", bias=False),
        (2, 4, 9),
        id="circular",
    ),
    pytest.param(
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect", bias=False),
        (2, 4, 5, 6),
        id="reflect",
    ),
    pytest.param(
        lambda: nn.Conv3d(
            4, 6, (1, 2, 3), padding=(0, 1, 2), padding_mode="replicate", bias=False, groups=2
        ),
        (2, 4, 4, 5, 6),
        id="3d",
    ),
    pytest.param(lambda: nn.Conv2d(8, 6, 3, bias=False), (0, 8, 5, 7), id="empty"),
]


@pytest.mark.parametrize(("make", "shape"), CONVS)
@pytest.mark.parametrize("chunk", [1, 700, 1 << 20])
def test_conv_rows_are_windows_in_the_order_of_the_weight(
    make, shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gram_file, "CHUNK", chunk)
    conv = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    target = Target("conv", conv, "weight", "conv")
    gram = gram_of(target, x)
    y = conv(x).detach()
    channels = y.dim() - 1 - len(conv.kernel_size)
    outputs = y.movedim(channels, 0).flatten(1)
    torch.testing.assert_close(energies(target, gram), outputs.square().sum(1))
    assert gram.count == outputs.shape[1]


def test_conv2d_gram_is_that_of_unfold():
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    gram = gram_of(Target("conv", nn.Conv2d(4, 2, 3, padding=1), "weight", "conv"), x)
    columns = F.unfold(x, 3, padding=1).movedim(1, 0).flatten(1)  # [K, T]
    torch.testing.assert_close(gram.sum[0], columns @ columns.T)


def test_chunks_hold_no_more_than_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gram_file, "CHUNK", 1000)
    target = Target("conv", nn.Conv2d(4, 2, 3), "weight", "conv")
    parts = [rows for _, rows in input_rows(target, (torch.randn(5, 4, 12, 12),))]
    assert max(rows.numel() for rows in parts) <= 1000
    assert sum(rows.shape[1] for rows in parts) == 5 * 10 * 10
    flat = Target("fc", nn.Linear(8, 2), "weight", "linear")
    assert [r.shape[1] for _, r in input_rows(flat, (torch.randn(300, 8),))] == [125, 125, 50]


def test_hugging_face_conv1d_has_its_inputs_on_the_first_axis():
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)  # weight [4, 6]
    target = Target("c", module, "weight", "conv1d")
    x = torch.randn(2, 3, 4)
    gram = gram_of(target, x)
    outputs = (x.reshape(-1, 4) @ module.weight).double().square().sum(0)
    assert gram.sum.shape == (1, 4, 4)
    torch.testing.assert_close(energies(target, gram), outputs, rtol=1e-5, atol=1e-6)


def test_sums_are_float64_whatever_the_input():
    """Two inputs that differ by 1e-5: float32 sums would lose their difference."""
    base = torch.randn(4096, 1)
    x = torch.cat([base, base + 1e-4 * torch.randn(4096, 1)], 1)
    gram = gram_of(Target("fc", nn.Linear(2, 1), "weight", "linear"), x).sum[0]
    v = torch.tensor([1.0, -1.0], dtype=torch.float64)
    exact = (x[:, 0].double() - x[:, 1].double()).square().sum()
    torch.testing.assert_close(v @ gram @ v, exact, rtol=1e-6, atol=0)
    low = (x.T @ x).double()
    assert abs(v @ low @ v - exact) > 0.1 * exact
    half = gram_of(Target("fc", nn.Linear(2, 1), "weight", "linear"), x.bfloat16())
    assert half.sum.dtype == torch.float64


def attention_targets(mha: nn.Module) -> dict[str, Target]:
    return {target.name: target for target in all_targets(mha)}


@pytest.mark.parametrize("by_keyword", [False, True])
def test_in_proj_has_three_inputs(by_keyword: bool):
    mha = nn.MultiheadAttention(8, 2).eval()
    q, k, v = torch.randn(5, 2, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    seen: dict[str, tuple[Tensor, ...]] = {}
    targets = attention_targets(mha)
    with torch.no_grad(), tapped(mha, targets.values(), seen.__setitem__):
        mha(q, value=v, key=k) if by_keyword else mha(q, k, v)
    target = targets["in_proj_weight"]
    gram = gram_of(target, *seen["in_proj_weight"])
    assert gram.sum.shape == (3, 8, 8)
    for i, x in enumerate((q, k, v)):
        rows = x.reshape(-1, 8).double()
        torch.testing.assert_close(gram.sum[i], rows.T @ rows)


def test_separate_projections_each_have_their_own_input():
    mha = nn.MultiheadAttention(8, 2, kdim=4, vdim=12).eval()
    q, k, v = torch.randn(5, 2, 8), torch.randn(7, 2, 4), torch.randn(7, 2, 12)
    seen: dict[str, tuple[Tensor, ...]] = {}
    targets = attention_targets(mha)
    with torch.no_grad(), tapped(mha, targets.values(), seen.__setitem__):
        mha(q, k, v)
    for name, x in (("q_proj_weight", q), ("k_proj_weight", k), ("v_proj_weight", v)):
        assert len(seen[name]) == 1
        assert seen[name][0] is x
        assert empty_gram(targets[name]).sum.shape == (1, x.shape[-1], x.shape[-1])


@pytest.mark.parametrize("batched", [False, True])
def test_out_proj_is_seen_inside_attention(batched: bool):
    mha = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    nn.init.normal_(mha.out_proj.bias)
    x = torch.randn(3, 5, 8) if batched else torch.randn(5, 8)
    seen: dict[str, tuple[Tensor, ...]] = {}
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        plain, weights = mha(x, x, x)
        with tapped(mha, attention_targets(mha).values(), seen.__setitem__):
            same, same_weights = mha(x, x, x)
        inner = seen["out_proj"][0]
        assert inner.numel() == x.numel()
        by_hand = mha.out_proj(inner)
    torch.testing.assert_close(same, plain)
    torch.testing.assert_close(same_weights, weights)
    by_hand = by_hand.transpose(0, 1) if batched else by_hand  # attention works time first
    torch.testing.assert_close(by_hand.reshape(plain.shape), plain)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in mha.modules())


def test_attention_that_names_its_arguments():
    class Named(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return F.multi_head_attention_forward(
                query=query,
                key=key,
                value=value,
                embed_dim_to_check=8,
                num_heads=2,
                in_proj_weight=self.in_proj_weight,
                in_proj_bias=self.in_proj_bias,
                bias_k=None,
                bias_v=None,
                add_zero_attn=False,
                dropout_p=0.0,
                out_proj_weight=self.out_proj.weight,
                out_proj_bias=self.out_proj.bias,
            )

    mha, x = Named(8, 2).eval(), torch.randn(5, 2, 8)
    seen: dict[str, tuple[Tensor, ...]] = {}
    with torch.no_grad(), tapped(mha, attention_targets(mha).values(), seen.__setitem__):
        y, _ = mha(x, x, x)
        torch.testing.assert_close(mha.out_proj(seen["out_proj"][0]), y)
    torch.testing.assert_close(y, mha(x, x, x)[0].detach())


def test_a_failing_attention_leaves_nothing_behind():
    mha = nn.MultiheadAttention(8, 2).eval()

    def take(name: str, inputs: tuple[Tensor, ...]) -> None:
        if name == "out_proj":
            raise KeyboardInterrupt

    x = torch.randn(5, 2, 8)
    with (
        pytest.raises(KeyboardInterrupt),
        torch.no_grad(),
        tapped(mha, attention_targets(mha).values(), take),
    ):
        mha(x, x, x)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in mha.modules())
    assert not torch.overrides.has_torch_function((x,))  # no mode is left on


def test_pairs_keep_three_products():
    xs, ds = torch.randn(1, 9, 4), torch.randn(1, 9, 4)
    gram = Gram(1, 4, torch.device("cpu"), paired=True)
    gram.add(xs[:, :5], dense=ds[:, :5])
    gram.add(xs[:, 5:], dense=ds[:, 5:])
    x, d = xs[0].T.double(), ds[0].T.double()
    torch.testing.assert_close(gram.sum[0], x @ x.T)
    torch.testing.assert_close(gram.cross[0], d @ x.T)
    torch.testing.assert_close(gram.dense[0], d @ d.T)
    with pytest.raises(SparsifierError, match=r"rows are \[1, 9, 4\] and dense None: pass pairs"):
        gram.add(xs)
    with pytest.raises(SparsifierError, match=r"dense \[1, 8, 4\]"):
        gram.add(xs, dense=ds[:, 1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float):
    x = torch.zeros(1, 3, 4)
    x[0, 1, 2] = bad
    gram = Gram(1, 4, torch.device("cpu"))
    with pytest.raises(SparsifierError, match="NaN or infinity; clean the calibration data"):
        gram.add(x)
    assert not gram.sum.any()
