"""One pass per file, each a function GraphModule -> PassResult that can be used alone."""

if __name__ != "sparsefx.passes":
    raise ImportError(
        f"this folder is the package sparsefx.passes, but was imported as {__name__!r}; "
        "write 'import sparsefx.passes'"
    )

from sparsefx.passes.canonicalize import canonicalize
from sparsefx.passes.cleanup import cleanup
from sparsefx.passes.find_sites import find_sites
from sparsefx.passes.fuse_epilogues import fuse_epilogues
from sparsefx.passes.inline_references import inline_references
from sparsefx.passes.lower_vendor import lower_vendor
from sparsefx.passes.pack_frozen import pack_frozen
from sparsefx.passes.recognize_masks import recognize_masks
from sparsefx.passes.rewrite_masked import rewrite_masked
from sparsefx.passes.rewrite_nm import rewrite_nm
from sparsefx.passes.rewrite_sampled import rewrite_sampled
from sparsefx.passes.select_sites import select_sites
from sparsefx.passes.share_masks import share_masks
from sparsefx.passes.sum_rows import sum_rows

__all__ = [
    "canonicalize",
    "cleanup",
    "find_sites",
    "fuse_epilogues",
    "inline_references",
    "lower_vendor",
    "pack_frozen",
    "recognize_masks",
    "rewrite_masked",
    "rewrite_nm",
    "rewrite_sampled",
    "select_sites",
    "share_masks",
    "sum_rows",
]
