"""DST on recurrent layers: torch's layers run on masked weights, and gradients are the formula."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx import SparsifierError
from sparsefx.sparsifiers import DST, long_tailed

DENSE = sfx.SparseConfig(rules=[], codegen="aot_eager")


class Reader(nn.Module):
    def __init__(self, cell: type[nn.Module], **options: object) -> None:
        super().__init__()
        self.cell = cell(5, 6, **options)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [time, batch, 5]
        if isinstance(self.cell, nn.RNNBase):
            return self.out(self.cell(x)[0])
        state = None
        for now in x:
            state = self.cell(now, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


CELLS = [
    (nn.LSTM, {"num_layers": 2}, 4),
    (nn.LSTM, {"bidirectional": True, "proj_size": 3}, 4),
    (nn.GRU, {}, 3),
    (nn.RNN, {}, 1),
    (nn.LSTMCell, {}, 4),
    (nn.GRUCell, {}, 3),
]
quiet = pytest.mark.filterwarnings("ignore:LSTM with projections")


@quiet
@pytest.mark.parametrize(("cell", "options", "gates"), CELLS)
def test_gradients_are_the_formula(cell, options, gates):
    torch.manual_seed(0)
    model = Reader(cell, **options).double()
    plain = copy.deepcopy(model)
    dst = DST(model)
    matrices = [name for name, p in plain.named_parameters() if p.dim() == 2]
    assert {name.replace("out.weight", "out") for name in matrices} == set(dst.layers)
    with torch.no_grad():
        for name, layer in dst.layers.items():
            threshold = dst.thresholds()[name]
            assert threshold.shape == layer.weight.shape[:1]
            threshold.uniform_(0, 0.3)
    dst.step()
    wide = {n: t for n, t in dst.thresholds().items() if "weight_ih" in n}
    assert all(len(t) == 6 * gates for t in wide.values())  # a hidden unit in a gate
    values = dict(plain.named_parameters())
    with torch.no_grad():
        for name, layer in dst.layers.items():
            key = name if name in values else f"{name}.weight"
            values[key].copy_(layer.weight * dst.masks()[name])
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    y = model(x)
    assert torch.equal(y, plain(x))
    y.square().sum().backward()
    plain(x).square().sum().backward()
    for name, layer in dst.layers.items():
        grad = values[name if name in values else f"{name}.weight"].grad
        w, t = layer.weight.detach(), dst.thresholds()[name]
        q = w.abs() - t.detach()[:, None]
        through = grad * w * long_tailed(q)
        torch.testing.assert_close(layer.weight.grad, grad * (q > 0) + through * w.sign())
        torch.testing.assert_close(t.grad, -through.sum(1))
    for name, p in model.named_parameters():
        if "bias" in name:
            torch.testing.assert_close(p.grad, values[name].grad)


@quiet
@pytest.mark.parametrize(("cell", "options", "gates"), CELLS)
def test_one_life(cell, options, gates):
    torch.manual_seed(0)
    model = Reader(cell, **options)
    names = [name for name, _ in model.named_parameters()]
    dst = DST(model, density=0.5, steps=4)
    optimizer = torch.optim.Adam(dst.parameter_groups(), 0.02)
    x, y = torch.randn(4, 2, 5), torch.zeros(3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append((model(x) - y - 1).square().mean())
        (losses[-1] + dst.loss()).backward()
        optimizer.step()
        dst.step()
    assert losses[-1] < losses[0]
    assert dst.kept() == {name: int(mask.sum()) for name, mask in dst.masks().items()}
    assert abs(dst.density() - 0.5) <= 0.01
    expected = model(x).detach()
    assert torch.equal(copy.deepcopy(model)(x), expected)
    again = Reader(cell, **options)
    DST(again, density=0.5, steps=4)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), expected)
    dst.squash()
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model.cell) is cell
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_rules_and_what_is_skipped():
    model = Reader(nn.LSTM)
    dst = DST(model, rules=["cell.weight_hh*"])
    assert list(dst.layers) == ["cell.weight_hh_l0"]
    assert dst.skipped == {"out": "no rule matches", "cell.weight_ih_l0": "no rule matches"}
    with pytest.raises(SparsifierError, match=r"already on layer 'cell.weight_hh_l0'"):
        DST(model)
    assert list(DST(Reader(nn.GRU), rules=[nn.GRU]).layers) == [
        "cell.weight_ih_l0",
        "cell.weight_hh_l0",
    ]
    alone = DST(nn.LSTM(3, 4))
    assert list(alone.layers) == ["weight_ih_l0", "weight_hh_l0"]
    with pytest.raises(SparsifierError, match=r"rule 'x' matches no layer; there are: .*cell.w"):
        DST(Reader(nn.GRU), rules=["x"])


def test_compiled_cells_carry_stored_masks():
    torch.manual_seed(0)
    model, x = Reader(nn.LSTMCell), torch.randn(2, 2, 5)
    dst = DST(model, density=0.5, steps=1)
    dst.step()
    expected = model(x)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    options = {"config": DENSE}
    compiled = torch.compile(model, backend="sparsefx", fullgraph=True, options=options)
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])
    # forward: two steps of two matrices, less the state of zeros, and the output's; two gradients
    assert len(re.findall(r"stored mask \d+%", str(sfx.explain(compiled)))) == 6
