"""What a packed layer is: its own class once more, with packed buffers in the weight's place.

``PackedLinear`` derives from ``nn.Linear``, ``PackedConv2d`` from ``nn.Conv2d``, and so on for any
layer: ``isinstance`` and the names of modules stay. ``layer.weight`` is still there for those who
read it; it is unpacked at every access and writing into it changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import ops
from sparsefx.errors import PackError
from sparsefx.packing.layout import Packing, unpacked

VALUES, CODES, PATTERN = "weight_values", "weight_codes", "weight_pattern"


class Packed:
    """A layer without a weight parameter: what it kept and where is in three buffers.

    ``weight_values`` [out, K/m*n] and ``weight_codes`` uint8 [out, bytes] are those of
    ``sparsefx.ops.nm_pack``; ``weight_pattern`` int16 [2] is (n, m), so that a state_dict of
    another pattern is refused.
    """

    packing: Packing
    original: type[nn.Module]  # the class that the layer had
    weight_values: Tensor
    weight_codes: Tensor
    weight_pattern: Tensor
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The weight as it was stored, with zeros where nothing was kept; made at every access."""
        return unpacked(self.weight_values, self.weight_codes, self.packing)

    @weight.setter
    def weight(self, value: object) -> None:
        raise self._no_weight()

    def register_parameter(self, name: str, param: Any) -> None:
        """Register a parameter, other than a weight.

        Raises:
            PackError: for the weight.
        """
        if name == "weight":
            raise self._no_weight()
        super().register_parameter(name, param)  # type: ignore[misc]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward, which reads the unpacked weight.

        Raises:
            PackError: a gradient would be needed.
        """
        self.refuse_gradients(x)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def refuse_gradients(self, x: Tensor) -> None:
        """Raise PackError where autograd would need a derivative of the packed layer."""
        bias = self.bias
        needed = x.requires_grad or (bias is not None and bias.requires_grad)
        if needed and torch.is_grad_enabled():
            raise PackError(
                f"layer {self.packing.layer!r} is packed ({self.packing}) and has no gradient: run "
                "the model under torch.no_grad() or torch.inference_mode(), or call "
                "sparsefx.unpack(model) to train"
            )

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, packed {self.packing}".lstrip(", ")

    def _no_weight(self) -> PackError:
        return PackError(
            f"layer {self.packing.layer!r} is packed ({self.packing}) and takes no weight: call "
            "sparsefx.unpack(model) first"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        errors: list[str] = args[-1]
        wrong = self._unfit(state_dict, prefix)
        if wrong:
            errors.append(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    def _unfit(self, state_dict: dict[str, Any], prefix: str) -> str:
        if prefix + "weight" in state_dict:
            return (
                f"{prefix}weight is dense, but the layer is packed ({self.packing}): load the "
                "state_dict before sparsefx.pack(model), or call sparsefx.unpack(model)"
            )
        saved = state_dict.get(prefix + PATTERN)
        if saved is not None and saved.tolist() != [self.packing.n, self.packing.m]:
            n, m = saved.tolist()
            return f"{prefix}weight is packed {n}:{m}, but the layer is packed {self.packing}"
        return ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class that the layer had: the packed one can't be imported."""
        state = super().__reduce_ex__(max(int(protocol), 2))[2:]
        return (_rebuild, (self.original,), *state)


class PackedProduct(Packed):
    """A layer whose forward is ``x @ weight.T + bias`` and nothing else: the packed product."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last axis of x [..., K] -> [..., out].

        Raises:
            PackError: a gradient would be needed, or x has another last axis.
        """
        self.refuse_gradients(x)
        packing, values = self.packing, self.weight_values
        depth = values.shape[1] // packing.n * packing.m
        if x.dim() == 0 or x.shape[-1] != depth:
            raise PackError(
                f"layer {packing.layer!r} takes [..., {depth}], but was given {tuple(x.shape)}"
            )
        bias = self.bias
        if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, values = x.to(dtype), values.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        y: Tensor = ops.nm_packed_mm(rows, values, self.weight_codes, bias, packing.n, packing.m)
        return y.view(*x.shape[:-1], y.shape[1])


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def packed_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the class of packed layers of a class; two calls return one class."""
    if original in _CLASSES:
        return _CLASSES[original]
    base = PackedProduct if is_product(original) else Packed
    name = f"Packed{original.__name__}"
    body = {"original": original, "__module__": __name__, "__doc__": f"A packed {original!r}."}
    return _CLASSES.setdefault(original, type(name, (base, original), body))


def is_product(cls: type[nn.Module]) -> bool:
    """Whether a layer of this class multiplies by its weight, adds its bias, and that's all."""
    is_conv1d = (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
    return is_conv1d or cls.forward is nn.Linear.forward


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls = packed_class(original)
    return cls.__new__(cls)
