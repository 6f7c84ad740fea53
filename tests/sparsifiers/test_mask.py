"""The parametrization: values, both gradients, its buffers, and checkpoints of another pattern."""

import copy
import io

import pytest
import torch
from torch import nn

from sparsefx import NM, SparsifierError
from sparsefx.masks import nm_mask
from sparsefx.sparsifiers import SRSTE, Mask, Sparsifier, TransposableNM


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients(straight_through, dtype):
    w = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    mask = nm_mask(w, 2, 4)
    out = Mask(mask, NM(2, 4), straight_through=straight_through)(w)
    assert out.dtype is dtype
    assert torch.equal(out, w * mask)
    grad = torch.randn_like(w)
    out.backward(grad)
    assert torch.equal(w.grad, grad if straight_through else grad * mask)


def test_infinity_outside_the_mask_is_zero():
    w = torch.tensor([[torch.inf, 1.0]], requires_grad=True)
    mask = torch.tensor([[False, True]])
    assert Mask(mask, NM(1, 2), straight_through=True)(w).tolist() == [[0.0, 1.0]]


def test_second_derivatives_and_vmap():
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = Mask(torch.ones(4, dtype=torch.bool), NM(2, 4), straight_through=True)
    assert torch.autograd.gradgradcheck(lambda w: mask(w) ** 3, (w,))
    grads = torch.func.vmap(torch.func.grad(lambda w: mask(w).square().sum()))(torch.ones(3, 4))
    assert torch.equal(grads, torch.full((3, 4), 2.0))


def test_replace_counts_what_turns():
    mask = Mask(torch.tensor([True, False, True]), NM(2, 3), straight_through=True)
    mask.replace(torch.tensor([False, True, True]))
    mask.replace(torch.tensor([False, True, False]))
    assert mask.flips.tolist() == [1, 3]
    assert mask.mask.tolist() == [False, True, False]


def test_state_dict_keys_and_weights_only(mlp, tmp_path):
    model = mlp()
    SRSTE(model, rules=["0"])
    stem = "0.parametrizations.weight"
    assert [key for key in model.state_dict() if key.startswith("0")] == [
        "0.bias",
        f"{stem}.original",
        *(f"{stem}.0.{name}" for name in ("mask", "pattern", "step", "flips")),
    ]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = mlp(seed=1)
    SRSTE(again, rules=["0"])
    again.load_state_dict(torch.load(file, weights_only=True))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_mask_keeps_the_weights_layout():
    conv = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    mask = SRSTE(nn.Sequential(conv)).masks()["0"]
    assert mask.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "written"),
    [
        (lambda model: SRSTE(model, 1, 4), "1:4"),
        (lambda model: SRSTE(model, 4, 8), "4:8"),
        (lambda model: TransposableNM(model, 2, 4), "2:4 transposable"),
    ],
)
def test_a_checkpoint_of_another_pattern_is_refused(make, written, mlp, snapshot):
    saved, model = mlp(seed=1), mlp()
    make(saved)
    SRSTE(model)
    before = snapshot(model)
    message = rf"mask of '0.weight' is {written}, this sparsifier's is 2:4: construct it"
    with pytest.raises(SparsifierError, match=message):
        model.load_state_dict(saved.state_dict())
    before.assert_same()


def test_a_dense_checkpoint_is_refused(mlp, snapshot):
    model = mlp()
    SRSTE(model)
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=r"a dense '0.weight' where this model carries a"):
        model.load_state_dict(mlp(seed=1).state_dict())
    before.assert_same()


def test_a_copy_checks_checkpoints_too(mlp):
    model = mlp()
    SRSTE(model)
    clone = copy.deepcopy(model)
    other = mlp()
    SRSTE(other, 1, 4)
    with pytest.raises(SparsifierError, match=r"'0.weight' is 1:4"):
        clone.load_state_dict(other.state_dict())
    clone.load_state_dict(model.state_dict())


def test_the_check_sees_through_a_wrapper(mlp):
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

    model, other = mlp(), mlp()
    SRSTE(model)
    SRSTE(other, 1, 4)
    with pytest.raises(SparsifierError, match=r"'0.weight' is 1:4"):
        Wrapper(model).load_state_dict(Wrapper(other).state_dict())


def test_after_squash_a_dense_checkpoint_loads(mlp):
    model = mlp()
    SRSTE(model).squash()
    model.load_state_dict(mlp(seed=1).state_dict())
    assert torch.equal(model[0].weight, mlp(seed=1)[0].weight)


def test_assigning_a_weight_stores_it_behind_the_mask(mlp):
    model = mlp()
    sparsifier = Sparsifier(model, NM(2, 4))
    model[0].weight = torch.ones(24, 16)
    assert torch.equal(sparsifier.layers["0"].weight, torch.ones(24, 16))
    assert torch.equal(model[0].weight, sparsifier.masks()["0"].float())


def test_print(mlp):
    model = mlp()
    TransposableNM(model, 2, 4, weight_grad="masked")
    assert "(0): Mask(2:4 transposable, straight_through=False)" in str(model)
