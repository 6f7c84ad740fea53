"""The weights of recurrent layers as targets: nn.LSTM, nn.GRU, nn.RNN and their cells.

torch's recurrent layers look at every forward whether one of their weights is another tensor than
before, and take it then; a parametrized weight always is, so masks and gradients come through.
They keep what they took, whose history would keep a copy of the model from being made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsefx.sparsifiers import targets as finding
from sparsefx.sparsifiers.targets import Target
from sparsefx.sparsifiers.unstructured import Unstructured

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_MATRICES = ("weight_ih", "weight_hh", "weight_hr")  # of inputs, of hidden states, a projection's


def recurrent_targets(model: nn.Module) -> Iterator[Target]:
    """Every weight matrix of a recurrent layer, in the model's order.

    One is called "lstm.weight_ih_l0". An LSTM's matrix is [4 * hidden, in]: a row is one hidden
    unit's in one gate.
    """
    for path, module in model.named_modules():
        if not isinstance(module, RECURRENT):
            continue
        names = [*module._parameters, *getattr(module, "parametrizations", {})]
        for tensor_name in names:
            if tensor_name.startswith(_MATRICES):
                name = f"{path}.{tensor_name}".lstrip(".")
                around = finding._types(model, path)
                yield Target(name, module, tensor_name, "recurrent", around)


def free_after_forward(
    targets: Sequence[tuple[Target, Unstructured]],
) -> list[RemovableHandle]:
    """Let recurrent layers forget, after each forward pass, the history of the weights they used.

    A layer whose weights were moved by ``.to()`` can be copied after its next forward pass.
    """
    modules = {id(t.module): t.module for t, _ in targets if isinstance(t.module, nn.RNNBase)}
    return [module.register_forward_hook(_forget) for module in modules.values()]


def _forget(module: Any, inputs: Any, output: Any) -> None:
    """Hold values only; the next forward pass sees that the weights are others, and takes them."""
    held = module._flat_weights
    module._flat_weights = [w if w is None or w.is_leaf else w.detach() for w in held]
