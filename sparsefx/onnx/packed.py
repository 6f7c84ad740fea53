"""Packed weights in a file: kept values, bit-packed places, and a function that expands them.

    initializer w[O, I, *]   ->   initializers w.values [R, kept] and w.codes [R, bytes] (uint8)
                                  w = sparsefx::NMUnpack(w.values, w.codes)

Values and codes are those of ``ops.nm_pack`` of the tensor with axis ``dim`` moved to the end, the
other axes flattened to R rows. The function holds standard operators of opset 18 alone, in types
that onnxruntime has on the CPU: a runtime that knows nothing of it inlines it, and one that folds
constants is left with the plain weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefx.onnx.tensors import DOMAIN, code_of, from_proto, to_proto
from sparsefx.ops.packed import code_bits, code_bytes, places_of

NAME = "NMUnpack"
_GROUPS = (2, 4, 8, 16, 32)  # the m that are tried

_FUNCTION = """
<domain: "sparsefx", opset_import: ["" : %d]>
NMUnpack <n, m, shifts, low, matrix, shape, perm, dtype> (values, codes) => (w)
{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  first_axis = Constant <value_ints: ints = [0]> ()
  last_axis = Constant <value_ints: ints = [1]> ()
  behind = Constant <value_ints: ints = [2]> ()
  wide_shifts = Constant <value_ints: ints = @shifts> ()
  wide_low = Constant <value_int: int = @low> ()
  by = Cast <to: int = 2> (wide_shifts)
  bits = Cast <to: int = 2> (wide_low)
  bytes = Unsqueeze (codes, behind)
  moved = BitShift <direction: string = "RIGHT"> (bytes, by)
  small = BitwiseAnd (moved, bits)
  wide = Cast <to: int = 7> (small)
  rows = Constant <value_ints: ints = [0, -1]> ()
  flat = Reshape (wide, rows)
  sizes = Shape (values)
  kept = Slice (sizes, last_axis, behind)
  places = Slice (flat, first_axis, kept, last_axis)
  count = Squeeze (kept)
  order = Range (zero, count, one)
  per_group = Constant <value_int: int = @n> ()
  stride = Constant <value_int: int = @m> ()
  group = Div (order, per_group)
  start = Mul (group, stride)
  columns = Add (places, start)
  size = Constant <value_ints: ints = @matrix> ()
  nothing = Constant <value_float: float = 0.0> ()
  blank = Expand (nothing, size)
  empty = Cast <to: int = @dtype> (blank)
  filled = ScatterElements <axis: int = 1> (empty, columns, values)
  wanted = Constant <value_ints: ints = @shape> ()
  shaped = Reshape (filled, wanted)
  w = Transpose <perm: ints = @perm> (shaped)
}
"""


@dataclass(frozen=True)
class Groups:
    """At most ``n`` of every ``m`` elements along ``dim`` aren't zero; ``bytes`` if packed."""

    n: int
    m: int
    dim: int
    bytes: int

    def __str__(self) -> str:
        """Return "2:4 along dim 1"."""
        return f"{self.n}:{self.m} along dim {self.dim}"


def find_groups(w: Tensor) -> Groups | None:
    """Return the N:M pattern that ``w`` [*], rank 2 or more, takes the fewest bytes in.

    m is 2, 4, 8, 16 or 32. None where no pattern is smaller than the dense tensor.
    """
    best: Groups | None = None
    for dim in range(w.dim()):
        nonzero = (w != 0).movedim(dim, -1)
        for m in _GROUPS:
            if w.shape[dim] % m:
                continue
            count = nonzero.reshape(*nonzero.shape[:-1], -1, m).sum(-1).max()
            n = max(int(count), 1)
            size = _bytes(w, n, m, dim)
            if n < m and size < (best.bytes if best else w.numel() * w.element_size()):
                best = Groups(n, m, dim, size)
    return best


def _bytes(w: Tensor, n: int, m: int, dim: int) -> int:
    kept = w.shape[dim] // m * n
    rows = w.numel() // w.shape[dim]
    return int(rows * (kept * w.element_size() + code_bytes(kept, m)))


def pack(name: str, w: Tensor, groups: Groups) -> tuple[list[Any], Any]:
    """Return the two initializers and the node that expand to the initializer ``name``."""
    import onnx

    n, m, dim = groups.n, groups.m, groups.dim
    moved = w.movedim(dim, -1)
    values, codes = _packed(moved.reshape(-1, w.shape[dim]), n, m)
    bits = code_bits(m)
    order = [axis for axis in range(w.dim()) if axis != dim] + [dim]
    node = onnx.helper.make_node(
        NAME, [f"{name}.values", f"{name}.codes"], [name], name=f"unpack {name}", domain=DOMAIN,
        n=n, m=m, shifts=list(range(0, 8, bits)), low=(1 << bits) - 1,
        matrix=[w.numel() // w.shape[dim], w.shape[dim]], shape=list(moved.shape),
        perm=[order.index(axis) for axis in range(w.dim())], dtype=code_of(w.dtype),
    )  # fmt: skip
    return [to_proto(f"{name}.values", values), to_proto(f"{name}.codes", codes)], node


def _packed(w: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """What ``ops.nm_pack`` gives for ``w`` [R, K], but no kernel is compiled to write a file."""
    rows, depth = w.shape
    groups = w.reshape(rows, -1, m)
    first = torch.sort((groups == 0).to(torch.uint8), dim=-1, stable=True).indices[..., :n]
    places = torch.sort(first, dim=-1).values  # nonzeros and, of fewer than n, the first zeros
    values = torch.gather(groups, 2, places).reshape(rows, depth // m * n)
    bits, kept = code_bits(m), places.reshape(rows, -1)
    each = 8 // bits
    filled = torch.nn.functional.pad(kept, (0, -kept.shape[1] % each)).reshape(rows, -1, each)
    return values, (filled << torch.arange(each) * bits).sum(-1).to(torch.uint8)


def unpack(node: Any, initializers: dict[str, Any]) -> Tensor:
    """Return the dense tensor of an NMUnpack node, from the file's initializers by name."""
    import onnx

    facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    values, codes = (from_proto(initializers[name]) for name in node.input)
    n, m, (rows, depth) = facts["n"], facts["m"], facts["matrix"]
    kept = values.shape[1]
    columns = places_of(codes, kept, m) + torch.arange(kept) // n * m
    dense = values.new_zeros(rows, depth).scatter(1, columns, values)
    return dense.reshape(facts["shape"]).permute(facts["perm"]).contiguous()


def add_function(model: Any, opset: int) -> None:
    """Put the function into ``model.functions``."""
    import onnx

    model.functions.append(onnx.parser.parse_function(_FUNCTION % opset))


def value_info(name: str, w: Tensor) -> Any:
    """Say dtype and shape of the expanded weight, which need no inference then."""
    import onnx

    return onnx.helper.make_tensor_value_info(name, code_of(w.dtype), list(w.shape))


def dense_bytes(w: Tensor) -> int:
    """Bytes of ``w`` with its zeros."""
    return w.numel() * w.element_size()
