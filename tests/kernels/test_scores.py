"""The k largest pairs by norm, and the sums behind them: values against the references."""

import math

import pytest
import torch

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.kernels.scores import triton as scores

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = math.nan, math.inf


@pytest.fixture
def splits(monkeypatch):
    """Have small tiles and three splits."""
    tile = {"BR": 16, "BD": 16, "splits": 3, "num_warps": 1}
    monkeypatch.setattr(scores._tiles, "sums", lambda *shape: dict(tile))


def hidden(t):
    """The same values strided inside a larger NaN buffer: any read outside the view shows."""
    *batch, rows, cols = t.shape
    buffer = t.new_full((*batch, 2 * rows + 3, 3 * cols + 5), NAN)
    view = buffer[..., 1 : 2 * rows + 1 : 2, 2 : 3 * cols + 2 : 3]
    return view.copy_(t)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("square", [True, False])
def test_sums_of_both_sides(dtype, square, device):
    a = torch.randn(2, 19, 50, dtype=dtype, device=device)
    b = torch.randn(2, 33, 50, dtype=dtype, device=device)
    weight = None if square else hidden(torch.randn(1, 50, device=device))[0]
    parts = scores.partial_sums(hidden(a), b.mT.contiguous().mT, weight, square=square)
    both = torch.cat([a, b], 1).double()
    terms = both.square() if square else both * weight.double()
    bound = 52 * torch.finfo(torch.float32).eps * terms.abs().sum(-1)
    assert parts.dtype == torch.float32
    assert ((parts.double().sum(1) - terms.sum(-1)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_finished_in_the_dtype_of_the_operands(dtype, device):
    parts = torch.rand(1, 3, 300, device=device)
    y = scores.finished(parts, torch.ones(1, dtype=dtype, device=device), 100, 7)
    twin = parts[0].double().sum(0)
    twin[100:] /= 7
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), twin, rtol=torch.finfo(dtype).eps, atol=0)
    assert scores.finished(parts[..., :0], y, 0, 1).shape == (0,)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize(
    ("kind", "dtype"), list(zip(["product", "left", "right"], DTYPES, strict=True))
)
def test_largest_pairs(dtype, kind, device):
    x = torch.randn(37, 41, dtype=dtype, device=device)
    w = torch.randn(41, 18, dtype=torch.float32, device=device)  # sides may differ in dtype
    for k, one, other in [(20, x, w.T.contiguous().T), (41, hidden(x.T).T, hidden(w))]:
        found = scores.topk_mm_indices(one, other, k, kind)
        assert found.dtype == torch.int64
        assert torch.equal(found, ops.REFERENCES[ops.topk_mm_indices](x, w, k, kind))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's: inf, NaN
@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("largest", [8192, 8])
def test_ties_and_what_is_not_finite(largest, device, monkeypatch):
    monkeypatch.setattr(scores, "LARGEST", largest)  # above it torch sorts
    x, w = torch.ones(3, 12, device=device), torch.ones(12, 2, device=device)
    w[4] = 2
    assert scores.topk_mm_indices(x, w, 3, "product").tolist() == [0, 1, 4]
    x[1, 7], x[2, 9], w[2, 0] = INF, 1e30, 0  # a square that overflows counts as infinite
    assert scores.topk_mm_indices(x, w, 1, "left").tolist() == [7]
    w[11, 1], x[0, 5], w[5] = NAN, INF, 0  # inf * 0 is NaN too
    for k in (2, 3, 5):
        found = scores.topk_mm_indices(x, w, k, "product")
        assert torch.equal(found, ops.REFERENCES[ops.topk_mm_indices](x, w, k, "product"))


