"""nm_mask: the rule against plain Python, every dtype and layout, and what it says to nonsense."""

import cmath
import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sparsefx.errors import MaskError
from sparsefx.masks import is_valid, magnitude, magnitudes, nm_mask

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8), (5, 9), (8, 16), (16, 32), (63, 64)]
INF, NAN = math.inf, math.nan


def is_nan(value):
    return cmath.isnan(value) if isinstance(value, complex) else math.isnan(value)


def by_hand(row, n, m):
    """The rule, one group at a time: a NaN before an infinity before the rest, then by place."""
    keep = []
    for start in range(0, len(row), m):
        group = row[start : start + m]
        rank = sorted(range(m), key=lambda i: (not is_nan(group[i]), -abs(group[i]), i))
        if any(map(is_nan, group)):  # comparisons with NaN would leave sorted without an order
            nans = [i for i in range(m) if is_nan(group[i])]
            rest = [i for i in range(m) if not is_nan(group[i])]
            rank = nans + sorted(rest, key=lambda i: (-abs(group[i]), i))
        keep += [i in rank[:n] for i in range(m)]
    return keep


def mask_by_hand(w, n, m, dim):
    rows = w.movedim(dim, -1)
    flat = [by_hand(row, n, m) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
    return torch.tensor(flat).view(rows.shape).movedim(-1, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_values(n, m, dtype):
    w = torch.randn(3, 2 * m, 5).round(decimals=1).to(dtype)  # with ties
    assert torch.equal(nm_mask(w, n, m, 1), mask_by_hand(w, n, m, 1))
    assert torch.equal(nm_mask(w, n, m, -2), nm_mask(w, n, m, 1))


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ([1.0, 1.0, -1.0, 1.0], [True, True, False, False]),
        ([0.0, -0.0, 0.0, 0.0], [True, True, False, False]),
        ([0.0, 5.0, -0.0, 0.0], [True, True, False, False]),
        ([9.0, 8.0, NAN, 7.0], [True, False, True, False]),
        ([INF, -INF, NAN, INF], [True, False, True, False]),
        ([INF, NAN, -NAN, NAN], [False, True, True, False]),
        ([1e-45, 0.0, -4e-45, 3e-45], [False, False, True, True]),
    ],
)
@pytest.mark.parametrize("times", [1, 4])  # groups of 4, and of 16: another way to rank
def test_ties_and_what_is_not_finite(row, kept, times):
    w = torch.cat([torch.tensor(row), torch.zeros(4 * times - 4)])
    expected = torch.cat([torch.tensor(kept), torch.zeros(4 * times - 4, dtype=torch.bool)])
    assert torch.equal(nm_mask(w, 2, 4 * times), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_nans_rank_alike_whatever_their_bits(dtype):
    integer = magnitudes.BITS[dtype][0]
    quiet = torch.tensor(NAN, dtype=dtype).view(integer)
    w = torch.stack([quiet, quiet + 1, quiet.new_zeros(()), quiet + 1]).view(dtype)
    assert nm_mask(w, 2, 4).tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (4, 8), (7, 12), (16, 32)])
def test_three_ways_to_rank_agree(n, m, dtype):
    w = torch.randn(4, m, 6).round(decimals=1)
    w[0, ::3], w[1, ::2], w[2, 1::3] = NAN, INF, -0.0
    bits = magnitudes.rank_keys(w.to(dtype)).unflatten(1, (-1, m))
    ways = [magnitude._by_pairs, magnitude._by_table, magnitude._by_sorting]
    first, *others = [way(bits, n, 2) for way in ways]
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(first.flatten(1, 2), mask_by_hand(w.to(dtype), n, m, 1))


@pytest.mark.parametrize(
    "w",
    [
        torch.randn(8, 16).t(),
        torch.randn(8, 12, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 8).permute(3, 0, 2, 1),
    ],
    ids=["transposed", "channels_last", "permuted"],
)
@pytest.mark.parametrize("m", [4, 16])
def test_layout_is_that_of_the_weight(w, m):
    for dim in range(w.dim()):
        if w.shape[dim] % m == 0:
            mask = nm_mask(w, 2, m, dim)
            assert mask.stride() == w.stride()
            assert torch.equal(mask, mask_by_hand(w, 2, m, dim))


