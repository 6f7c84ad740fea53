"""Masks and packing ranked in C++: bit for bit what the references give."""

import os

import pytest
import torch

import sparsefx as sfx
from sparsefx import compat, kernels, ops
from sparsefx.config import NM, Rule, SparseConfig
from sparsefx.kernels import _native
from sparsefx.kernels.nm_mask import cpu as masks
from sparsefx.kernels.nm_packed import cpu as packing

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 7), (1, 16), (5, 17), (31, 32), (1, 32)]
TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels_are_built():
    kernels.register()
    assert _native.library(masks._SOURCE, masks._declare) is not None
    assert _native.library(packing._SOURCE, packing._declare) is not None


@pytest.fixture
def declined(monkeypatch):
    """Any call of a reference is noted."""
    calls = []
    for op in (ops.nm_mask, ops.nm_pack):

        def noted(*args, reference=ops.REFERENCES[op]):
            calls.append(args)
            return reference(*args)

        monkeypatch.setitem(ops.REFERENCES, op, noted)
    return calls


def weights(*shape, dtype=torch.float32):
    """Many ties, both zeros, NaN of either sign, infinities, the smallest and largest numbers."""
    w = torch.randint(-3, 4, shape).to(dtype)
    odd = [torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, 3e38, -0.0]
    chosen = torch.rand(shape) < 0.15
    w[chosen] = torch.tensor(odd)[torch.randint(7, (int(chosen.sum()),))].to(dtype)
    return w


def same_bits(a, b):
    integers = {2: torch.int16, 4: torch.int32, 1: torch.uint8}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))


def check_mask(w, n, m, dim):
    found, expected = (
        masks.nm_mask(w, n, m, dim, False),
        ops.REFERENCES[ops.nm_mask](w, n, m, dim, False),
    )
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def check_packed(w, n, m):
    for ours, expected in zip(
        packing.nm_pack(w, n, m), ops.REFERENCES[ops.nm_pack](w, n, m), strict=True
    ):
        assert same_bits(ours, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_masks(n, m, dtype):
    for shape, dim in [((5, 19 * m), 1), ((5, 3 * m), -1), ((2 * m, 37), 0), ((3, m, 3, 3), 1)]:
        check_mask(weights(*shape, dtype=dtype), n, m, dim)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_packing(n, m, dtype):
    for rows, groups in ((1, 1), (3, 16), (5, 37)):
        check_packed(weights(rows, groups * m, dtype=dtype), n, m)
    check_packed(weights(3 * m, 10, dtype=dtype).t(), n, m)


@pytest.mark.parametrize("lanes", [int(os.environ.get("SPARSEFX_LANES", "8"))])
def test_fewer_lanes(lanes, monkeypatch):
    source = f"#define SPARSEFX_LANES {lanes}\n" + _native.self_contained(masks._SOURCE)
    library = compat.build_cpp(source)
    masks._declare(library)
    monkeypatch.setitem(_native._built, masks._SOURCE, library)
    for n, m in PATTERNS:
        check_mask(weights(5, 19 * m), n, m, 1)


def test_threads_give_the_same():
    w, before = weights(70, 3200), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for dim in (0, 1):
            check_mask(w[: 64 if dim == 0 else 70], 2, 16, dim)
        check_packed(w, 2, 16)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("w", "m", "dim"),
    [
        (torch.randn(4, 64).double(), 4, 1),
        (torch.randn(4, 64).half(), 4, 1),
        (torch.randn(4, 66), 33, 1),
        (torch.randn(64, 4).t(), 4, 1),
        (torch.randn(0, 8), 4, 1),
    ],
    ids=["double", "half", "m=33", "transposed", "empty"],
)
def test_other_masks_are_the_reference_s(w, m, dim, declined):
    check_mask(w, 2, m, dim)
    assert len(declined) == 2  # ours, and the one that it is compared with


def test_so_are_transposable_masks_and_other_packing(declined):
    w = torch.randn(8, 8)
    expected = ops.REFERENCES[ops.nm_mask](w, 2, 4, 1, True)
    assert torch.equal(masks.nm_mask(w, 2, 4, 1, True), expected)
    for other, m in ((w.double(), 4), (torch.randn(2, 66), 33), (torch.randn(0, 8), 4)):
        packing.nm_pack(other, 2, m)
    assert len(declined) == 5
    for wrong in ((w[:, :7], 2, 4, 1, False), (w, 4, 4, 1, False), (w, 2, 4, 2, False)):
        with pytest.raises(sfx.errors.MaskError):
            masks.nm_mask(*wrong)


@pytest.mark.parametrize(("size", "m", "calls"), [(256, 16, 1), (256, 8, 0), (128, 16, 0)], ids=str)
def test_wide_groups_of_a_graph_are_ranked_apart(size, m, calls):
    config = SparseConfig([Rule("*", NM(m // 2, m))], False)
    x = torch.randn(3, size, requires_grad=True)
    after = sfx.explain(torch.nn.Linear(size, size), config=config)(x).after[0]
    assert after.count("nm_mask(") == calls
