"""Momentum correction: momentum before compression, so that what waits in a residual has its momentum too.

Y. Lin, S. Han, H. Mao, Y. Wang and W. J. Dally, "Deep gradient compression", ICLR 2018, section 3.
"""
# g gradient, s share, u velocity, m momentum, n elements of a bucket

import torch
from torch import Tensor

from teacherstudent.distributed.flat import Bucket


class MomentumCorrection:
    """One velocity for each element on every rank, in gradient units: u ← fl(fl(m·u) + fl(s·g)).

    masking  sets u to 0 where quanta are sent, so that a gradient that has waited long pushes no further in its old
             direction.
    """

    def __init__(
        self, buckets: list[Bucket], velocities: list[Tensor], momentum: float, masking: bool
    ) -> None:
        self.velocities = velocities  # (n) for each bucket
        self._buckets = buckets
        self._momentum = momentum
        self._masking = masking

    def grow(self, number: int, share: float, rates: list[float]) -> list[Tensor | None]:
        """The velocities of a bucket's parameters after this step; those at a learning rate of 0 rest.

        A parameter without a gradient has a gradient of 0.
        """
        grown: list[Tensor | None] = []
        for piece in self._buckets[number].pieces:
            velocity, gradient = piece.of(self.velocities[number]), piece.parameter.grad
            if not rates[piece.group]:
                grown.append(None)
                continue
            velocity.mul_(self._momentum)
            if gradient is not None and share:
                # rounded by itself, which add_(…, alpha=share) is not
                velocity.add_(gradient.to(velocity.dtype).mul(share))
            grown.append(velocity)
        return grown

    def mask(self, number: int, indices: Tensor) -> None:
        """Quanta of these elements (K) are on their way."""
        if self._masking:
            self.velocities[number].index_fill_(0, indices.to(torch.int64), 0.0)
