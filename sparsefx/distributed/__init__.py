"""Less communication for data-parallel training: a hook for DDP that sends sampled slices alone."""

from sparsefx.distributed.hook import sampled_allreduce_hook
from sparsefx.distributed.state import SampledAllreduceState
from sparsefx.distributed.traffic import AllreduceReport, Traffic

__all__ = ["AllreduceReport", "SampledAllreduceState", "Traffic", "sampled_allreduce_hook"]
