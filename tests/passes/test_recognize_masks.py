"""recognize_masks: every form of a mask, what is none, what is said of each."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

from sparsefx import masks
from sparsefx.passes import canonicalize, find_sites, recognize_masks
from sparsefx.testing import capture, plans, run_pass

CHECKERED = (torch.arange(8)[:, None] + torch.arange(16)) % 2 == 0  # 1:2 both ways
CONSTANT = torch.rand(8, 16) > 0.5


class Layer(nn.Module):
    """A linear layer whose weight goes through a function of (weight, buffer)."""

    def __init__(self, masked, buffer=CHECKERED, attribute=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.masked = masked
        if attribute:
            self.mask = buffer.clone()
        else:
            self.register_buffer("mask", buffer.clone())

    def forward(self, x):
        return F.linear(x, self.masked(self.weight, self.mask))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, mask):
        return torch.where(mask, w, 0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def recognised(model, *args, **kwargs):
    gm = capture(model, *args, **kwargs)
    run_pass(canonicalize, gm)
    run_pass(find_sites, gm)
    first = run_pass(recognize_masks, gm)
    assert first.text == first.before  # the graph itself stays
    assert not run_pass(recognize_masks, gm).modified
    return [plan.site for plan in plans(gm)]


def only(model, *args, **kwargs):
    """What the sites of the one layer say, which is the same on each."""
    sites = recognised(model, *args, **kwargs)
    said = {
        (s.layer, s.weight, s.weight_name, s.mask, s.mask_pattern, s.mask_density) for s in sites
    }
    (found,) = said
    return found


BOOL_FORMS = {
    "where": lambda w, m: torch.where(m, w, 0),
    "where 0.0": lambda w, m: torch.where(m, w, 0.0),
    "where tensor": lambda w, m: torch.where(m, w, torch.tensor(0.0)),
    "where zeros": lambda w, m: torch.where(m, w, torch.zeros_like(w)),
    "straight-through": StraightThrough.apply,
    "masked_fill": lambda w, m: w.masked_fill(~m, 0),
    "logical_not": lambda w, m: w.masked_fill(torch.logical_not(m), 0.0),
    "w * mask": lambda w, m: w * m,
    "mask * w": lambda w, m: m * w,
    "to": lambda w, m: w * m.to(w.dtype),
    "float": lambda w, m: m.float() * w,
    "stored the other way": lambda w, m: torch.where(m.t().contiguous().t(), w, 0),
    "cast": lambda w, m: (w.double() * m).float(),
    "twice": lambda w, m: torch.where(m, torch.where(CONSTANT, w, 0), 0),
}


@pytest.mark.parametrize("form", BOOL_FORMS)
def test_a_bool_buffer(form):
    found = only(Layer(BOOL_FORMS[form]), torch.randn(5, 16, requires_grad=True))
    assert found[1:] == ("right", "weight", "mask", "1:2 transposable", 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    "masked",
    [
        lambda w, m: w * m,
        lambda w, m: w * m.to(w.dtype),
        lambda w, m: torch.where(m != 0, w, 0),
        lambda w, m: torch.where(m.bool(), w, 0),
        lambda w, m: w.masked_fill(m == 0, 0),
    ],
    ids=["product", "cast", "ne", "bool", "eq"],
)
def test_a_buffer_of_numbers(masked, dtype):
    model = Layer(lambda w, m: masked(w, m).float(), CHECKERED.to(dtype))
    found = only(model, torch.randn(5, 16, requires_grad=True))
    assert found == ("mm", "right", "weight", "mask", "1:2 transposable", 0.5)


def test_a_mask_that_says_what_is_dropped():
    dropped = torch.zeros(8, 16, dtype=torch.bool)
    dropped[:, :4] = True
    found = only(Layer(lambda w, m: w.masked_fill(m, 0), dropped), torch.randn(5, 16))
    assert found[3:] == ("mask", "", 0.75)
    found = only(Layer(lambda w, m: torch.where(m, 0, w), dropped), torch.randn(5, 16))
    assert found[3:] == ("mask", "", 0.75)


def test_a_mask_that_follows_from_buffers():
    scores = torch.rand(8, 16)
    found = only(Layer(lambda w, s: torch.where(s > 0.5, w, 0), scores), torch.randn(5, 16))
    assert found[3:] == ("mask", "", None)
    two = Layer(lambda w, s: torch.where(s > two.limits, w, 0), scores)
    two.register_buffer("limits", torch.rand(8, 16))
    assert only(two, torch.randn(5, 16))[3:] == ("gt", "", None)


def test_masks_that_are_inputs_and_constants():
    class Given(nn.Module):
        def __init__(self, masked):
            super().__init__()
            self.fc, self.masked = nn.Linear(16, 8), masked

        def forward(self, x, mask):
            return F.linear(x, self.masked(self.fc.weight, mask), self.fc.bias)

    x = torch.randn(5, 16, requires_grad=True)
    found = only(Given(lambda w, m: torch.where(m, w, 0)), x, CHECKERED)
    assert found == ("fc", "right", "fc.weight", "l_mask_", "1:2 transposable", 0.5)
    found = only(Given(lambda w, m: w * m), x, torch.rand(8, 16))  # values of inputs are not read
    assert found == ("fc", "right", "fc.weight", "l_mask_", "", None)
    found = only(Layer(lambda w, _: w * CHECKERED), x)
    assert found[3:] == ("g_checkered_", "1:2 transposable", 0.5)
    listed = CHECKERED.float().tolist()
    found = only(Layer(lambda w, _: w * torch.tensor(listed)), x)
    assert found[3:] == ("_tensor_constant0", "1:2 transposable", 0.5)
    found = only(Layer(lambda w, m: torch.where(m, w, 0), attribute=True), x)
    assert found[1:] == ("right", "weight", "l_self_mask", "1:2 transposable", 0.5)


NO_MASKS = {
    "no zeros": (lambda w, m: w * m, torch.rand(8, 16) + 1),
    "a constant without zeros": (lambda w, _: w * torch.full((8, 16), 2.0), CHECKERED),
    "a row of it": (lambda w, m: w * m[:1], CHECKERED),
    "a column of it": (lambda w, m: torch.where(m[:, :1], w, 0), CHECKERED),
    "made of the weight": (lambda w, _: w * (w.abs() > 0.5), CHECKERED),
    "selected by the weight": (lambda w, _: torch.where(w > 0, w, 0), CHECKERED),
    "not zero elsewhere": (lambda w, m: torch.where(m, w, 1.0), CHECKERED),
    "another weight elsewhere": (lambda w, m: torch.where(m, w, w.flip(0)), CHECKERED),
    "a scaled mask": (lambda w, m: w * (m + 1.5), CHECKERED.float()),
    "a number": (lambda w, _: w * 2, CHECKERED),
    "itself": (lambda w, _: w * w, CHECKERED),
    "two buffers of numbers": (lambda w, m: (m * m.flip(0)) @ w.t() @ w, CHECKERED.float()),
    "added to": (lambda w, m: w * m + 1, CHECKERED),
}


@pytest.mark.parametrize("case", NO_MASKS)
def test_what_is_no_mask(case):
    masked, buffer = NO_MASKS[case]
    sites = recognised(Layer(masked, buffer), torch.randn(5, 16, requires_grad=True))
    assert {site.mask for site in sites} == {""}


def test_a_learned_factor_and_an_activation_are_no_masks():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16))
            self.gate = nn.Parameter(CHECKERED.float())

        def forward(self, x):
            return F.linear(x, self.weight * self.gate)

    class Driven(Gated):
        def forward(self, x):
            return F.linear(x, torch.where(x[:8] > 0, self.weight, 0))

    class Activations(nn.Module):
        def forward(self, x, y, mask):
            return torch.mm(x, torch.where(mask, y, 0).t())

    x, y = (torch.randn(rows, 16, requires_grad=True) for rows in (9, 8))
    for model, args in ((Gated(), (x,)), (Driven(), (x,)), (Activations(), (x, y, CHECKERED))):
        assert {site.mask for site in recognised(model, *args)} == {""}


# --- where the mask lies


def test_torch_prune_names_layer_weight_and_mask():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Conv1d(1, 4, 3), Conv1D(4, 6))
    for i in (0, 2, 3):
        prune.custom_from_mask(model[i], "weight", masks.nm_mask(model[i].weight, 1, 2, 0))
    sites = recognised(model, torch.randn(1, 16))
    found = {s.layer: (s.weight_name, s.mask, s.mask_pattern, s.mask_density) for s in sites}
    assert found == {
        "0": ("0.weight_orig", "0.weight_mask", "", 0.5),  # groups run along the outputs
        "2": ("2.weight_orig", "2.weight_mask", "", 0.5),
        "3": ("3.weight_orig", "3.weight_mask", "1:2", 0.5),  # [in, out]: groups along the inputs
    }


def test_parametrizations_and_attention():
    class Mask(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, w):
            return torch.where(self.mask, w, 0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            for module, name in ((self.attn, "in_proj_weight"), (self.attn.out_proj, "weight")):
                mask = masks.nm_mask(getattr(module, name), 2, 4, 1)
                parametrize.register_parametrization(module, name, Mask(mask))

        def forward(self, x, y):
            return self.attn(x, x, x)[0] + self.attn(x, y, y)[0]

    sites = recognised(Block(), torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    forwards = [s for s in sites if (s.kind, s.role) == ("mm", "forward")]
    found = [(s.layer, s.mask, s.mask_pattern) for s in forwards]
    inner = ("attn", "attn.parametrizations.in_proj_weight.0.mask", "2:4")
    outer = ("attn.out_proj", "attn.out_proj.parametrizations.weight.0.mask", "2:4")
    assert found == [inner, outer, inner, inner, outer]  # of x; of x and of y, for keys and values


@pytest.mark.parametrize(
    ("view", "shape", "pattern"),
    [
        (lambda w: w[:, :, 0], (8, 16, 1), "2:4"),
        (lambda w: w.squeeze(-1), (8, 16, 1), "2:4"),
        (lambda w: w.select(0, 1), (2, 8, 16), ""),
        (lambda w: w.flatten(1), (8, 4, 4), ""),
        (lambda w: w.unbind(0)[1].t(), (2, 16, 8), "2:4"),
        (lambda w: w.chunk(2)[1], (16, 16), "2:4"),
        (lambda w: w.transpose(0, 1)[:8], (16, 16), ""),
        (lambda w: w.view(8, 16), (2, 4, 16), ""),
    ],
    ids=["[:, :, 0]", "squeeze", "select", "flatten", "unbind", "chunk", "transpose", "view"],
)
def test_the_pattern_is_that_of_the_axis_which_is_summed_over(view, shape, pattern):
    mask = masks.nm_mask(torch.randn(shape), 2, 4, 1)
    model = Layer(lambda w, m: view(torch.where(m, w, 0)), mask)
    model.weight = nn.Parameter(torch.randn(shape))
    found = only(model, torch.randn(5, 16))
    assert found[3:] == ("mask", pattern, 0.5)


def test_scattered_zeros_are_told_as_a_share():
    model = Layer(lambda w, m: w * m, torch.rand(8, 16) > 0.4)
    *_, pattern, density = only(model, torch.randn(5, 16))
    assert (pattern, density) == ("", model.mask.double().mean().item())


def test_a_mask_that_keeps_everything_is_a_mask_if_it_is_bool():
    model = Layer(lambda w, m: torch.where(m, w, 0), torch.ones(8, 16, dtype=torch.bool))
    assert only(model, torch.randn(5, 16))[3:] == ("mask", "", 1.0)


def test_the_left_operand():
    class Left(Layer):
        def forward(self, x):
            return self.masked(self.weight, self.mask) @ x

    found = only(Left(BOOL_FORMS["where"]), torch.randn(16, 5))
    assert found[1:] == ("left", "weight", "mask", "1:2 transposable", 0.5)


def test_a_failed_layer_is_left_alone():
    gm = capture(Layer(BOOL_FORMS["where"]), torch.randn(5, 16))
    canonicalize(gm)
    find_sites(gm)
    assert not recognize_masks(gm, failed={0}).modified
    assert recognize_masks(gm).modified


# --- zeros without a mask


def test_a_weight_that_holds_zeros_is_noted():
    model = nn.Sequential(nn.Linear(16, 8), Conv1D(16, 8), nn.Linear(16, 8), nn.Linear(8, 16))
    with torch.no_grad():
        for layer, mask in (
            (model[0], masks.transposable_mask(model[0].weight, 2, 4)),
            (model[1], masks.nm_mask(model[1].weight, 2, 4, 0)),
            (model[2], masks.nm_mask(model[2].weight, 2, 4, 0)),  # along the outputs: not summed
            (model[3], torch.tensor(False)),  # all zero holds everything: nothing is said
        ):
            layer.weight.mul_(mask)
    sites = recognised(model, torch.randn(5, 16, requires_grad=True))
    found = {(s.layer, s.holds, s.mask) for s in sites}
    assert found == {("0", "2:4 transposable", ""), ("1", "2:4", ""), ("2", "", ""), ("3", "", "")}


def test_a_convolution_that_holds_zeros():
    model = nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        model.weight.mul_(masks.nm_mask(model.weight, 1, 4, 1))
    assert {s.holds for s in recognised(model, torch.randn(1, 8, 5, 5))} == {"1:4"}
