"""masked_mm on a GPU: listed and unlisted tiles against a plain twin; what takes the reference."""

import warnings

import pytest
import torch

from sparsefx import ops
from sparsefx.kernels.masked_mm import triton as masked

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = {"BM": 16, "BN": 16, "BK": 16, "GROUP": 8, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles along every side of a small product."""
    monkeypatch.setattr(masked._tiles, "gemm", lambda *shape: dict(SMALL))


@pytest.fixture
def inside(monkeypatch):
    """The launcher always takes the kernel."""
    monkeypatch.setattr(masked._tiles, "stored_mask_in_gemm", lambda *shape: True)


def keep(w, mask):
    return w.masked_fill(~mask, 0)


def blocks(depth, cols, device):
    """A mask with empty tiles, an empty row of them, an empty column, and one weight in a tile."""
    mask = torch.zeros(depth, cols, dtype=torch.bool, device=device)
    mask[16:32, :16] = torch.rand(16, 16, device=device) < 0.5
    mask[48:, :16] = True
    mask[-1, -1] = True
    mask[5, 17] = True
    return mask


def operands(rows, depth, cols, dtype, device):
    x = torch.randn(rows, depth, dtype=dtype, device=device)
    w = torch.randn(depth, cols, dtype=dtype, device=device)
    return x, w, torch.randn(cols, dtype=dtype, device=device)


def hidden(t, filled):
    """The same values strided inside a larger buffer: any read outside the view shows."""
    rows, cols = t.shape
    buffer = torch.full((2 * rows + 3, 3 * cols + 5), filled, dtype=t.dtype, device=t.device)
    view = buffer[1 : 2 * rows + 1 : 2, 2 : 3 * cols + 2 : 3]
    return view.copy_(t)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype, skip, device, small_tiles, assert_as_good_as_eager):
    x, w, bias = operands(19, 75, 53, dtype, device)
    for mask in (blocks(75, 53, device), torch.rand(75, 53, device=device) < 0.1):
        y = masked.fused(x, w, mask, bias, skip=skip)
        assert_as_good_as_eager(y, x, keep(w, mask), bias)


@pytest.mark.parametrize("skip", [True, False])
def test_the_tiles_of_the_table(skip, device, assert_as_good_as_eager):
    x, w, _ = operands(33, 140, 70, torch.float32, device)
    mask = torch.rand(140, 70, device=device) < 0.2
    assert_as_good_as_eager(masked.fused(x, w, mask, None, skip=skip), x, keep(w, mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, device, small_tiles, inside, assert_as_good_as_eager):
    """The input's is the same product of transposed views; autograd through the op says so."""
    x, w, bias = operands(21, 40, 34, dtype, device)
    mask = torch.rand(40, 34, device=device) < 0.3
    grad = torch.randn(21, 34, dtype=dtype, device=device)
    leaves = [t.double().requires_grad_() for t in (x, w, bias)]
    y = ops.masked_mm(*leaves[:2], mask, leaves[2])
    expected = torch.autograd.grad(y, leaves, grad.double())
    got = masked.masked_mm(grad, w.t(), mask.t(), None)
    assert_as_good_as_eager(got, grad, keep(w, mask).t())
    torch.testing.assert_close(expected[0], grad.double() @ keep(w, mask).t().double())
    torch.testing.assert_close(expected[1], keep(x.double().t() @ grad.double(), mask))


def test_occupied_lists_each_tile_once(device):
    for depth, cols in [(75, 53), (1, 1), (64, 16)]:
        mask = torch.rand(depth, cols, device=device) < 0.01
        mask[:, :1] = False
        order, counts = masked.occupied(mask.view(torch.uint8), 16, 16)
        down, across = -(-depth // 16), -(-cols // 16)
        assert order.shape == (across, down)
        for column in range(across):
            found = order[column, : counts[column]].tolist()
            tiles = [
                mask[16 * t : 16 * t + 16, 16 * column : 16 * column + 16] for t in range(down)
            ]
            assert found == [t for t, tile in enumerate(tiles) if tile.any()]


@pytest.mark.parametrize("skip", [True, False])
def test_any_strides(skip, device, small_tiles, assert_as_good_as_eager):
    x, w, bias = operands(17, 36, 20, torch.float32, device)
    mask, nan = torch.rand(36, 20, device=device) < 0.4, float("nan")
    bits = hidden(mask.t().contiguous(), True).t()
    y = masked.fused(
        hidden(x.T, nan).T, hidden(w, nan), bits, hidden(bias[None], nan)[0], skip=skip
    )
    assert_as_good_as_eager(y, x, keep(w, mask), bias)
    row, column = x[:1].expand(17, -1), mask[:, :1].expand(-1, 20)  # strides of zero
    y = masked.fused(row, w, column, None, skip=skip)
    assert_as_good_as_eager(y, row, keep(w, column))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_mask_drops_cannot_spread_and_what_it_keeps_shows(dtype, skip, device):
    x = torch.ones(2, 4, dtype=dtype, device=device)
    w = torch.tensor([[1, float("nan")], [float("inf"), 2], [1, 1], [1, 1]], dtype=dtype).to(device)
    mask = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]], dtype=torch.bool, device=device)
    y = masked.fused(x, w, mask, None, skip=skip)
    assert y[:, 0].tolist() == [2, 2]
    assert y[:, 1].isnan().all()
    none = masked.fused(x, w, torch.zeros_like(mask), w[2], skip=skip)
    assert none.tolist() == [[1, 1]] * 2


