"""A bucket's way through a step of gradient threshold compression: fired, started, finished."""
# N ranks, s share of a rank, g gradient, r residual, τ threshold, c sum of all ranks' counts, n elements of a bucket

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from teacherstudent.distributed import kernels, rice
from teacherstudent.distributed.capacity import choose
from teacherstudent.distributed.codec import MAX_ELEMENTS, Place, Quanta
from teacherstudent.distributed.courier import Arrived, Courier
from teacherstudent.distributed.delay import count_bytes, take_back
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
from teacherstudent.distributed.flat import Bucket, all_pieces
from teacherstudent.distributed.gtc_options import GTCOptions
from teacherstudent.distributed.momentum import MomentumCorrection
from teacherstudent.distributed.optimizers import DistributedOptimizer, max_magnitude
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
        if self.options.codec in ("auto", "rice") or self.options.multi_quantum:
            rice.load_kernels()
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
        most = self._most_at(number, place.threshold)
        parts: list[kernels.Part] = []
        waiting: list[kernels.Part] = []  # that no gradient could hold a quantum of
        for piece, part in zip(self._buckets[number].pieces, self._parts(number, gradients)):
            (parts if most[piece.group] or not part.rate else waiting).append(part)
        commit = uncommitted is None
        if waiting:
            self._warn_of_waiting(number, place.threshold)
            kernels.fire(residual, waiting, math.inf, share=factor, commit=commit)
        fewest = min(
            (most[piece.group] for piece in self._buckets[number].pieces if most[piece.group]), default=1
        )
        due = kernels.fire(residual, parts, place.threshold, share=factor, most=fewest, commit=commit)
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
        self._check_exactness(fired)
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
        self._counters["bytes_sent"] += count_bytes(exchange)
        return received

    def _finish(self, exchange: Exchange, present: list[bool]) -> int:
        """Give the inner optimiser the sum of all ranks' quanta; how many elements were sent."""
        received, place = self._receive(exchange), exchange.place
        rates, bucket = self._rates(), self._buckets[place.bucket]
        is_late = self.options.delay or isinstance(exchange.handle, Arrived)
        num_quanta = max((most_quanta(quanta) for quanta in received), default=1) if is_late else 1
        most = self._most_at(place.bucket, place.threshold)
        rates = [rate if count >= num_quanta else 0.0 for rate, count in zip(rates, most)]
        if is_late:
            parts = parts_of(bucket, [None] * len(bucket.pieces), rates)
            take_back(self._residuals[place.bucket], parts, received[self.comm.rank], place.threshold)
        self._hand_over(place.bucket, received, place.threshold, present, rates)
        return sum(map(len, received))

    def _hand_over(
        self, number: int, received: list[Quanta], threshold: float, present: list[bool], rates: list[float]
    ) -> None:
        """Give fl(τ·c)/N/lr of the sum of what was received to the inner optimiser."""
        dtype, num_ranks = self._residuals[number].dtype, self.comm.size
        hand_over(self._buckets[number], received, threshold, num_ranks, rates, present, dtype)

    def _parts(self, number: int, gradients: Sequence[Tensor | None]) -> list[kernels.Part]:
        return parts_of(self._buckets[number], gradients, self._rates())

    def _most_at(self, number: int, threshold: float) -> list[int]:
        """How many quanta at once the gradients of each parameter group can hold, as τ/lr of their dtype; 0: none."""
        largest = torch.finfo(self._buckets[number].dtype).max / 2
        return [int(min(self._most_quanta, largest * abs(rate) / threshold)) for rate in self._rates()]

    def _warn_of_waiting(self, number: int, threshold: float) -> None:
        self._counters["held_back"] += 1
        if self._counters["held_back"] == 1:
            warnings.warn(
                f"threshold {threshold!r} over lr {min(filter(None, self._rates()))!r} is more than a gradient in "
                f"{self._buckets[number].dtype} can hold: such residuals grow and are not sent (metrics(): held_back). "
                "Use float32 weights, or a density in place of a threshold",
                stacklevel=2,
            )

    def _check_exactness(self, fired: Fired) -> None:
        """Looks at the elements that have fired alone; those beyond the limit always do."""
        residual, quanta = self._residuals[fired.place.bucket], fired.quanta
        if not len(quanta):
            return
        before = residual[quanta.indices].abs() / fired.place.threshold + quanta.counts.abs()
        num_rounded = int((before > 1 / (8 * torch.finfo(residual.dtype).eps)).sum())
        if num_rounded and not self._counters["rounded"]:
            warnings.warn(
                f"{num_rounded} residuals are so many times the threshold (metrics(): largest_residual) that taking "
                "quanta out of them rounds, and part of their update is lost (metrics(): rounded). Raise the "
                "threshold, or use multi_quantum=True or clip_norm against gradients that leap",
                stacklevel=2,
            )
        self._counters["rounded"] += num_rounded

    def _most_elements(self, bucket: Bucket) -> int:
        if self.options.capacity is None:
            return bucket.num_elements
        return math.ceil(self.options.capacity * bucket.num_elements)

    def _is_warming_up(self) -> bool:
        return self._counters["steps"] <= self.options.warmup_steps

    def _largest_factor(self) -> float:
        return self.comm.size * max(1.0, *self._rates()) / (1 - self.options.momentum)

    def _largest_update(self, bucket: Bucket) -> float:
        """Where a residual is near the largest number, adding this to it changes nothing: it cannot overflow."""
        if self._is_warming_up():
            return super()._largest_update(bucket)
        limits = torch.finfo(residual_dtype(bucket))
        return limits.max if self.options.clip_norm is not None else limits.max * limits.eps / 4


def residual_dtype(bucket: Bucket) -> torch.dtype:
    return torch.float32 if bucket.dtype in (torch.float16, torch.bfloat16) else bucket.dtype


def most_quanta(quanta: Quanta) -> int:
    """The most that one element sends; 1 where there is none."""
    return int(quanta.counts.abs().max()) if len(quanta) else 1


def new_buffers(buckets: list[Bucket]) -> list[Tensor]:
    """A residual, or velocity, (n) of zeros for each bucket."""
    return [bucket.new_zeros(residual_dtype(bucket)) for bucket in buckets]


def global_norm(buckets: list[Bucket]) -> float:
    """The Euclidean norm of all gradients together."""
    grads = [piece.parameter.grad for piece in all_pieces(buckets) if piece.parameter.grad is not None]
    norms = []
    for grad in grads:
        wide = torch.promote_types(grad.dtype, torch.float32)
        norm = float(torch.linalg.vector_norm(grad, dtype=wide))
        if norm == math.inf:  # the squares were too large
            largest = max_magnitude([grad])
            norm = largest * float(torch.linalg.vector_norm(grad / largest, dtype=wide))
        norms.append(norm)
    return math.hypot(*norms)
