"""See what enters the layers of a running model, one call at a time; nothing is stored here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefx.sparsifiers.targets import Target

# Gets a layer's name and its inputs: one tensor, or query, key and value for in_proj_weight.
Take = Callable[[str, tuple[Tensor, ...]], None]

_QKV = ("query", "key", "value")
_SEPARATE = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}


@contextmanager
def tapped(model: nn.Module, targets: Iterable[Target], take: Take) -> Iterator[None]:
    """Call ``take`` with every input of the targets while the model runs inside this context.

    Attention's fused path, which calls no layer, is switched off meanwhile. out_proj of an
    nn.MultiheadAttention, which is never called as a layer either, is seen where its weight enters
    F.multi_head_attention_forward.
    """
    attentions = {
        id(module.out_proj): module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        for target in targets:
            attention = attentions.get(id(target.module))
            if attention is not None:
                _tap_out_proj(stack, target.name, attention, take)
                continue
            hook = _hook(target, take)
            handle = target.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(target: Target, take: Take) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if target.kind != "attention":
            inputs: tuple[Any, ...] = args[:1] or tuple(kwargs.values())[:1]
        else:
            given = dict(zip(_QKV, args, strict=False)) | kwargs
            inputs = tuple(given[name] for name in _QKV)
            if target.tensor_name in _SEPARATE:
                inputs = (inputs[_SEPARATE[target.tensor_name]],)
        take(target.name, inputs)

    return before


def _tap_out_proj(
    stack: ExitStack, name: str, attention: nn.MultiheadAttention, take: Take
) -> None:
    modes: list[_OutProjTap] = []  # a stack: one entry while the attention runs

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        mode = _OutProjTap(name, take)
        mode.__enter__()  # type: ignore[no-untyped-call]
        modes.append(mode)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def leave() -> None:  # what an interrupt left behind: it skips even hooks that always run
        while modes:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    stack.callback(leave)
    stack.callback(attention.register_forward_pre_hook(before).remove)
    stack.callback(attention.register_forward_hook(after, always_call=True).remove)


class _OutProjTap(TorchFunctionMode):
    """Runs attention with the unit matrix as out_proj, shows the result, then applies out_proj."""

    def __init__(self, name: str, take: Take) -> None:
        super().__init__()
        self.name, self.take = name, take

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        out, weights = func(**given | {"out_proj_weight": unit, "out_proj_bias": None})
        self.take(self.name, (out,))
        return F.linear(out, weight, bias), weights
