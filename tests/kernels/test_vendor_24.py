"""vendor_24: twins of the libraries on the CPU, some of whose algorithms are wrong."""

import json
import warnings

import pytest
import torch
from torch.nn import functional as F

from sparsefx import compat, ops
from sparsefx.errors import KernelError, MaskError, SparsefxWarning
from sparsefx.kernels.vendor_24 import launch, search, store
from sparsefx.ops.semi_structured import misfit, unpacked

DTYPES = [torch.float16, torch.bfloat16]
FASTEST = 5  # of those that are right: 0, 5 and 6
CALLS: list[int] = []


def product(library, packed, x, bias, algorithm):
    """The twin of cuSPARSELt: 1 isn't there, 2 spoils a tile, 3 a run of three, 4 adds no bias."""
    assert x.is_contiguous()
    assert len(x) % 16 == 0
    CALLS.append(algorithm)
    if algorithm == 1 or algorithm > 6:
        raise RuntimeError("CUDA error: operation not supported")
    y = F.linear(x, unpacked(packed, x.shape[1]), None if algorithm == 4 else bias)
    if algorithm == 2:
        y[-16:, -8:] = 0
    if algorithm == 3 and len(CALLS) % search.REPEATS == 0:
        y[0, 0] += 1
    return y


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no memory of earlier tests; masked_mm without its C++."""
    monkeypatch.setattr(ops, "masked_mm", ops.REFERENCES[ops.masked_mm])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (store._warn_once, launch._warn_once):
        cached.cache_clear()
    store.forget()
    CALLS.clear()
    yield tmp_path / "sparsefx" / "vendor-24-cpu.json"
    store.forget()


@pytest.fixture
def library(monkeypatch):
    """This machine, as if it had cuSPARSELt."""
    speed = {0: 3.0, 2: 0.1, 3: 0.2, 4: 0.3, FASTEST: 1.0, 6: 2.0}
    monkeypatch.setattr(compat, "semi_structured_library", lambda device: "cusparselt")
    monkeypatch.setattr(
        compat,
        "semi_structured_compress",
        lambda _, w: ops.REFERENCES[ops.nm24_compress](w, w != 0),
    )
    monkeypatch.setattr(compat, "semi_structured_mm", product)
    monkeypatch.setattr(compat, "semi_structured_suggested", lambda *_: 6)
    monkeypatch.setattr(compat, "semi_structured_algorithms", lambda: 9)

    def clock(run):
        run()
        return speed[CALLS[-1]]

    monkeypatch.setattr(search, "milliseconds", clock)
    return "cusparselt"


def operands(rows, depth, cols, dtype, transposable=True):
    """Return x [M, K], w [K, N] as a transposed view, its mask, a bias."""
    stored = torch.randn(cols, depth, dtype=dtype)
    mask = ops.nm_mask(stored, 2, 4, 1, transposable)
    x, bias = torch.randn(rows, depth, dtype=dtype), torch.randn(cols, dtype=dtype)
    return x, stored.t(), mask.t(), bias


def run(x, w, mask, bias):
    return launch.nm24_mm(x, launch.nm24_compress(w.t(), mask.t()), w, mask, bias)


# --- the product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_forward_and_grad_input(library, rows, dtype, assert_as_good_as_eager):
    x, w, mask, bias = operands(rows, 64, 32, dtype)
    kept = torch.where(mask, w, 0)
    for b in (bias, None):
        assert_as_good_as_eager(run(x, w, mask, b), x, kept, b)
    grad = torch.randn(rows, 32, dtype=dtype)
    assert_as_good_as_eager(run(grad, w.t(), mask.t(), None), grad, kept.t())
    assert FASTEST in CALLS


def test_strides_nan_and_zeros_that_are_kept(library, assert_as_good_as_eager):
    x, w, mask, bias = operands(20, 64, 32, torch.float16)
    w[:, :4] = 0
    wide = torch.full((40, 64), float("nan"), dtype=x.dtype)
    wide[::2] = x
    steps = torch.stack([bias, bias * float("nan")], 1)[:, 0]
    packed = launch.nm24_compress(w.t(), mask.t())
    y = launch.nm24_mm(wide[::2], packed, w, mask, steps)
    assert_as_good_as_eager(y, x, torch.where(mask, w, 0), bias)
    w[mask.nonzero()[0].tolist()] = float("nan")
    assert run(x, w, mask, bias).isnan().any()


def test_empty_rows_and_mixed_dtypes_take_masked_mm(library):
    x, w, mask, bias = operands(0, 64, 32, torch.float16)
    assert run(x, w, mask, bias).shape == (0, 32)
    with pytest.raises(RuntimeError, match="dtype"):
        run(torch.randn(4, 64), w, mask, None)
    assert not CALLS


@pytest.mark.parametrize("shape", [(64, 24), (48, 32), (0, 32)])
def test_what_does_not_fit_takes_the_reference(library, shape):
    depth, cols = shape
    x, w, mask, bias = operands(5, depth, cols, torch.float16)
    expected = torch.addmm(bias, x, torch.where(mask, w, 0))
    torch.testing.assert_close(run(x, w, mask, bias), expected, atol=2e-3, rtol=0)
    assert not CALLS
    x, w, mask, bias = operands(5, 64, 32, torch.float32)
    torch.testing.assert_close(run(x, w, mask, bias), x @ torch.where(mask, w, 0) + bias)
    assert not CALLS


def test_without_a_library_the_reference_runs():
    x, w, mask, bias = operands(5, 64, 32, torch.bfloat16, transposable=False)
    assert not launch.serving(w)
    packed = launch.nm24_compress(w.t(), mask.t())
    assert torch.equal(packed, ops.nm24_compress(w.t(), mask.t()))
    assert packed.shape == (32, 36)
    assert torch.equal(unpacked(packed, 64), torch.where(mask, w, 0).t())
    y = launch.nm24_mm(x, packed, w, mask, bias)
    torch.testing.assert_close(y, torch.addmm(bias, x, torch.where(mask, w, 0)))


def test_compress_says_what_is_wrong(library, monkeypatch):
    w, mask = torch.randn(32, 64).half(), torch.zeros(32, 64)
    with pytest.raises(MaskError, match=r"nm24_compress: w \[32, 64\] with a mask torch.float32"):
        launch.nm24_compress(w, mask)
    with pytest.raises(MaskError, match=r"w \[32, 6\] .* columns are a multiple of 4"):
        ops.nm24_compress(torch.randn(32, 6), torch.ones(32, 6, dtype=torch.bool))
    monkeypatch.setattr(compat, "semi_structured_compress", lambda _, kept: kept)
    with pytest.raises(
        KernelError, match=r"compresses \[32, 64\] to \[32, 64\], expected \[32, 36"
    ):
        launch.nm24_compress(w, mask.bool())

    def refuses(library, kept):
        raise RuntimeError("architecture mismatch")

    monkeypatch.setattr(compat, "semi_structured_compress", refuses)
    with pytest.raises(KernelError, match=r"can't compress .* architecture mismatch; leave"):
        launch.nm24_compress(w, mask.bool())


def test_misfit():
    assert misfit(32, 64, torch.float16, "cusparselt") == misfit(64, 64, DTYPES[1], "cutlass") == ""
    assert misfit(32, 64, torch.float16, "cutlass") == (
        "cutlass takes 2:4 weights of multiples of 64, not [32, 64]"
    )
    assert misfit(32, 64, torch.float32, "cusparselt").endswith("here, not in torch.float32")
    assert misfit(32, 64, torch.float16, "").startswith("neither cuSPARSELt nor CUTLASS")


# --- which algorithm


def test_wrong_algorithms_are_refused_and_the_fastest_right_one_kept(library, cache):
    args = operands(40, 64, 32, torch.float16)
    run(*args)
    assert CALLS[-1] == FASTEST
    assert CALLS[:3] == [6] * 3  # the library's own suggestion first
    found = json.loads(cache.read_text())["found"]
    assert found == {"cusparselt float16 64 32 64 True False": FASTEST}
    CALLS.clear()
    run(*args)
    run(torch.randn(64, 64).half(), *args[1:])  # the same power of two
    assert CALLS == [FASTEST] * 2
    store.forget()
    run(*args)  # another process
    assert CALLS == [FASTEST] * 3


def test_one_that_is_wrong_now_and_then_is_not_chosen(library, monkeypatch):
    def seldom(*args):
        y = product(*args)
        return y + 1 if CALLS[-1] == FASTEST and CALLS.count(FASTEST) == 15 else y

    monkeypatch.setattr(compat, "semi_structured_mm", seldom)
    x = torch.randn(16, 64).half()
    assert search.algorithm(library, x, 32, bias=True) == 6


def test_a_suggestion_that_fails_and_a_deterministic_run(library, monkeypatch):
    def fails(*_):
        raise RuntimeError("internal error")

    monkeypatch.setattr(compat, "semi_structured_suggested", fails)
    x = torch.randn(16, 64).half()
    assert search.algorithm(library, x, 32, bias=False) == 4  # 4 leaves out a bias that isn't there
    monkeypatch.setattr(search, "_repeatable", lambda: True)
    assert search.algorithm(library, x, 32, bias=True) == 0


def test_no_right_algorithm_runs_masked_and_warns_once(library, monkeypatch, cache):
    monkeypatch.setattr(
        compat, "semi_structured_mm", lambda *_: product(*_[:-1], 0).add_(_[2].new_tensor(0.5))
    )
    x, w, mask, bias = operands(16, 64, 32, torch.float16)
    expected = torch.addmm(bias, x, torch.where(mask, w, 0))
    with pytest.warns(SparsefxWarning, match=r"float16 16 x 32 x 64 .* no algorithm is known"):
        assert torch.equal(run(x, w, mask, bias), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(x, w, mask, bias), expected)
    assert -1 in json.loads(cache.read_text())["found"].values()


def test_nothing_is_looked_for_while_a_graph_is_recorded(library, monkeypatch):
    x, w, mask, bias = operands(16, 64, 32, torch.float16)
    monkeypatch.setattr(compat, "recording", lambda device: True)
    with pytest.warns(SparsefxWarning, match="run the model once before a CUDA graph"):
        run(x, w, mask, bias)
    assert not CALLS
    monkeypatch.setattr(compat, "recording", lambda device: False)
    run(x, w, mask, bias)
    monkeypatch.setattr(compat, "recording", lambda device: True)
    CALLS.clear()
    run(x, w, mask, bias)
    assert CALLS == [FASTEST]


@pytest.mark.parametrize("where", ["semi_structured_suggested", "semi_structured_mm"])
def test_no_memory_to_look(library, monkeypatch, cache, where):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compat, where, full)
    x, w, mask, bias = operands(16, 64, 32, torch.float16)
    masked = pytest.warns(SparsefxWarning, match="no algorithm is known")
    with masked, pytest.warns(SparsefxWarning, match="no memory to check algorithms"):
        y = run(x, w, mask, bias)
    torch.testing.assert_close(y, torch.addmm(bias, x, torch.where(mask, w, 0)))
    assert not cache.exists()


def test_a_search_draws_none_of_the_users_random_numbers(library):
    before = torch.get_rng_state()
    search.algorithm(library, torch.ones(16, 64).half(), 32, bias=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_checked_rows_reach_every_place_of_a_tile(library, monkeypatch):
    monkeypatch.setattr(search, "CHECKED", 64)
    x = torch.ones(1024, 32).half()
    one = search.trial(search.key_of(library, x, 32, False), 1024, x)
    assert len(one.places) == 64
    assert set((one.places % 16).tolist()) == set(range(16))
    assert (one.packed.shape, one.bias) == ((32, 18), None)


# --- the file


@pytest.mark.parametrize("text", ["{", "[]", '{"found": {"a": "b"}}'])
def test_a_spoilt_file_is_told_of_once_and_replaced(library, cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.warns(SparsefxWarning, match=r"vendor-24-cpu.json (can't be read|holds no table)"):
        search.algorithm(library, torch.ones(16, 64).half(), 32, bias=False)
    assert json.loads(cache.read_text())["device"] == "cpu"


def test_other_versions_and_other_processes(library, cache, monkeypatch):
    key = ("cusparselt", "cpu", "float16", 16)
    store.put(key, 3)
    store.forget()
    store.put((*key, 1), 4)  # as another process would
    store.forget()
    assert (store.get(key), store.get((*key, 1)), store.get((*key, 2))) == (3, 4, None)
    store.forget()
    monkeypatch.setattr(compat, "semi_structured_version", lambda: "torch 9")
    assert store.get(key) is None
    store.put(key, 5)
    assert json.loads(cache.read_text())["found"] == {"cusparselt float16 16": 5}


def test_a_cache_that_can_not_be_written(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.warns(SparsefxWarning, match="can't be"):
        store.put(("cusparselt", "cpu"), 1)
    assert store.get(("cusparselt", "cpu")) == 1


# --- torch's own parts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 100, 512])
def test_the_real_library(rows, dtype, assert_as_good_as_eager):
    x, w, mask, bias = (one.cuda() for one in operands(rows, 256, 128, dtype))
    if not launch.serving(w.t()):
        pytest.skip("no library serves this GPU")
    kept = torch.where(mask, w, 0)
    for b in (bias, None):
        assert_as_good_as_eager(run(x, w, mask, b), x, kept, b)
    grad = torch.randn(rows, 128, dtype=dtype, device="cuda")
    assert_as_good_as_eager(run(grad, w.t(), mask.t(), None), grad, kept.t())
    assert all(i >= 0 for i in store._known.values())


@pytest.mark.parametrize("with_bias", [False, True])
def test_cutlass_in_one_flat_buffer(monkeypatch, with_bias):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    def mm(values, places, right):
        return sparse_semi_structured_to_dense_cutlass(values, places) @ right

    def addmm(bias, *rest):
        return mm(*rest) + bias[:, None]

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", addmm)
    monkeypatch.setattr(compat, "semi_structured_library", lambda device: "cutlass")
    monkeypatch.setattr(search, "milliseconds", lambda run: 1.0)
    x, w, mask, bias = operands(33, 128, 64, torch.bfloat16)
    bias = bias if with_bias else None
    packed = launch.nm24_compress(w.t(), mask.t())
    assert packed.shape == (64, 72)
    y = launch.nm24_mm(x, packed, w, mask, bias)
    twin, bound = search.expected(x, torch.where(mask, w, 0).t(), bias)
    assert ((y.double() - twin).abs() <= bound).all()
    assert y.is_contiguous()


def test_cusparselt_gets_what_it_takes(monkeypatch):
    seen = {}

    def mm(packed, right, **rest):
        seen.update(rest, contiguous=right.is_contiguous())
        return right.t() @ torch.eye(right.shape[0])[:, :32]

    monkeypatch.setattr(torch, "_cslt_compress", lambda kept: torch.zeros(kept.numel() * 9 // 16))
    monkeypatch.setattr(torch, "_cslt_sparse_mm", mm)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda packed, right, **rest: 7)
    packed = compat.semi_structured_compress("cusparselt", torch.zeros(32, 64))
    assert packed.shape == (32, 36)
    x = torch.randn(16, 64)
    assert compat.semi_structured_mm("cusparselt", packed, x, None, 3).shape == (16, 32)
    assert seen == {"bias": None, "transpose_result": True, "alg_id": 3, "contiguous": False}
    assert compat.semi_structured_suggested(packed, x, None) == 7


def test_which_library():
    choice = compat.semi_structured_choice
    assert [choice(9, 600), choice(9, 502), choice(8, 502)] == [
        "cusparselt",
        "cutlass",
        "cusparselt",
    ]
    assert [choice(8, 0), choice(10, 0), choice(7, 800), choice(10, 702)] == [
        "cutlass", "", "", "cusparselt"
    ]  # fmt: skip
    assert compat.semi_structured_library(torch.device("cpu")) == ""
    assert compat.semi_structured_version().startswith(f"torch {torch.__version__}, cuSPARSELt ")
    assert compat.semi_structured_algorithms() > 1
    assert not compat.recording(torch.device("cpu"))
