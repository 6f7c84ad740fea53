"""nm_mm_act: activations of the sums against their formulas, at their ends, and the launcher."""

import pytest
import torch

from sparsefx import ops
from sparsefx.errors import ConfigError, MaskError
from sparsefx.kernels.nm_mm import triton as nm
from sparsefx.ops.activated import activation_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = {  # of float64, by formulas
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
    "silu": lambda z: z * torch.sigmoid(z),
}


def masked(w, n, m, dim):
    return w.masked_fill(~ops.nm_mask(w, n, m, dim, False), 0)


def operands(rows, depth, cols, dtype, device):
    x = torch.randn(rows, depth, dtype=dtype, device=device)
    w = torch.randn(depth, cols, dtype=dtype, device=device)
    return x, w, torch.randn(cols, dtype=dtype, device=device)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_of_the_sums_is_rounded_once(name, dtype, device):
    """The slope of all four is below 1.13, so sums' errors grow by no more than that."""
    x, w, bias = operands(9, 20, 23, dtype, device)
    kept = masked(w, 2, 4, 0).double()
    sums = x.double() @ kept + bias.double()
    twin = ACTIVATIONS[name](sums)
    size = x.double().abs() @ kept.abs() + bias.double().abs()
    bound = 1.13 * 22 * torch.finfo(torch.float32).eps * size + 1e-6 * sums.abs() + 1e-7
    bound = bound + torch.finfo(dtype).eps * twin.abs()  # the interpreter cuts bfloat16 off
    got = nm.fused(x, w, bias, 2, 4, 0, name)
    assert got.dtype == dtype
    assert ((got.double() - twin).abs() <= bound).all()


# numpy, under the interpreter, remarks on the overflows that this test is about
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_at_its_ends(name, device):
    """What the formula says of infinities, NaN, and sums whose cube or exponential overflows."""
    inf, nan = float("inf"), float("nan")
    sums = torch.tensor([[0.0, 1e-30, -1e-30, 100, -100, 1e20, -1e20, inf, -inf, nan]])
    x, w = torch.zeros(1, 2, device=device), torch.ones(2, 10, device=device)
    got = nm.fused(x, w, sums[0].to(device), 1, 2, 0, name)
    twin = ACTIVATIONS[name](sums.double()).float()
    torch.testing.assert_close(got.cpu(), twin, equal_nan=True)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_launcher_agrees_with_the_op(inside, name, monkeypatch, device):
    monkeypatch.setattr(nm._tiles, "mask_in_gemm", lambda *shape: inside)
    x, w, bias = operands(5, 16, 8, torch.float32, device)
    for pattern in [(2, 4, 0, False), (2, 4, 1, True)]:
        y = nm.nm_mm_act(x, w, bias, *pattern, name)
        torch.testing.assert_close(y, ops.REFERENCES[ops.nm_mm_act](x, w, bias, *pattern, name))
    wide = nm.nm_mm_act(x.double(), w.double(), None, 2, 4, 0, False, name)
    torch.testing.assert_close(wide, activation_of(name)(x.double() @ masked(w, 2, 4, 0).double()))


def test_activation_launcher_says_what_is_wrong(device):
    x, w, _ = operands(5, 6, 8, torch.float32, device)
    with pytest.raises(MaskError, match=r"2:4 along dim 0 of \[6, 8\]"):
        nm.nm_mm_act(x, w, None, 2, 4, 0, False, "relu")
    with pytest.raises(ConfigError, match="activation='tanh': use one of 'relu', 'gelu', "):
        nm.nm_mm_act(x, w, None, 1, 2, 0, False, "tanh")
