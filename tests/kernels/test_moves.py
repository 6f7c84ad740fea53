"""Columns taken and put back on CPU: the C++, and what happens where it can't be built."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsefx  # noqa: F401  # registers the kernels
from sparsefx import kernels, ops
from sparsefx.errors import KernelError, SparsefxWarning
from sparsefx.kernels import _native
from sparsefx.kernels.moves import cpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# 1100 x 1024 float32 is above 4 MiB: streamed; 1100 x 1023 doesn't start its rows on lines
SHAPES = [(5, 7, 3), (1, 1, 1), (0, 7, 3), (5, 7, 0), (5, 7, 7), (1100, 1024, 100), (1100, 1023, 9)]
sides = st.integers(1, 40)


@pytest.fixture(autouse=True)
def kernels_are_built():
    kernels.register()
    assert _native.library(cpu._SOURCE, _native.declare) is not None


def drawn(size, k):
    return torch.randperm(size)[:k].sort().values


def some(shape, dtype):
    x = torch.randn(shape) * 3
    return x > 0 if dtype is torch.bool else x.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take_columns(shape, dtype):
    rows, size, k = shape
    x, picked = some((rows, size), dtype), drawn(size, k)
    found = ops.take_columns(x, picked)
    assert torch.equal(found, x[:, picked])
    assert found.is_contiguous()


@pytest.mark.parametrize("view", [lambda x: x[:, 1:6], lambda x: x[::2], lambda x: x.t()])
def test_views_are_read_by_their_strides(view):
    x = view(torch.randn(8, 9))
    picked = torch.tensor([3, 0, 3])  # any order, repeats
    assert torch.equal(ops.take_columns(x, picked), x[:, picked])
    assert torch.equal(ops.take_columns(x, torch.arange(8)[::2][:2]), x[:, :3:2])
    torch.testing.assert_close(ops.sum_rows(x, True), x.square().sum(0))


def expected(a, b, picked, size, rest):
    wide = torch.zeros(a.shape[0], size, dtype=torch.float64)
    if rest is not None:
        wide += rest.double()
    wide[:, picked] = a.double() @ b.double()
    return wide


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scattered_mm(shape, dtype, with_rest):
    rows, size, k = shape
    a, b, picked = some((rows, 6), dtype), some((6, k), dtype), drawn(size, k)
    rest = some((rows, 1), dtype) if with_rest else None
    found = ops.scattered_mm(a, b, picked, size, rest)
    wide = expected(a, b, picked, size, rest)
    bound = (
        4
        * torch.finfo(dtype).eps
        * (1 + (a.double().abs() @ b.double().abs()).amax() if k and rows else 1)
    )
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=float(bound))
    others = torch.ones(size, dtype=torch.bool)
    others[picked] = False
    assert torch.equal(found[:, others].double(), wide[:, others])


@given(sides, sides, sides, st.data())
def test_any_size(rows, inner, size, data):
    k = data.draw(st.integers(0, size))
    a, b, picked = torch.randn(inner, rows).t(), torch.randn(k, inner).t(), drawn(size, k)
    found = ops.scattered_mm(a, b, picked, size)
    torch.testing.assert_close(
        found.double(), expected(a, b, picked, size, None), rtol=1e-4, atol=1e-4
    )
    x = torch.randn(rows, size)
    assert torch.equal(ops.take_columns(x, picked), x[:, picked])


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (70, 5), (4099, 130)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sum_rows(shape, dtype, squared):
    x = some(shape, dtype)
    found, wide = ops.sum_rows(x, squared), x.double()
    assert found.dtype == dtype
    total = (wide * wide if squared else wide).sum(0)
    # 32 rows at a time: the error grows with the square root of the number of blocks, at most
    bound = torch.finfo(dtype).eps * (32 + (shape[0] // 32)) * (wide.abs() ** (1 + squared)).sum(0)
    assert ((found.double() - total).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("picked", [[1, 7], [-1, 2]])
def test_columns_outside_are_refused(picked):
    picked = torch.tensor(picked)
    said = f"columns {picked.min()} .. {picked.max()} of a matrix of 7 columns"
    with pytest.raises(IndexError, match=said):
        ops.take_columns(torch.randn(3, 7), picked)
    with pytest.raises(IndexError, match=said):
        ops.scattered_mm(torch.randn(3, 4), torch.randn(4, 2), picked, 7)


def test_threads_give_the_same():
    x, picked = torch.randn(1030, 520), drawn(520, 99)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.take_columns(x, picked), x[:, picked])
        torch.testing.assert_close(ops.sum_rows(x, False), x.sum(0), rtol=1e-5, atol=1e-3)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_the_reference_serves_after_one_warning(monkeypatch):
    def refuse(source):
        raise KernelError("C++ can't be built here: no compiler")

    monkeypatch.setattr(_native, "build_cpp", refuse)
    monkeypatch.setattr(_native, "_built", {})
    x, picked = torch.randn(3, 7), torch.tensor([1, 5])
    # the launchers: ops that C++ has taken over are there to stay
    said = "CPU kernels of moves run as torch operators.*: C[+][+] can't be built here: no compiler"
    with pytest.warns(SparsefxWarning, match=said):
        assert torch.equal(cpu.take_columns(x, picked), x[:, picked])
    b = torch.randn(7, 2)  # and no second warning, which would be an error here
    torch.testing.assert_close(
        cpu.scattered_mm(x, b, picked, 7).double(),
        expected(x, b, picked, 7, None),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(cpu.sum_rows(x, False), x.sum(0))


# --- C++ in the dispatcher


def test_cpp_takes_the_place_of_the_launchers():
    x, picked = torch.randn(3, 7), torch.tensor([1, 5])
    for op, args in (
        (ops.take_columns, (x, picked)),
        (ops.scattered_mm, (x, x.t()[:, :2], picked, 7)),
        (ops.sum_rows, (x, False)),
    ):
        first = op(*args)
        assert (op._opname, "CPU") not in kernels._libraries
        assert ops.has_kernel(op, "cpu")
        assert torch.equal(op(*args), first)
        assert torch.equal(getattr(cpu, op._opname)(*args), first)  # one that came late
    kernels.register()  # finds C++ there
    assert ("sum_rows", "CPU") not in kernels._libraries


@pytest.fixture
def left(monkeypatch):
    """What C++ leaves to a reference is noted."""
    calls = []

    def noting(op, reference):
        return lambda *args: calls.append(op) or reference(*args)

    for op in (ops.take_columns, ops.scattered_mm, ops.sum_rows):
        op_reference = ops.REFERENCES[op]
        monkeypatch.setitem(ops.REFERENCES, op, noting(op, op_reference))
    return calls


def test_what_cpp_does_not_serve_is_the_reference_s(left):
    x, picked = torch.randn(8, 9), torch.tensor([3, 0, 3])
    many = torch.tensor([3, 1, 0, 1, 3, 1])
    for y, columns in (
        (x.t(), picked),
        (x, many[::2]),
        (x, picked.int()),
        (torch.randn(8, 9, dtype=torch.complex64), picked),
        (torch.randn(8, 9, dtype=torch.complex64).conj(), picked),
        (torch.randn(8, 9, dtype=torch.complex128), picked),
    ):
        assert torch.equal(ops.take_columns(y, columns), y[:, columns])
    assert left == [ops.take_columns] * 6
    left.clear()
    for y in (x.t(), x.half(), x.bfloat16(), x.int()):
        torch.testing.assert_close(ops.sum_rows(y, True), (y * y).sum(0))
    a, b = torch.randint(9, (8, 4)), torch.randint(9, (4, 2))
    whole = torch.zeros(8, 6, dtype=torch.int64)
    whole[:, [4, 1]] = a @ b
    assert torch.equal(ops.scattered_mm(a, b, torch.tensor([4, 1]), 6), whole)
    rest = torch.randn(1, 1)  # of every row
    found = ops.scattered_mm(x, x.t()[:, :2], torch.tensor([4, 1]), 6, rest)
    torch.testing.assert_close(found[:, [4, 1]], x @ x.t()[:, :2])
    assert torch.equal(found[:, [0, 2, 3, 5]], rest.expand(8, 4))
    assert left == [ops.sum_rows] * 4 + [ops.scattered_mm] * 2


def test_rest_of_any_stride(left):
    a, b, rest = torch.randn(8, 4), torch.randn(4, 2), torch.randn(8, 3)[:, 1:2]
    found = ops.scattered_mm(a, b, torch.tensor([4, 1]), 6, rest)
    assert torch.equal(found[:, [0, 2, 3, 5]], rest.expand(8, 4))
    assert not left


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        (((3, 4), (5, 2), [1, 2], 7), RuntimeError, r"cannot be multiplied \(3x4 and 5x2\)"),
        (((3, 4), (4, 2), [1, 2, 3], 7), RuntimeError, "size"),  # C++ would read past the product
        (((3,), (4, 2), [1, 2], 7), RuntimeError, None),
        (((3, 4), (4, 2), [1, 2], 7, (4, 1)), RuntimeError, None),
        (((3, 4), (4, 2), [1, 2], -1), (RuntimeError, IndexError), None),
    ],
    ids=str,
)
def test_sizes_that_contradict_each_other_are_the_reference_s_to_refuse(args, error, said):
    a, b, picked, size, *rest = args
    more = [torch.randn(one) for one in rest]
    with pytest.raises(error, match=said):
        ops.scattered_mm(torch.randn(a), torch.randn(b), torch.tensor(picked), size, *more)


def test_types_that_differ_are_too():
    picked = torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match="same dtype"):
        ops.scattered_mm(torch.randn(3, 4), torch.randn(4, 2).double(), picked, 7)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.scattered_mm(
            torch.randn(3, 4), torch.randn(4, 2), picked, 7, torch.randn(3, 1).double()
        )
    with pytest.raises(RuntimeError, match="Expected dtype int32 or int64 for index"):
        ops.take_columns(torch.randn(3, 7), picked.float())
    with pytest.raises(IndexError, match="Dimension out of range"):
        ops.take_columns(torch.randn(7), picked)


@pytest.mark.parametrize(
    "error", [IndexError, ValueError, TypeError, NotImplementedError, RuntimeError]
)
def test_what_a_reference_raises_reaches_the_caller(error, monkeypatch):
    def refuse(*_):
        raise error("told ü")

    monkeypatch.setitem(ops.REFERENCES, ops.sum_rows, refuse)
    with pytest.raises(error, match=r"^told ü$") as raised:
        ops.sum_rows(torch.randn(3, 4).half(), False)
    assert raised.type is error
    assert ops.sum_rows(torch.ones(3, 4), False).tolist() == [3] * 4  # and no later one


def test_so_does_that_it_broke(monkeypatch):
    monkeypatch.setitem(ops.REFERENCES, ops.sum_rows, lambda *_: {}["a bug"])
    with pytest.raises(RuntimeError, match=r"^KeyError: 'a bug'$"):
        ops.sum_rows(torch.randn(3, 4).half(), False)


def test_a_kernel_that_torch_refuses_leaves_the_reference(monkeypatch):
    mine = torch.library.Library("sparsefx", "FRAGMENT")
    mine.define("kernel_refused_probe(Tensor x) -> Tensor")
    mine.impl("kernel_refused_probe", lambda x: x + 1, "CompositeExplicitAutograd")
    op, x = torch.ops.sparsefx.kernel_refused_probe.default, torch.ones(2)
    refused = SimpleNamespace(sparsefx_enter=lambda name: 1)
    monkeypatch.setattr(_native, "library", lambda *_: refused)
    with pytest.raises(KernelError, match="refuses the CPU kernel of sparsefx::kernel_refused_pro"):
        _native.handed_over(cpu._SOURCE, op, x)
    assert op(x).tolist() == [2, 2]
    mine._destroy()


def test_gradients_are_not_recorded_below_the_op():
    x = torch.randn(3, 7, requires_grad=True)
    with torch.inference_mode():
        assert torch.equal(ops.take_columns(x, torch.tensor([1])), x[:, 1:2])
    found = ops.scattered_mm(x.detach(), x.detach().t()[:, :1], torch.tensor([1]), 4)
    assert not found.requires_grad


def test_flops_are_those_of_the_product():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.scattered_mm(torch.randn(3, 4), torch.randn(4, 2), torch.tensor([1, 5]), 7)
        ops.take_columns(torch.randn(3, 7), torch.tensor([1, 5]))
    assert counter.get_total_flops() == 2 * 3 * 4 * 2
