"""What each sparse op MEANS: schema, fake, eager reference, FLOPs, derivative. Plain torch.

Importing this package registers the ops in the namespace ``sparsefx`` of the torch dispatcher.
"""

from sparsefx.ops._define import NAMESPACE, REFERENCES, has_kernel, is_sparse_op, traceable
from sparsefx.ops.activated import nm_mm_act
from sparsefx.ops.batched import nm_bmm
from sparsefx.ops.dense import conv_grad_input, conv_grad_weight
from sparsefx.ops.draws import (
    bernoulli_indices,
    mass_indices,
    systematic_indices,
    topk_conv_indices,
    topk_indices,
    topk_mm_indices,
    with_replacement_indices,
)
from sparsefx.ops.moves import scattered_mm, sum_rows, take_columns
from sparsefx.ops.nm import (
    masked_conv,
    masked_conv_grad_input,
    masked_mm,
    nm_conv,
    nm_conv_grad_input,
    nm_mask,
    nm_mm,
)
from sparsefx.ops.packed import nm_pack, nm_pack_both, nm_packed_mm, nm_unpack
from sparsefx.ops.sampled import (
    after,
    gather_columns,
    gather_rows,
    sampled_bmm,
    sampled_bmm_grad_input,
    sampled_bmm_grad_weight,
    sampled_bmm_weight,
    sampled_mm,
    sampled_mm_grad_input,
    sampled_mm_grad_weight,
    sampled_mm_weight,
)
from sparsefx.ops.sampled_conv import (
    gather_channels,
    gather_examples,
    sampled_conv,
    sampled_conv_grad_input,
    sampled_conv_grad_weight,
    sampled_conv_input,
    sampled_conv_weight,
)
from sparsefx.ops.scores import conv_scores, mm_scores
from sparsefx.ops.semi_structured import nm24_compress, nm24_mm

__all__ = [
    "NAMESPACE",
    "REFERENCES",
    "after",
    "bernoulli_indices",
    "conv_grad_input",
    "conv_grad_weight",
    "conv_scores",
    "gather_channels",
    "gather_columns",
    "gather_examples",
    "gather_rows",
    "has_kernel",
    "is_sparse_op",
    "masked_conv",
    "masked_conv_grad_input",
    "masked_mm",
    "mass_indices",
    "mm_scores",
    "nm24_compress",
    "nm24_mm",
    "nm_bmm",
    "nm_conv",
    "nm_conv_grad_input",
    "nm_mask",
    "nm_mm",
    "nm_mm_act",
    "nm_pack",
    "nm_pack_both",
    "nm_packed_mm",
    "nm_unpack",
    "sampled_bmm",
    "sampled_bmm_grad_input",
    "sampled_bmm_grad_weight",
    "sampled_bmm_weight",
    "sampled_conv",
    "sampled_conv_grad_input",
    "sampled_conv_grad_weight",
    "sampled_conv_input",
    "sampled_conv_weight",
    "sampled_mm",
    "sampled_mm_grad_input",
    "sampled_mm_grad_weight",
    "sampled_mm_weight",
    "scattered_mm",
    "sum_rows",
    "systematic_indices",
    "take_columns",
    "topk_conv_indices",
    "topk_indices",
    "topk_mm_indices",
    "traceable",
    "with_replacement_indices",
]
