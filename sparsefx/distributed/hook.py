"""The hook that DDP calls with each bucket of gradients.

Its annotations are read by DDP, which refuses text in their place.
"""

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from sparsefx.distributed.state import SampledAllreduceState
from sparsefx.errors import SparsefxError


def sampled_allreduce_hook(
    state: SampledAllreduceState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[Tensor]:
    """Average gradients over all ranks, sending only the slices that sampled products fill.

        state = sfx.distributed.SampledAllreduceState(ddp)
        ddp.register_comm_hook(state, sfx.distributed.sampled_allreduce_hook)

    With ``Sampled(scores="weight")`` in the forward all ranks choose the same slices, since their
    weights are equal (Adelman et al., NeurIPS 2021, section 3.3), and the gradients that follow
    are zero elsewhere. All else travels whole. Nothing is lost where that does not hold: each
    bucket says whether it has values elsewhere, and is then sent again in full.

    Torch's ``bf16_compress_wrapper`` and ``fp16_compress_wrapper`` go around it.

    Args:
        state: one for each model.
        bucket: gradients of some parameters, flat; it gets the result.

    Returns:
        A future of the bucket's buffer, done when the last bucket of the step is.

    Raises:
        SparsefxError: for a state that serves another model or none, and under
            ``optimize_ddp="python_reducer"``, which has no buckets.
    """
    if isinstance(bucket, tuple):
        raise SparsefxError(
            "sampled_allreduce_hook needs DDP's buckets, which torch._dynamo.config.optimize_ddp="
            "'python_reducer' doesn't make: set it to 'ddp_optimizer' or 'no_optimization'"
        )
    if bucket.index() == 0:
        state.begin_step()
    future = state.send(bucket)
    if bucket.is_last():
        state.finish_step()
    return future