def test_strided_expanded_and_broadcast_weights():
    wide = torch.randn(6, 32)
    for w in (wide[::2, ::2], wide[:, :1].expand(6, 8), wide[0].expand(3, 32), wide.flip(1)):
        assert torch.equal(nm_mask(w, 2, 4), mask_by_hand(w, 2, 4, 1))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8), (0,)])
@pytest.mark.parametrize("m", [4, 16])
def test_empty(shape, m):
    w = torch.empty(*shape[:-1], shape[-1] * 2)
    mask = nm_mask(w, 2, m)
    assert mask.shape == w.shape
    assert mask.dtype == torch.bool


def test_a_weight_that_requires_grad():
    w = torch.nn.Parameter(torch.randn(4, 8))
    mask = nm_mask(w, 2, 4)
    assert not mask.requires_grad
    (w * mask).sum().backward()
    assert torch.equal(w.grad, mask.float())


@st.composite
def weights(draw):
    m = draw(st.integers(2, 12))
    n = draw(st.integers(1, m - 1))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    values = st.floats(-8, 8, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)
    flat = draw(st.lists(values, min_size=rows * groups * m, max_size=rows * groups * m))
    return torch.tensor(flat).view(rows, groups * m), n, m


@settings(max_examples=60)
@given(weights())
def test_exactly_n_of_m_and_the_largest(case):
    w, n, m = case
    mask = nm_mask(w, n, m)
    groups, kept = w.abs().unflatten(1, (-1, m)), mask.unflatten(1, (-1, m))
    assert (kept.sum(-1) == n).all()
    least = groups.masked_fill(~kept, INF).amin(-1)
    assert (least >= groups.masked_fill(kept, 0.0).amax(-1)).all()
    assert is_valid(mask, n, m)


@settings(max_examples=60)
@given(weights(), st.sampled_from([2.0**-20, 0.5, 1.0, 3.0, 2.0**20]))
def test_twice_is_once_and_scale_is_nothing(case, scale):
    w, n, m = case
    w = w.double()  # 3 * w is exact
    mask = nm_mask(w, n, m)
    assert torch.equal(nm_mask(w * scale, n, m), mask)
    assert torch.equal(nm_mask(-w, n, m), mask)
    if (w[mask] != 0).all():
        assert torch.equal(nm_mask(w * mask, n, m), mask)


@pytest.mark.parametrize(("n", "m", "dynamic"), [(2, 4, True), (8, 16, False)])
def test_compiled(n, m, dynamic):
    compiled = torch.compile(nm_mask, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for w in (torch.randn(8, 32), torch.randn(32, 48).t(), torch.randn(16, 32, 3, 3)):
        w.flatten()[:3] = NAN
        assert torch.equal(compiled(w, n, m, 1), nm_mask(w, n, m, 1))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("n", "m", "dtype"), [(2, 4, torch.bfloat16), (2, 4, torch.float64), (8, 16, torch.float32)]
)
def test_inductor(n, m, dtype):
    @torch.compile(fullgraph=True)
    def prune(w):
        return torch.where(nm_mask(w, n, m, 0), w, 0)

    w = torch.randn(10, 2 * m).round(decimals=1).to(dtype).t()
    w[3] = INF
    assert torch.equal(prune(w), torch.where(nm_mask(w, n, m, 0), w, 0))


def sample(dtype, *shape):
    """Values of any dtype, the extreme ones and ties among them."""
    if dtype in magnitudes.SIGNED + magnitudes.UNSIGNED[1:]:
        info = torch.iinfo(dtype)
        flat = [info.min, info.max, 0, 1, info.max - 1, info.min + 1, 3, 3]
        picked = torch.randint(0, 8, shape).flatten().tolist()
        return torch.tensor([flat[i] for i in picked], dtype=dtype).view(shape)
    if dtype in magnitudes.COMPLEX:
        w = torch.complex(torch.randn(shape).round(), torch.randn(shape).round())
        w[0, :2] = torch.tensor([complex(0, NAN), complex(INF, 1)])
        return w.to(dtype)
    w = torch.randn(shape).round(decimals=1)
    return w > 0 if dtype == torch.bool else w.to(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [d for d in magnitudes.ALL if d not in DTYPES], ids=str)