@pytest.mark.parametrize("largest", [8192, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_batches_each_their_own(largest, shared, device, monkeypatch):
    monkeypatch.setattr(scores, "LARGEST", largest)
    x, w = torch.randn(3, 6, 11, device=device), torch.randn(3, 11, 5, device=device)
    w = w[:1].expand(3, -1, -1) if shared else w
    for kind in ("product", "left", "right"):
        expected = ops.REFERENCES[ops.topk_mm_indices](x, w, 4, kind)
        assert torch.equal(scores.topk_mm_indices(hidden(x), w, 4, kind), expected)


@pytest.mark.parametrize(
    ("m", "depth", "n", "k"), [(0, 5, 3, 2), (4, 5, 0, 2), (0, 5, 0, 5), (3, 0, 3, 0), (3, 4, 3, 0)]
)
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_empty(m, depth, n, k, batch, device):
    x, w = torch.ones(*batch, m, depth, device=device), torch.ones(*batch, depth, n, device=device)
    found = scores.topk_mm_indices(x, w, k, "product")
    assert torch.equal(found, ops.REFERENCES[ops.topk_mm_indices](x, w, k, "product"))
    given = torch.zeros(*batch, depth, device=device)
    expected = ops.REFERENCES[ops.topk_indices](given, k)
    assert torch.equal(scores.topk_indices(given, k), expected)


VALUES = [NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.0, 1e-42, -1e-42, 3e38, -3e38]


def test_of_scores(device):
    for count in (1, 2, 3, 9, 9, 9, 9, 9):
        given = torch.tensor(VALUES, device=device)[torch.randint(len(VALUES), (count,))]
        k = int(torch.randint(count + 1, ()))
        expected = ops.REFERENCES[ops.topk_indices](given, k)
        assert torch.equal(scores.topk_indices(given, k), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_batch_of_scores(dtype, device):
    given = torch.randint(-9, 9, (2, 2, 70), device=device).to(dtype)
    strided = given.mT.contiguous().mT
    for k in (33, 70):
        found = scores.topk_indices(strided, k)
        assert torch.equal(found, ops.REFERENCES[ops.topk_indices](given, k))


def refuse(*_, **__):
    raise AssertionError("a kernel was launched")


def test_what_takes_the_reference(device, monkeypatch):
    x, w = torch.randn(3, 10, device=device), torch.randn(10, 4, device=device)
    batched = x[None].expand(2, -1, -1)
    reference = ops.REFERENCES[ops.topk_mm_indices]
    monkeypatch.setattr(scores, "partial_sums", refuse)
    for one, other in [
        (x.double(), w),
        (x, w.double()),
        (batched, w),
        (x[None, None], w[None, None]),
    ]:
        found = scores.topk_mm_indices(one, other, 4, "product")
        assert torch.equal(found, reference(one, other, 4, "product"))
    monkeypatch.setattr(scores, "GRID", 1)
    both = batched, w[None].expand(2, -1, -1)
    assert torch.equal(scores.topk_mm_indices(*both, 4, "left"), reference(*both, 4, "left"))
    with pytest.raises(RuntimeError, match="exceed"):
        scores.topk_mm_indices(x, w, 11, "product")
    monkeypatch.setattr(scores, "_topk_kernel", refuse)  # indexing it would fail
    for given in (x[0].double(), x[0].int()):
        assert (
            scores.topk_indices(given, 3).tolist()
            == ops.REFERENCES[ops.topk_indices](given, 3).tolist()
        )
    monkeypatch.setattr(scores, "LARGEST", 9)
    assert torch.equal(scores.topk_indices(x[0], 10), torch.arange(10, device=device))
    with pytest.raises(RuntimeError, match="exceed"):
        scores.topk_indices(x[0, :5], 6)


def test_tiles():
    chip = _tiles.Chip()
    assert _tiles.sums(4096, 4096, 4096, 1, chip)["splits"] == 5
    assert _tiles.sums(64, 64, 1 << 20, 1, chip)["splits"] == 8  # one program adds them up
    assert _tiles.sums(64, 64, 100, 1, chip)["splits"] == 2  # whole tiles each
    assert _tiles.sums(0, 0, 0, 0, chip)["splits"] == 1
    assert _tiles.choosing(8192) == {"BLOCK": 8192, "num_warps": 16}
    assert _tiles.choosing(1) == {"BLOCK": 1, "num_warps": 1}
