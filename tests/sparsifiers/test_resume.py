"""Ten steps are five, a file, a fresh process's objects, and five more: bit by bit."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsefx.sparsifiers import SRSTE, Cubic, Sparsifier, TransposableNM

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05),
}
SPARSIFIERS: dict[str, Callable[..., Sparsifier]] = {
    "srste": lambda model, _: SRSTE(model, 1, 4, decay=1e-2),
    "srste, every third step": lambda model, _: SRSTE(model, decay=1e-2, refresh=3),
    "srste, decoupled": lambda model, optimizer: SRSTE(
        model, 1, 4, decay=1e-2, decoupled=True, optimizer=optimizer
    ),
    "dynamic": lambda model, _: TransposableNM(
        model, 2, 8, refresh=3, ramp=Cubic(1, 0, 8), start={"2": 2}, dense_tail=9, decay=1e-2
    ),
    "static": lambda model, _: TransposableNM(model, 4, 8, static=True),
}


def build(
    mlp: Any, make: Callable[..., Sparsifier], kind: str, seed: int, state: Any = None
) -> tuple[Any, ...]:
    """Model, sparsifier, optimizer: that first, as most code has it; then a state, if given."""
    model = mlp(seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    sparsifier = make(model, optimizer)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    return model, sparsifier, optimizer


def build_late(
    mlp: Any, make: Callable[..., Sparsifier], kind: str, seed: int, state: Any = None
) -> tuple[Any, ...]:
    """The same with the optimizer last, on parameters that loading put in the others' place.

    Masked weights come after their layer's bias then, so its state is no state of the one above.
    """
    model = mlp(seed)
    sparsifier = make(model, OPTIMIZERS[kind](model.parameters()))
    if state is not None:
        model.load_state_dict(state[0], assign=True)
    optimizer = OPTIMIZERS[kind](model.parameters())
    if getattr(sparsifier, "decoupled", False):
        sparsifier.attach(optimizer)
    if state is not None:
        optimizer.load_state_dict(state[1])
    return model, sparsifier, optimizer


def reloaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", SPARSIFIERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("builder", [build, build_late])
def test_resume(mlp, fit, name, kind, builder):
    make = SPARSIFIERS[name]
    whole = builder(mlp, make, kind, 0)
    fit(*whole, 10)
    first = builder(mlp, make, kind, 0)
    fit(*first, 5)
    saved = reloaded([first[0].state_dict(), first[2].state_dict()])
    model, sparsifier, fresh = builder(mlp, make, kind, 7, saved)
    assert sparsifier.steps == 5
    assert sparsifier.sad(total=True) == first[1].sad(total=True)
    fit(model, sparsifier, fresh, 5, 5)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert sparsifier.sad() == whole[1].sad()
    assert sparsifier.report().to_dict() == whole[1].report().to_dict()
    for mine, theirs in zip(
        fresh.state_dict()["state"].values(), whole[2].state_dict()["state"].values(), strict=True
    ):
        for key, value in theirs.items():
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(value)), key


def test_the_masks_did_change(mlp, fit):
    """Else the resumes above would prove little."""
    for name in ("srste", "dynamic"):
        run = build(mlp, SPARSIFIERS[name], "adam", 0)
        fit(*run, 5)
        before = copy.deepcopy(run[1].masks())
        fit(*run, 5, 5)
        assert not torch.equal(run[1].masks()["0"], before["0"])


def test_a_squashed_checkpoint_is_a_plain_one(mlp, fit):
    run = build(mlp, SPARSIFIERS["srste"], "sgd", 0)
    fit(*run, 3)
    x = torch.randn(4, 16)
    expected = run[0](x)
    run[1].squash()
    plain: nn.Module = mlp(3)
    plain.load_state_dict(reloaded(run[0].state_dict()))
    assert torch.equal(plain(x), expected)
