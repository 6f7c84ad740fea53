"""How an op runs fast: one folder per op, one row here per kernel.

The torch dispatcher is the only registry: the reference serves every device, and a row below
overrides it for one dispatch key. A launcher's module, and with it triton, is imported on the
op's first call; C++ is built then. Where triton isn't installed its rows are left out and the
reference serves; so it does where C++ can't be built.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from sparsefx import masks, ops

if __name__ != "sparsefx.kernels":
    raise ImportError(
        f"this folder is sparsefx.kernels and was imported as {__name__!r}: "
        "import it under that name (a root folder called kernels on sys.path shadows others)"
    )


class Row(NamedTuple):
    """One kernel of one op."""

    op: str  # its name in the sparsefx namespace
    key: str  # the dispatch key that it overrides
    target: str  # "module:function", the launcher; its signature is the op's
    needs: str  # the package without which the row is left out; "" needs none
    name: str  # what a report calls it


TABLE = (
    Row("nm_mm", "CUDA", "sparsefx.kernels.nm_mm.triton:nm_mm", "triton", "triton nm_mm"),
    Row(
        "nm_mm_act",
        "CUDA",
        "sparsefx.kernels.nm_mm.triton:nm_mm_act",
        "triton",
        "triton nm_mm_act",
    ),
    Row("nm_bmm", "CUDA", "sparsefx.kernels.nm_mm.triton:nm_bmm", "triton", "triton nm_bmm"),
    Row(
        "masked_mm",
        "CUDA",
        "sparsefx.kernels.masked_mm.triton:masked_mm",
        "triton",
        "triton masked_mm",
    ),
    Row(
        "sampled_mm",
        "CUDA",
        "sparsefx.kernels.sampled_mm.triton:sampled_mm",
        "triton",
        "triton sampled_mm",
    ),
    Row(
        "sampled_mm_grad_input",
        "CUDA",
        "sparsefx.kernels.sampled_mm.triton:sampled_mm_grad_input",
        "triton",
        "triton sampled_mm_grad_input",
    ),
    Row(
        "sampled_mm_grad_weight",
        "CUDA",
        "sparsefx.kernels.sampled_mm.triton:sampled_mm_grad_weight",
        "triton",
        "triton sampled_mm_grad_weight",
    ),
    Row(
        "sampled_mm_weight",
        "CUDA",
        "sparsefx.kernels.sampled_mm.triton:sampled_mm_weight",
        "triton",
        "triton sampled_mm_weight",
    ),
    Row(
        "topk_mm_indices",
        "CUDA",
        "sparsefx.kernels.scores.triton:topk_mm_indices",
        "triton",
        "triton topk_mm_indices",
    ),
    Row(
        "topk_indices",
        "CUDA",
        "sparsefx.kernels.scores.triton:topk_indices",
        "triton",
        "triton topk_indices",
    ),
    Row(
        "nm_mask",
        "CUDA",
        "sparsefx.kernels.transposable_mask.triton:nm_mask",
        "triton",
        "triton nm_mask",
    ),
    Row(
        "nm_conv",
        "CUDA",
        "sparsefx.kernels.nm_conv.triton:nm_conv",
        "triton",
        "triton nm_conv",
    ),
    Row(
        "masked_conv",
        "CUDA",
        "sparsefx.kernels.nm_conv.triton:masked_conv",
        "triton",
        "triton masked_conv",
    ),
    Row(
        "nm_conv_grad_input",
        "CUDA",
        "sparsefx.kernels.nm_conv.triton:nm_conv_grad_input",
        "triton",
        "triton nm_conv_grad_input",
    ),
    Row(
        "masked_conv_grad_input",
        "CUDA",
        "sparsefx.kernels.nm_conv.triton:masked_conv_grad_input",
        "triton",
        "triton masked_conv_grad_input",
    ),
    Row(
        "sampled_conv",
        "CUDA",
        "sparsefx.kernels.sampled_conv.triton:sampled_conv",
        "triton",
        "triton sampled_conv",
    ),
    Row(
        "sampled_conv_grad_input",
        "CUDA",
        "sparsefx.kernels.sampled_conv.triton:sampled_conv_grad_input",
        "triton",
        "triton sampled_conv_grad_input",
    ),
    Row(
        "sampled_conv_grad_weight",
        "CUDA",
        "sparsefx.kernels.sampled_conv.triton:sampled_conv_grad_weight",
        "triton",
        "triton sampled_conv_grad_weight",
    ),
    Row(
        "sampled_conv_input",
        "CUDA",
        "sparsefx.kernels.sampled_conv.triton:sampled_conv_input",
        "triton",
        "triton sampled_conv_input",
    ),
    Row(
        "sampled_conv_weight",
        "CUDA",
        "sparsefx.kernels.sampled_conv.triton:sampled_conv_weight",
        "triton",
        "triton sampled_conv_weight",
    ),
    Row("take_columns", "CPU", "sparsefx.kernels.moves.cpu:take_columns", "", "C++ take_columns"),
    Row("scattered_mm", "CPU", "sparsefx.kernels.moves.cpu:scattered_mm", "", "C++ scattered_mm"),
    Row("nm_mask", "CPU", "sparsefx.kernels.nm_mask.cpu:nm_mask", "", "C++ nm_mask"),
    Row("nm_pack", "CPU", "sparsefx.kernels.nm_packed.cpu:nm_pack", "", "C++ nm_pack"),
    Row("nm_unpack", "CPU", "sparsefx.kernels.nm_packed.cpu:nm_unpack", "", "C++ nm_unpack"),
    Row(
        "nm_packed_mm", "CPU", "sparsefx.kernels.nm_packed.cpu:nm_packed_mm", "", "C++ nm_packed_mm"
    ),
    Row(
        "nm_pack",
        "CUDA",
        "sparsefx.kernels.nm_packed.triton.packing:nm_pack",
        "triton",
        "triton nm_pack",
    ),
    Row(
        "nm_pack_both",
        "CUDA",
        "sparsefx.kernels.nm_packed.triton.packing:nm_pack_both",
        "triton",
        "triton nm_pack_both",
    ),
    Row(
        "nm_unpack",
        "CUDA",
        "sparsefx.kernels.nm_packed.triton.product:nm_unpack",
        "triton",
        "triton nm_unpack",
    ),
    Row(
        "nm_packed_mm",
        "CUDA",
        "sparsefx.kernels.nm_packed.triton.product:nm_packed_mm",
        "triton",
        "triton nm_packed_mm",
    ),
    Row(
        "nm24_compress",
        "CUDA",
        "sparsefx.kernels.vendor_24.launch:nm24_compress",
        "",
        "vendor nm24_compress",
    ),
    Row("nm24_mm", "CUDA", "sparsefx.kernels.vendor_24.launch:nm24_mm", "", "vendor nm24_mm"),
    Row("masked_mm", "CPU", "sparsefx.kernels.masked_mm.cpu:masked_mm", "", "C++ masked_mm"),
    Row("sum_rows", "CPU", "sparsefx.kernels.moves.cpu:sum_rows", "", "C++ sum_rows"),
)

TRANSPOSABLE = "sparsefx.kernels.transposable_mask.triton:solve"  # asked by masks, not by an op

_libraries: dict[tuple[str, str], torch.library.Library] = {}  # of each registration, its own


def register() -> None:
    """Give every row whose package is installed to the dispatcher; a second call adds nothing."""
    for row in TABLE:
        op = getattr(torch.ops.sparsefx, row.op).default
        if _installed(row.needs) and not ops.has_kernel(op, row.key.lower()):
            library = torch.library.Library("sparsefx", "IMPL")
            library.impl(row.op, _imported_on_first_call(row.target), row.key)
            _libraries[row.op, row.key] = library
    if _installed("triton"):
        masks.accelerate("cuda", _imported_on_first_call(TRANSPOSABLE))


def release(op_name: str, key: str) -> None:
    """Take a registered launcher back, so that C++ can register in its place."""
    library = _libraries.pop((op_name, key), None)
    if library is not None:
        library._destroy()


def kernel_for(op_name: str, device_type: str) -> str | None:
    """What a report calls the kernel that an op runs on a device, None where the reference runs.

    Args:
        op_name: The op, such as "nm_mm".
        device_type: A torch device type, such as "cuda".
    """
    for row in TABLE:
        if (row.op, row.key.lower()) == (op_name, device_type):
            return row.name if _installed(row.needs) else None
    return None


def _installed(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None


def _imported_on_first_call(target: str) -> Callable[..., torch.Tensor]:
    @functools.cache
    def launcher() -> Callable[..., torch.Tensor]:
        module, function = target.split(":")
        return getattr(importlib.import_module(module), function)

    return lambda *args: launcher()(*args)