def test_every_other_dtype(dtype):
    w = sample(dtype, 6, 32)
    if dtype in magnitudes.FLOATS8:
        w[0, 3], w[1, 5] = NAN, -NAN
    values = w.to(torch.float32) if dtype in magnitudes.FLOATS8 else w
    for n, m in ((2, 4), (5, 16)):
        mask = nm_mask(w, n, m)
        assert torch.equal(mask, mask_by_hand(values, n, m, 1))
        pairs = [magnitude._by_pairs, magnitude._by_table, magnitude._by_sorting]
        keys = magnitudes.rank_keys(w).unflatten(1, (-1, m))
        assert all(torch.equal(way(keys, n, 2).flatten(1), mask) for way in pairs)
        traced = make_fx(partial(nm_mask, n=n, m=m), tracing_mode="fake")(w)
        assert torch.equal(traced(w), mask)


def test_the_most_negative_integer_is_the_largest():
    for dtype in magnitudes.SIGNED:
        info = torch.iinfo(dtype)
        w = torch.tensor([info.max, info.min, info.min + 1, 0], dtype=dtype)
        assert nm_mask(w, 1, 4).tolist() == [False, True, False, False]
        assert nm_mask(w, 2, 4).tolist() == [True, True, False, False]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (16, 32)])
def test_traced(n, m, mode):
    w, other = torch.randn(64, 5), torch.randn(128 if mode == "symbolic" else 64, 5)
    gm = make_fx(lambda w: nm_mask(w, n, m, 0), tracing_mode=mode)(w)
    assert torch.equal(gm(other), nm_mask(other, n, m, 0))
    called = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    opaque = {torch.ops.aten.sort.stable, torch.ops.aten.topk.default}
    assert not called & opaque  # so a compiler fuses all of it


@pytest.mark.parametrize("m", [4, 16])
def test_fake_and_meta_tensors(m):
    with FakeTensorMode():
        mask = nm_mask(torch.empty(6, 32).t(), 2, m, 0)
        assert (mask.shape, mask.stride(), mask.dtype) == ((32, 6), (1, 32), torch.bool)
    assert nm_mask(torch.empty(6, 32, device="meta"), 2, m).shape == (6, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4), "n=4 of every m=4 prunes nothing; pass n < m"),
        ((5, 4), "n=5 of every m=4 prunes nothing; pass n < m"),
        ((0, 4), "n=0 keeps nothing of every m=4; pass n >= 1"),
        ((-1, 4), "n=-1 keeps nothing"),
        ((True, 4), "n=True is of type bool; pass an int"),
        ((2, 4.0), "m=4.0 is of type float; pass an int"),
        ((2, 65), "m=65 is too large; pass m <= 64"),
        ((2, 4, True), "dim=True is of type bool; pass an int"),
        ((2, 4, 2), r"dim=2 is not a dimension of shape \(3, 10\); pass one from -2 to 1"),
        ((2, 4, -1), r"size 10 along dim=1 of shape \(3, 10\) is not a multiple of m=4; pad it"),
        ((2, 4, 0), r"size 3 along dim=0 of shape \(3, 10\) is not a multiple of m=4"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(MaskError, match=message):
        nm_mask(torch.randn(3, 10), *arguments)


def test_message_about_the_dtype():
    packed = torch.empty(4, 8, dtype=torch.float4_e2m1fn_x2)
    with pytest.raises(
        MaskError, match=f"{packed.dtype} tensor is not defined; convert it to one of float64"
    ):
        nm_mask(packed, 2, 4)


def test_message_about_a_scalar():
    with pytest.raises(MaskError, match=r"shape \(\) has no dimension to group"):
        nm_mask(torch.tensor(1.0), 2, 4)