def test_an_input_that_meets_an_empty_tile_alone_is_not_read(device, small_tiles):
    """The reference multiplies an infinity by 0; README.md tells of the difference."""
    x = torch.ones(1, 32, device=device)
    x[0, 20] = float("inf")
    mask = torch.zeros(32, 1, dtype=torch.bool, device=device)
    mask[3] = True
    w = torch.ones(32, 1, device=device)
    assert masked.fused(x, w, mask, None, skip=True).item() == 1
    mask[17] = True  # the tile is no longer empty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's remark, under the interpreter
        assert masked.fused(x, w, mask, None, skip=True).isnan().all()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("rows", "depth", "cols"), [(0, 8, 4), (3, 8, 0), (3, 0, 4), (0, 0, 0)])
def test_empty(rows, depth, cols, skip, device):
    x, w, bias = operands(rows, depth, cols, torch.float32, device)
    mask = torch.zeros(depth, cols, dtype=torch.bool, device=device)
    assert torch.equal(masked.fused(x, w, mask, bias, skip=skip), bias.expand(rows, cols))
    assert torch.equal(masked.fused(x, w, mask, None, skip=skip), torch.zeros_like(x @ w))


@pytest.mark.parametrize("skips", [True, False])
def test_launcher_takes_the_way_that_the_tiles_say(skips, monkeypatch, device, inside):
    x, w, bias = operands(5, 16, 8, torch.float32, device)
    taken = []
    monkeypatch.setattr(masked._tiles, "empty_tiles_skipped", lambda *shape: skips)
    monkeypatch.setattr(masked, "fused", lambda *_, skip: taken.append(skip))
    masked.masked_mm(x, w, torch.ones_like(w, dtype=torch.bool), bias)
    assert taken == [skips]


def test_few_rows_take_the_mask_inside_and_many_list_its_tiles():
    """A list pays from where it costs little of the product, which is where copies cost little."""
    for itemsize, few, many in [(2, 16, 4096), (4, 16, 512)]:
        assert masked._tiles.stored_mask_in_gemm(few, 4096, 4096, itemsize)
        assert not masked._tiles.empty_tiles_skipped(few, 4096, 4096, itemsize)
        assert not masked._tiles.stored_mask_in_gemm(many, 4096, 4096, itemsize)
        assert masked._tiles.empty_tiles_skipped(many, 4096, 4096, itemsize)
    assert masked._tiles.stored_mask_in_gemm(1024, 4096, 4096, 2)
    assert masked._tiles.empty_tiles_skipped(1024, 4096, 4096, 2)
    assert masked._tiles.stored_mask_in_gemm(0, 0, 0, 4)


@pytest.mark.parametrize("shared", [64 * 1024, 99 * 1024, 227 * 1024])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_tile_leaves_room_for_the_mask(shared, itemsize):
    for rows in (1, 16, 100, 4096):
        t = masked._tiles.stored_mask_gemm(rows, 4096, 4096, itemsize, masked._tiles.Chip(shared))
        weights = t["BN"] * t["BK"]
        stage = t["BM"] * t["BK"] * itemsize + weights * (itemsize + 1)
        assert t["num_stages"] * stage + weights * itemsize <= shared
        assert t["num_stages"] > 1 or shared < 99 * 1024


def test_launcher_leaves_to_the_reference(monkeypatch, device, inside):
    x, w, bias = operands(5, 16, 8, torch.float32, device)
    mask = torch.rand(16, 8, device=device) < 0.5
    monkeypatch.setattr(masked, "fused", None)  # a call would raise
    for call in [
        (x.double(), w.double(), mask, bias.double()),
        (x, w, mask[:, :1], bias),  # it broadcasts
        (x, w, mask[0], None),
    ]:
        assert torch.equal(masked.masked_mm(*call), ops.REFERENCES[ops.masked_mm](*call))
    with pytest.raises(RuntimeError, match="dtype"):
        masked.masked_mm(x, w.half(), mask, None)
    monkeypatch.setattr(masked._tiles, "stored_mask_in_gemm", lambda *shape: False)
    assert torch.equal(masked.masked_mm(x, w, mask, bias), torch.addmm(bias, x, keep(w, mask)))


def test_launcher_says_what_is_wrong(device, inside):
    x, w, _ = operands(5, 6, 8, torch.float32, device)
    with pytest.raises(ValueError, match=r"x \[6, 5\] @ w \[6, 8\]: K differs"):
        masked.masked_mm(x.T, w, torch.ones_like(w, dtype=torch.bool), None)
