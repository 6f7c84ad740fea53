"""N:M masks by kernels: the masks that the operators make, ties and NaN included."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sparsefx import kernels, masks, ops
from sparsefx.errors import MaskError
from sparsefx.kernels.transposable_mask import triton as kernel
from sparsefx.masks import devices, entropic, exact, flow
from sparsefx.masks.tiles import map_tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


def twin(w, n, m, solve=exact.solve):
    """What the operators make, on the CPU."""
    return map_tiles(w.cpu(), m, lambda tiles: solve(tiles, n)).to(w.device)


def every_kind(rows, cols, dtype, device):
    """Weights of every kind side by side, each of so many columns."""
    w = torch.randn(rows, cols)
    tiny, chance = torch.finfo(dtype).smallest_normal, torch.rand_like(w)
    kinds = [w, w.round(), torch.where(w > 0, 2.0, 1.0), w**9, w * tiny / 4, w / w.abs().max()]
    kinds += [torch.full_like(w, 0.3), torch.zeros_like(w), w.where(chance > 0.1, -INF)]
    kinds += [kinds[-1].where(chance < 0.95, NAN), torch.full_like(w, NAN)]
    return torch.cat(kinds, 1).to(dtype).to(device)


def hidden(w):
    """The same values strided inside a larger NaN buffer: any read outside the view shows."""
    buffer = w.new_full([2 * size + 3 for size in w.shape], NAN)
    view = buffer[tuple(slice(1, 2 * size + 1, 2) for size in w.shape)]
    return view.copy_(w)


def full(mask, n, m):
    return masks.is_valid(mask, n, m, transposable=True, exact=True)


@pytest.fixture
def served(monkeypatch, device):
    """The kernels serve the tests' device, and take note; the operators stay at hand."""
    calls = []

    def solve(w, n, m, solver):
        calls.append((n, m, solver))
        return kernel.solve(w, n, m, solver)

    monkeypatch.setitem(devices._KERNELS, device, solve)
    return calls


# --- the best masks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_tiles_are_the_reference_s(n, dtype, device):
    w = every_kind(8, 44, dtype, device)
    assert torch.equal(kernel.solve(w, n, 4, "exact"), twin(w, n, 4))


@pytest.mark.parametrize(("n", "m", "dtype"), [(4, 8, DTYPES[0]), (6, 8, DTYPES[2])])
def test_larger_tiles_are_the_reference_s(n, m, dtype, device):
    w = every_kind(m, m, dtype, device)
    assert torch.equal(kernel.solve(w, n, m, "exact"), twin(w, n, m, flow.solve))


@pytest.mark.parametrize(("n", "m"), [(8, 16), (29, 32)])
def test_one_tile_to_a_program(n, m, device):
    w = torch.randn(m, m, device=device).half()
    w[0, :3] = torch.tensor([NAN, INF, 0])
    assert torch.equal(kernel.solve(w, n, m, "exact"), twin(w, n, m, flow.solve))


def test_the_first_of_equal_patterns(device):
    """Two best patterns that differ by a sum of other terms, equal only in exact arithmetic."""
    w = torch.tensor([[3, 1, 1, 2], [1, 3, 2, 1], [1, 2, 3, 1], [2, 1, 1, 3]], device=device)
    for scale in (2.0**-140, 2.0**120):
        scaled = (w * scale).float()
        for permuted in (scaled, scaled[:, [1, 0, 3, 2]]):
            for n in (1, 2, 3):
                assert torch.equal(kernel.solve(permuted, n, 4, "exact"), twin(permuted, n, 4))


def test_what_is_rounded_to_nothing_ties(device):
    """Below 2**-46 of a tile's largest, magnitudes count as equal to the operators and here."""
    w = torch.randn(8, 64, device=device) * 2.0**-45
    w[::4, ::4] = 1
    assert torch.equal(kernel.solve(w, 2, 4, "exact"), twin(w, 2, 4))


