"""Kernels run on the GPU where there is one, else on CPU tensors under Triton's interpreter.

tests/conftest.py tells Triton to interpret.
"""

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so an element that no kernel wrote shows itself."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(autouse=True)
def _bfloat16_dot(monkeypatch):
    """The interpreter's dot multiplies bfloat16 operands as the integers that store them: widen."""
    if torch.cuda.is_available():
        return
    from triton import language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest),
    )


@pytest.fixture
def assert_as_good_as_eager():
    """Bound a product's error against its float64 twin, element by element.

    Rounding to the dtype is eps * |twin|; a float32 sum of K products in any order is off by at
    most (K + 2) * eps32 * (|a| @ |b| + |bias|). Eager's own worst error is granted on top.
    """

    def check(got, a, b, bias=None):
        zero = 0 if bias is None else bias.double()
        twin = a.double() @ b.double() + zero
        size = a.double().abs() @ b.double().abs() + abs(zero)
        eager = a @ b if bias is None else torch.addmm(bias, a, b)
        info = torch.finfo(a.dtype)
        bound = (eager.double() - twin).abs().max() if twin.numel() else 0
        bound = bound + info.eps * twin.abs() + info.smallest_normal * info.eps
        bound = bound + (a.shape[1] + 2) * torch.finfo(torch.float32).eps * size
        assert got.shape == twin.shape
        assert got.dtype == a.dtype
        worst = ((got.double() - twin).abs() / bound).nan_to_num(float("inf"))
        assert (worst <= 1).all(), f"{worst.max().item()} times the bound"

    return check
