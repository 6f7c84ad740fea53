"""What is called with a batch, and which of its results is the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sparsefx.errors import DiagnosticsError

Loss = Callable[[Any, Any], Tensor]


def call(model: Any, batch: Any) -> Any:
    """Call a model on a batch: a mapping by name, a tuple or list by place, else one input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def default_loss(model: Any, batch: Any) -> Tensor:
    """The model's own: what it returns, or the ``loss`` of that, where it is one number.

    Raises:
        DiagnosticsError: when there is no such number.
    """
    out = call(model, batch)
    found = getattr(out, "loss", None) if not isinstance(out, Tensor) else out
    if isinstance(out, Mapping) and found is None:
        found = out.get("loss")
    if isinstance(found, Tensor) and found.numel() == 1:
        return found.reshape(())
    shape = f" of shape {list(out.shape)}" if isinstance(out, Tensor) else ""
    raise DiagnosticsError(
        f"the model returns {type(out).__name__}{shape}, which holds no loss: pass "
        "loss=function(model, batch) that returns one number (or labels in the batch)"
    )


def loss_of(model: Any, batch: Any, loss: Loss | None) -> Tensor:
    """Return the loss as a number that gradients can be taken of.

    Raises:
        DiagnosticsError: when it is no such number.
    """
    found = (loss or default_loss)(model, batch)
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
        what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise DiagnosticsError(
            f"loss returned {what}, requires_grad={getattr(found, 'requires_grad', False)}: it "
            "must be one number that depends on the parameters"
        )
    return found.reshape(())


def parameters_of(model: Any) -> dict[str, nn.Parameter]:
    """Parameters that get gradients, by name.

    Raises:
        DiagnosticsError: for what is no module, and for a module without them.
    """
    if not isinstance(model, nn.Module):
        raise DiagnosticsError(f"model={model!r} must be a torch.nn.Module")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise DiagnosticsError(f"no parameter of {type(model).__name__} requires a gradient")
    return found