# --- near the best


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (7, 8), (8, 16), (16, 32)])
def test_entropic_is_full_and_near_the_best(n, m, device):
    w = torch.randn(m, 2 * m if m < 16 else m, device=device)
    kinds = [w, w**3, torch.rand_like(w), w.round(), torch.full_like(w, 0.3), w.where(w < 2, NAN)]
    w = torch.cat(kinds if m < 16 else kinds[:2] if m < 32 else kinds[:1], 1)
    mask = kernel.solve(w, n, m, "entropic")
    assert full(mask, n, m)
    level = w.abs().nan_to_num(1e4)
    best = twin(level, n, m, flow.solve)
    kept, most = (level.where(x, 0).split(2 * m, 1) for x in (mask, best))
    for mine, theirs in zip(kept, most, strict=True):
        assert mine.sum() >= 0.995 * theirs.sum()
    assert (mask == twin(w, n, m, entropic.solve)).float().mean() > 0.98  # step by step alike


def test_entropic_makes_the_same_again(device):
    w = torch.randn(8, 32, device=device).half()
    assert torch.equal(kernel.solve(w, 4, 8, "entropic"), kernel.solve(-w * 4, 4, 8, "entropic"))


# --- shapes and strides


@pytest.mark.parametrize(
    ("n", "m", "solver"), [(2, 4, "exact"), (3, 8, "exact"), (3, 8, "entropic")]
)
def test_any_strides_and_taps(n, m, solver, device, monkeypatch):
    monkeypatch.setattr(kernel.entropic, "ROUNDS", 5)
    w = torch.randn(m, 2 * m, 1, 2, device=device)
    plain = kernel.solve(w, n, m, solver)
    assert plain.shape == w.shape
    for view in (hidden(w), w.to(memory_format=torch.channels_last)):
        assert torch.equal(kernel.solve(view, n, m, solver), plain)
    flat = w[:, :, 0, 1]
    assert torch.equal(kernel.solve(flat, n, m, solver), plain[:, :, 0, 1])
    for view in (flat.T, flat[:, :1].expand(-1, m)):  # the latter's strides are zero
        mask = kernel.solve(view, n, m, solver)
        assert torch.equal(mask, kernel.solve(view.clone(), n, m, solver))
        assert full(mask, n, m)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (8, 8, 0)])
def test_empty(shape, device):
    for m in (4, 8):
        mask = kernel.solve(torch.empty(shape, device=device), 2, m, "exact")
        assert mask.shape == shape
        assert mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("shape", "m", "dtype", "solver"),
    [
        *[((8, 9), 4, torch.float32, "exact"), ((9, 8), 4, torch.float32, "exact")],
        *[((8, 8), 4, torch.float64, "exact"), ((8, 8), 4, torch.float32, "greedy")],
        *[((6, 6), 6, torch.float32, "greedy"), ((64, 64), 64, torch.float32, "greedy")],
    ],
)
def test_what_is_left_to_the_operators(shape, m, dtype, solver, device, served):
    w = torch.randn(shape, device=device).to(dtype)
    mask = masks.transposable_mask(w, 2, m, solver)
    assert served == [(2, m, solver)]
    assert mask.shape == shape
    assert kernel.solve(w, 2, m, solver) is None
    assert m == 4 or kernel.solve(w, 2, m, "exact") is None


# --- behind masks.transposable_mask


def test_masks_ask_the_kernel(device, served):
    w = torch.nn.Parameter(torch.randn(8, 8, device=device))
    mask, proof = masks.transposable_mask(w, 2, 4, "entropic", return_certificate=True)
    assert torch.equal(masks.transposable_mask(w, 2, 4), twin(w.detach(), 2, 4))
    assert served == [(2, 4, "entropic"), (2, 4, "exact"), (2, 4, "exact")]
    assert (proof.gap >= -1e-6).all()
    assert full(mask, 2, 4)


