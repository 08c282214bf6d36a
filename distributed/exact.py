"""Exact averaging of gradients: the reference that the other methods are compared with."""
# N ranks, w weight of a rank's step, W = Σ w, s = N·w/W

import torch

from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.optimizers import DistributedOptimizer, scale_of


class ExactAveraging(DistributedOptimizer):
    """Every step applies the weighted mean gradient Σ w·g / W, exchanged whole: one flat buffer, one all-reduce.

    Under the ordered reduction (the default off NCCL) the update has the same bits on every transport. A parameter
    without a gradient on any rank is left to the inner optimiser as it is; on some ranks only, it counts as zero.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        initial_weights: str = "broadcast",
        model: torch.nn.Module | None = None,
    ) -> None:
        super().__init__(optimizer, comm, {}, [], initial_weights, model)

    def _take_step(self, weight: int) -> None:
        take_exact_step(self, weight)


def take_exact_step(optimizer: DistributedOptimizer, weight: int) -> None:
    """One step with the mean gradient of all ranks; also the warm-up of methods that exchange otherwise later."""
    optimizer._counters["steps"] += 1
    agreed = optimizer._agree(weight)
    if agreed is None:
        return
    if optimizer.comm.size > 1:
        share = scale_of(weight, agreed.total_weight, optimizer.comm.size)
        for bucket in optimizer._buckets:
            gradients = [piece.parameter.grad for piece in bucket.pieces]
            optimizer._average(bucket, gradients, share, agreed.present)
    optimizer.inner.step()
