"""A bucket's way through a step of gradient threshold compression: fired, started, finished."""
# N ranks, s share of a rank, g gradient, r residual, τ threshold, c sum of all ranks' counts, n elements of a bucket

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from teacherstudent.distributed import kernels
from teacherstudent.distributed.capacity import choose
from teacherstudent.distributed.codec import MAX_ELEMENTS, Place, Quanta
from teacherstudent.distributed.communicators import Handle
from teacherstudent.distributed.courier import Courier
from teacherstudent.distributed.delay import take_back
from teacherstudent.distributed.exchange import (
    NO_QUANTA,
    Exchange,
    Fired,
    checksum_rates,
    finish_exchange,
    hand_over,
    parts_of,
    start_exchange,
)
from teacherstudent.distributed.flat import Bucket
from teacherstudent.distributed.gtc_options import GTCOptions
from teacherstudent.distributed.momentum import MomentumCorrection
from teacherstudent.distributed.optimizers import DistributedOptimizer
from teacherstudent.distributed.overlap import cut_buckets
from teacherstudent.distributed.thresholds import DensityController, FixedThreshold, threshold_at


class GTCStages(DistributedOptimizer):
    """The stages of each bucket, by its number; when they run is decided elsewhere.

    _fire    add to the residual what the step brings, and take out what is due
    _note    once it is certain that the step is taken: counts, cursor, velocity
    _start   send what was taken out to all ranks, without waiting
    _finish  wait for what all ranks have sent, and hand it over to the inner optimiser
    """

    options: GTCOptions
    _controller: DensityController | FixedThreshold
    _most_quanta: int  # that an element may send at once

    def _lay_out(self) -> None:
        """Residuals, velocities and cursors of all buckets, and the kernels for them."""
        if any(bucket.num_elements >= MAX_ELEMENTS for bucket in self._buckets):
            raise ValueError(f"GTC holds up to {MAX_ELEMENTS} parameters of one dtype; this model has more")
        if self.options.most_bucket_bytes is not None:
            self._buckets = cut_buckets(self._buckets, self.options.most_bucket_bytes)
        self._residuals = new_buffers(self._buckets)
        self._cursors = [0] * len(self._buckets)
        self._correction: MomentumCorrection | None = None
        if self.options.momentum:
            self._correction = MomentumCorrection(
                self._buckets,
                new_buffers(self._buckets),
                self.options.momentum,
                self.options.momentum_masking,
            )
        for device, dtype in {(residual.device, residual.dtype) for residual in self._residuals}:
            kernels.compile_for(device, dtype)
        background = self.options.overlap or self.options.delay
        self._courier = Courier(self.comm) if background else None

    def _sources(self, number: int, share: float | None) -> tuple[Sequence[Tensor | None], float]:
        """What the residual of a bucket grows by, for each parameter, in gradient units; and times what."""
        if share is None:
            return [None] * len(self._buckets[number].pieces), 0.0
        if self._correction is not None:
            return self._correction.grow(number, share, self._rates()), 1.0
        return [piece.parameter.grad for piece in self._buckets[number].pieces], share

    def _accumulate(self, share: float | None) -> None:
        """r ← fl(r + fl(lr·s·g)), and nothing is taken out."""
        for number, residual in enumerate(self._residuals):
            gradients, factor = self._sources(number, share)
            kernels.fire(residual, self._parts(number, gradients), math.inf, share=factor)

    def _fire(self, number: int, share: float | None, uncommitted: list[Tensor] | None = None) -> Fired:
        """Accumulate the gradients of a bucket and take out of its residual what it may send.

        share        s, with which the gradients count; None where they are in the residual already
        uncommitted  the gradients, for each parameter in the residual's dtype: the residual then stays as it is, and
                     they are overwritten with what it would become
        """
        residual, place = self._residuals[number], self._place(number)
        if uncommitted is None:
            gradients, factor = self._sources(number, share)
        else:
            gradients, factor = uncommitted, share or 0.0
        parts = self._parts(number, gradients)
        commit = uncommitted is None
        due = kernels.fire(
            residual, parts, place.threshold, share=factor, most=self._most_quanta, commit=commit
        )
        quanta, left, cursor = choose(due, self._cursors[number], self._most_elements(self._buckets[number]))
        if len(left):
            kernels.put_back(residual, left, place.threshold, None if commit else parts)
        return Fired(place, quanta, len(left), cursor)

    def _fire_nothing(self, number: int) -> Fired:
        return Fired(self._place(number), NO_QUANTA, 0, self._cursors[number])

    def _place(self, number: int) -> Place:
        assert self._controller.level is not None
        return Place(
            int(self._counters["steps"]),
            number,
            self._buckets[number].num_elements,
            threshold_at(self._controller.level),
            checksum_rates(self._rates()),
        )

    def _note(self, fired: Fired) -> None:
        """What was fired will be sent for certain."""
        number, quanta = fired.place.bucket, fired.quanta
        self._counters["quanta_sent"] += int(quanta.counts.to(torch.int64).abs().sum())
        self._counters["carried_over"] += fired.num_left
        self._cursors[number] = fired.cursor
        if self._correction is not None:
            self._correction.mask(number, quanta.indices)

    def _start(self, fired: Fired) -> Exchange:
        """Send the quanta of a bucket to all ranks, without waiting."""
        with self._exchanging():
            return start_exchange(self._courier or self.comm, fired, self.options.codec)

    def _receive(self, exchange: Exchange) -> list[Quanta]:
        """Wait for all ranks' quanta."""
        with self._exchanging():
            received = finish_exchange(exchange)
        if not isinstance(exchange.handle, Handle):  # another communicator has sent it
            self._counters["bytes_sent"] += exchange.handle.bytes_sent
        return received

    def _finish(self, exchange: Exchange, present: list[bool]) -> int:
        """Give the inner optimiser the sum of all ranks' quanta; how many elements were sent."""
        received, place = self._receive(exchange), exchange.place
        if self.options.delay:
            parts = self._parts(place.bucket, [None] * len(self._buckets[place.bucket].pieces))
            take_back(self._residuals[place.bucket], parts, received[self.comm.rank], place.threshold)
        self._hand_over(place.bucket, received, place.threshold, present)
        return sum(map(len, received))

    def _hand_over(self, number: int, received: list[Quanta], threshold: float, present: list[bool]) -> None:
        """Give fl(τ·c)/N/lr of the sum of what was received to the inner optimiser."""
        dtype, num_ranks = self._residuals[number].dtype, self.comm.size
        hand_over(self._buckets[number], received, threshold, num_ranks, self._rates(), present, dtype)

    def _parts(self, number: int, gradients: Sequence[Tensor | None]) -> list[kernels.Part]:
        return parts_of(self._buckets[number], gradients, self._rates())

    def _most_elements(self, bucket: Bucket) -> int:
        if self.options.capacity is None:
            return bucket.num_elements
        return max(1, int(self.options.capacity * bucket.num_elements))

    def _rates(self) -> list[float]:
        """The learning rates of the parameter groups, as they are now."""
        return [float(group["lr"]) for group in self.param_groups]


def residual_dtype(bucket: Bucket) -> torch.dtype:
    return torch.float32 if bucket.dtype in (torch.float16, torch.bfloat16) else bucket.dtype


def new_buffers(buckets: list[Bucket]) -> list[Tensor]:
    """A residual, or velocity, (n) of zeros for each bucket."""
    return [bucket.new_zeros(residual_dtype(bucket)) for bucket in buckets]