def test_traces_and_other_kinds_of_tensors_never_get_there(device, served):
    class Wrapped(torch.Tensor):
        pass

    w = torch.randn(8, 8, device=device)
    compiled = torch.compile(masks.transposable_mask, backend="eager")
    assert torch.equal(compiled(w, 2, 4), twin(w, 2, 4))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: masks.transposable_mask(x, 2, 4))
    assert torch.equal(traced(w)(w), twin(w, 2, 4))
    masks.transposable_mask(w.as_subclass(Wrapped), 2, 4)
    with FakeTensorMode() as mode:
        assert masks.transposable_mask(mode.from_tensor(w), 2, 4).shape == w.shape
    assert served == []


def test_a_device_has_the_kernel_that_was_given_last(monkeypatch):
    monkeypatch.setattr(devices, "_KERNELS", {})
    masks.accelerate("cpu", lambda w, n, m, solver: None)
    masks.accelerate("cpu", lambda w, n, m, solver: torch.ones_like(w, dtype=torch.bool))
    assert masks.transposable_mask(torch.zeros(4, 4), 2, 4).all()
    monkeypatch.setattr(devices, "_KERNELS", {})
    kernels.register()
    assert set(devices._KERNELS) == {"cuda"}
    monkeypatch.setattr(devices, "_KERNELS", {})
    monkeypatch.setattr(kernels, "_installed", lambda package: not package)
    kernels.register()
    assert devices._KERNELS == {}  # without triton the operators serve


# --- row by row, and the op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (3, 5), (16, 32), (21, 31)])
def test_rows_are_the_reference_s(n, m, dtype, device):
    w = every_kind(m, m, dtype, device)
    for view, dim in [(w, -1), (w.T, 0)] if m < 9 else [(w, 0)]:
        got = kernel.nm_mask(view, n, m, dim, False)
        assert torch.equal(got, masks.nm_mask(view, n, m, dim))
        assert got.is_contiguous()


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_rows_of_any_strides(dim, device):
    w = torch.randn(4, 4, 1, 36, device=device)
    turned = w.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    for view in (hidden(w), turned, torch.cat([w, w])[::2]):
        got = kernel.nm_mask(view, 2, 4, dim, False)
        assert torch.equal(got, masks.nm_mask(view, 2, 4, dim))


@pytest.mark.parametrize(
    ("w", "pattern"),
    [
        (torch.randn(8, 8), (2, 4, 1, True)),
        (torch.randn(8, 8).double(), (2, 4, 1, False)),
        (torch.arange(-32, 32).view(8, 8), (2, 4, 0, False)),
        (torch.randn(8, 80), (3, 40, 1, False)),
        (torch.empty(0, 8), (2, 4, 1, False)),
    ],
)
def test_the_op_s_kernel_means_what_the_op_means(w, pattern, device, monkeypatch):
    monkeypatch.setattr(kernel.rows, "solve", None)  # a call would raise
    got = kernel.nm_mask(w.to(device), *pattern)
    assert torch.equal(got.cpu(), ops.REFERENCES[ops.nm_mask](w, *pattern))
    assert got.is_contiguous()


@pytest.mark.parametrize(
    ("shape", "pattern", "message"),
    [
        (
            (6, 8),
            (2, 4, 0, False),
            "size 6 along dim=0 of shape .6, 8. is not a multiple of m",
        ),
        ((8, 8), (4, 4, 0, False), "n=4 of every m=4 prunes nothing"),
        ((8, 8), (0, 4, 0, True), "n=0 keeps nothing of every m=4"),
        ((8, 8), (2, 4, 2, False), "dim=2 is not a dimension"),
        ((), (2, 4, 0, False), r"shape \(\) has no dimension to group"),
        ((8,), (2, 4, 0, True), r"shape \(8,\) has 1; pass a matrix"),
    ],
)
def test_messages(shape, pattern, message, device):
    with pytest.raises(MaskError, match=message):
        kernel.nm_mask(torch.zeros(shape, device=device), *pattern)
