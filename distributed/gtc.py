"""Gradient threshold compression: only what has grown past a threshold is sent.

N. Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015.
"""
# N ranks, w weight of a rank's step, W = Σ w, s = N·w/W, r residual, τ threshold, c sum of all ranks' counts
# n elements of a bucket

import struct
import warnings
import zlib
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed import codec
from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.flat import Bucket
from teacherstudent.distributed.optimizers import DistributedOptimizer, max_magnitude, scale_of, set_gradient
from teacherstudent.distributed.thresholds import (
    HIGHEST_THRESHOLD,
    LOWEST_LEVEL,
    LOWEST_THRESHOLD,
    DensityController,
    FixedThreshold,
    MeanDensity,
    nearest_level,
    threshold_at,
)

DEFAULT_DENSITY = 1e-3
# Of all ranks together, for one element in one step: then the sum of counts, and it times τ, are exact in float32.
MOST_QUANTA = 2**20


class GTC(DistributedOptimizer):
    """Each rank sends the elements whose accumulated update has reached τ, as single quanta, and keeps the rest.

        r ← fl(r + fl(lr·s·g));   where |r| ≥ τ: send ±1, r ← r ∓ τ;   the inner optimiser receives fl(τ·c)/N/lr

    c is the sum of integer counts, so the update is the weighted mean whatever the order of arrival, bit for bit on
    every transport. τ is m·2^e with an integer 8 ≤ m < 16, which makes r ∓ τ exact: nothing is lost to rounding.

    density    the share of elements to send, held by a controller on which all ranks agree (default 1e-3). A weight
               then moves about once in a thousand steps: runs under a few thousand steps want 1e-2.
    threshold  a fixed τ instead, in update units; moved to the nearest value of the form above, with a warning.
    multi_quantum  an element sends all its ⌊|r|/τ⌋ quanta at once, not one a step. Where a few gradients are far
               larger than most (output biases, early in a training) one quantum a step starves just those: their
               residuals grow to thousands of τ and the training all but stands still.

    **Update units.** r accumulates lr·s·g, what the weights would have moved by, and not gradients: a residual
    earned at one learning rate is applied at just that rate, however the rate moves before it is sent, without the
    rounding that rescaling r at every change would cost. Every parameter group has its own rate and one τ serves
    them all. lr = 0 sends nothing, keeps r, and leaves the group's parameters to themselves. The law holds with
    plain SGD inside; momentum treats the aggregate as it would treat the exact mean gradient. Adam divides the
    aggregate by its own size, so that sparse quanta look rarer and larger than they are: expect to retune it.

    One rank alone applies its threshold too, for studies, and says so. Weights in float16 or bfloat16 keep their
    residual in float32.

    Raises ValueError on every rank where density is outside (0, 1), τ ≤ 0, or settings, shapes or initial weights
    differ between ranks; in a step, where a message is damaged or from another step, naming the sender.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        density: float | None = None,
        threshold: float | None = None,
        multi_quantum: bool = False,
        initial_weights: str = "broadcast",
    ) -> None:
        problems = find_problems(density, threshold)
        if any("lr" not in group for group in optimizer.param_groups):
            problems.append("GTC needs an optimizer whose parameter groups have a learning rate 'lr'")
        settings = {"density": density, "threshold": threshold, "multi_quantum": multi_quantum}
        super().__init__(optimizer, comm, settings, problems, initial_weights)
        self._controller: DensityController | FixedThreshold
        if threshold is None:
            self._controller = DensityController(DEFAULT_DENSITY if density is None else density)
        else:
            self._controller = FixedThreshold(move_to_level(threshold))
        self._most_quanta = MOST_QUANTA // comm.size if multi_quantum else 1
        self._density = DEFAULT_DENSITY if density is None else density
        self._mean_density = MeanDensity()
        self._num_elements = sum(bucket.num_elements for bucket in self._buckets)
        self._residuals = [bucket.new_zeros(residual_dtype(bucket)) for bucket in self._buckets]
        self._counters["quanta_sent"] = 0
        if any(bucket.num_elements >= codec.MAX_ELEMENTS for bucket in self._buckets):
            raise ValueError(
                f"GTC holds up to {codec.MAX_ELEMENTS} parameters of one dtype; this model has more"
            )
        if comm.size == 1:
            warnings.warn(
                "GTC with one worker: its threshold is applied all the same, for studies", stacklevel=2
            )

    def metrics(self) -> dict[str, float]:
        """Beside the counts: density of the last step, its mean over 50 steps, τ, and max |r| / τ."""
        metrics = super().metrics()
        densities = self._mean_density.densities
        metrics["density"] = densities[-1] if densities else 0.0
        metrics["mean_density"] = self._mean_density.value
        if self._controller.level is not None:
            metrics["threshold"] = threshold_at(self._controller.level)
            largest = max(max_magnitude([residual]) for residual in self._residuals if residual.numel())
            metrics["largest_residual"] = largest / metrics["threshold"]
        return metrics

    # ---- the step -----------------------------------------------------------------------------------------

    def _take_step(self, weight: int) -> None:
        self._counters["steps"] += 1
        agreed = self._agree(weight)
        if agreed is None:
            return
        rates = self._rates()
        share = scale_of(weight, agreed.total_weight, self.comm.size)
        for bucket, residual in zip(self._buckets, self._residuals):
            accumulate(bucket, residual, [rate * share for rate in rates])
        if self._controller.level is None:
            self._controller.level = self._propose_level()
        num_sent = 0
        for number, residual in enumerate(self._residuals):
            aggregate = torch.zeros_like(residual)
            if self._controller.level is not None:
                num_sent += self._exchange_quanta(number, aggregate, rates)
            write_gradients(self._buckets[number], aggregate, rates, agreed.present)
        if self._controller.level is not None and any(rates):
            density = num_sent / (self.comm.size * self._num_elements)
            self._mean_density.add(density)
            self._controller.update(density)
        self.inner.step()

    def _exchange_quanta(self, number: int, aggregate: Tensor, rates: list[float]) -> int:
        """Send this rank's quanta, put fl(τ·c)/N into `aggregate`, and return how many elements were sent."""
        assert self._controller.level is not None
        bucket, threshold = self._buckets[number], threshold_at(self._controller.level)
        step = int(self._counters["steps"])
        place = codec.Place(step, number, bucket.num_elements, threshold, rates_checksum(rates))
        quanta = fire_active(bucket, self._residuals[number], threshold, rates, self._most_quanta)
        self._counters["quanta_sent"] += int(quanta.counts.abs().sum())
        with self._exchanging():
            messages = self.comm.all_gather(codec.encode(quanta, place))
        num_sent = 0
        for rank, message in enumerate(messages):
            try:
                received = codec.decode(message, place)
            except ValueError as error:
                raise ValueError(f"the GTC message of rank {rank} cannot be used: {error}") from error
            codec.add(received, aggregate)
            num_sent += len(received)
        aggregate.mul_(threshold).div_(self.comm.size)
        return num_sent

    def _rates(self) -> list[float]:
        """The learning rates of the parameter groups, as they are now."""
        return [float(group["lr"]) for group in self.param_groups]

    def _largest_factor(self) -> float:
        return self.comm.size * max(1.0, *self._rates())

    def _propose_level(self) -> int | None:
        """The level at which the first updates would be sent with the density asked for; the ranks' mean."""
        magnitudes = torch.cat([residual.abs().float().cpu() for residual in self._residuals])
        wanted = max(1, round(self._density * magnitudes.numel()))
        smallest_sent = float(magnitudes.topk(wanted).values[-1])
        if smallest_sent == 0 and magnitudes.any():
            smallest_sent = float(magnitudes[magnitudes > 0].min())
        found = smallest_sent > 0
        proposals = torch.tensor([nearest_level(smallest_sent) if found else 0, int(found)])
        with self._exchanging():
            total, num_found = self.comm.all_reduce(proposals).tolist()
        return max(LOWEST_LEVEL, total // num_found) if num_found else None

    # ---- checkpoints --------------------------------------------------------------------------------------

    def _hidden_state(self) -> dict[str, Any]:
        return {
            "residuals": self._residuals,
            "controller": self._controller.state_dict(),
            "densities": list(self._mean_density.densities),
        }

    def _load_hidden_state(self, hidden: dict[str, Any]) -> None:
        self._controller.load_state_dict(hidden["controller"])
        self._mean_density = MeanDensity(hidden["densities"])
        if hidden["size"] != self.comm.size:
            warnings.warn(
                f"this GTC state was saved by {hidden['size']} workers and is loaded by {self.comm.size}: all "
                "residuals start at zero, and what they held is lost",
                stacklevel=3,
            )
            self._residuals = [torch.zeros_like(residual) for residual in self._residuals]
            return
        if hidden["rank"] != self.comm.rank:
            raise ValueError(
                f"rank {self.comm.rank} got the GTC state of rank {hidden['rank']}; every rank loads its own, since "
                "each has another residual"
            )
        for residual, saved in zip(self._residuals, hidden["residuals"], strict=True):
            residual.copy_(saved)


def find_problems(density: float | None, threshold: float | None) -> list[str]:
    problems = []
    if density is not None and threshold is not None:
        problems.append("give density or threshold, not both")
    if density is not None and not 0 < density < 1:
        problems.append(f"density is {density!r}; give a share of elements between 0 and 1, such as 1e-3")
    if threshold is not None and not LOWEST_THRESHOLD <= threshold <= HIGHEST_THRESHOLD:
        problems.append(
            f"threshold is {threshold!r}; give a positive number in update units (lr times gradient)"
        )
    return problems


def move_to_level(threshold: float) -> int:
    level = nearest_level(threshold)
    if threshold_at(level) != threshold:
        warnings.warn(
            f"threshold={threshold!r} is moved to {threshold_at(level)!r}, the nearest m·2^e with a whole 8 ≤ m < 16: "
            "subtracting it is exact",
            stacklevel=3,
        )
    return level


def residual_dtype(bucket: Bucket) -> torch.dtype:
    return torch.float32 if bucket.dtype in (torch.float16, torch.bfloat16) else bucket.dtype


def accumulate(bucket: Bucket, residual: Tensor, scales: list[float]) -> None:
    """r ← fl(r + fl(lr·s·g)): two roundings, never a fused multiply-add, so that all kernels agree."""
    for piece in bucket.pieces:
        if piece.parameter.grad is not None and scales[piece.group]:
            update = piece.parameter.grad.to(residual.dtype).mul(scales[piece.group])
            piece.of(residual).add_(update)


def fire_active(
    bucket: Bucket, residual: Tensor, threshold: float, rates: list[float], most: int
) -> codec.Quanta:
    """The quanta of all parameters whose learning rate is not 0."""
    active = [piece for piece in bucket.pieces if rates[piece.group]]
    if len(active) == len(bucket.pieces):
        return codec.fire(residual, threshold, most)
    parts = [codec.fire(residual[:0], threshold)]
    for piece in active:
        part = codec.fire(residual[piece.start : piece.stop], threshold, most)
        parts.append(codec.Quanta(part.indices + piece.start, part.counts))
    return codec.Quanta(
        torch.cat([part.indices for part in parts]), torch.cat([part.counts for part in parts])
    )


def write_gradients(bucket: Bucket, aggregate: Tensor, rates: list[float], present: list[bool]) -> None:
    """Hand the aggregate (n), in update units, to the inner optimiser as gradients at the present rates."""
    for piece in bucket.pieces:
        value = piece.of(aggregate)
        if rates[piece.group] == 0:
            piece.parameter.grad = None
        elif present[piece.index] or bool(value.any()):
            set_gradient(piece.parameter, value.div_(rates[piece.group]))


def rates_checksum(rates: list[float]) -> int:
    return zlib.crc32(struct.pack(f"<{len(rates)}d", *rates))
