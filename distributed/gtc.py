"""Gradient threshold compression: only what has grown past a threshold is sent.

N. Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015.
"""
# N ranks, w weight of a rank's step, W = Σ w, s = N·w/W, g gradient, r residual, τ threshold, u velocity
# c sum of all ranks' counts, n elements of a bucket

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.delay import Pending, load_pending, save_pending
from teacherstudent.distributed.exchange import Exchange
from teacherstudent.distributed.gtc_options import MOMENTUM_TWICE, GTCOptions, has_momentum
from teacherstudent.distributed.gtc_stages import GTCStages, global_norm
from teacherstudent.distributed.gtc_state import (
    by_parameter,
    find_saved_size,
    fold_states,
    overwrite,
    ranks_to_fold,
)
from teacherstudent.distributed.optimizers import max_magnitude, scale_of
from teacherstudent.distributed.overlap import Overlap
from teacherstudent.distributed.thresholds import (
    HIGHEST_LEVEL,
    LOWEST_LEVEL,
    DensityController,
    FixedThreshold,
    MeanDensity,
    move_to_level,
    nearest_level,
    threshold_at,
)

# Of all ranks together, for one element in one step: then the sum of counts, and it times τ, are exact in float32.
MOST_QUANTA = 2**20
# What a rank counts beside what all methods do.
COUNTERS = ("quanta_sent", "carried_over", "clipped", "rounded", "held_back")


class GTC(GTCStages):
    """Each rank sends the elements whose accumulated update has reached τ, as single quanta, and keeps the rest.

        r ← fl(r + fl(lr·s·g));   where |r| ≥ τ: send ±1, r ← r ∓ τ;   the inner optimiser receives fl(τ·c)/N/lr

    c is the sum of integer counts, so the update is the weighted mean whatever the order of arrival, bit for bit on
    every transport. τ is m·2^e with an integer 8 ≤ m < 16, which makes r ∓ τ exact: nothing is lost to rounding.

    density    the share of elements to send, held by a controller on which all ranks agree (default 1e-3). A weight
               then moves about once in a thousand steps: runs under a few thousand steps want 1e-2, or a ramp.
    threshold  a fixed τ instead, in update units; moved to the nearest value of the form above, with a warning.
    multi_quantum  an element sends all its ⌊|r|/τ⌋ quanta at once, not one a step. Where a few gradients are far
               larger than most (output biases, early in a training) one quantum a step starves just those: their
               residuals grow to thousands of τ and the training all but stands still.
    codec      how messages are written: "auto" takes the fewest bytes of "words", "rice", "bitmap" and "dense". On
               a fast link "words" saves time.
    capacity   the largest share of a bucket's elements that may send in one step (at least one element). Those over
               τ that must stay keep their residual, come first in the next step, and are counted in carried_over.
    ramp_steps     over so many steps the density goes geometrically from 1e-2 down to the one asked for.
    warmup_steps   so many first steps exchange whole gradients, as ExactAveraging does. The first threshold comes
               from the first step behind them.
    momentum   corrects momentum (Lin et al., "Deep gradient compression", ICLR 2018): every rank keeps a velocity
               u ← m·u + s·g, and r accumulates lr·u. What waits in r then has its momentum too: with multi_quantum
               and no masking the weights stay within τ of those of momentum SGD. The inner optimiser must have no
               momentum.
    momentum_masking  sets u to 0 where a quantum is sent, against stale directions.
    clip_norm  scales this rank's own gradient, before the residual, to this global norm where it is larger. (The
               paper above uses the norm wanted for the mean gradient, times 1/√N.)
    overlap    buckets are exchanged while backward still runs, with the same result bit for bit. The weight must be
               known before: optimizer.begin_step(weight=…), then backward, then step(weight=…). Gradients must be
               left alone in between. Steps without a threshold yet, and those of the warm-up, do not overlap. After
               an exception in between, abandon_step() on every rank.
    bucket_bytes  cuts buckets of about so many bytes, from the last parameter to the first (25 MiB with overlap;
               otherwise all parameters of a dtype are one bucket). A capacity counts in each.
    delay      a step's exchange runs while the next one is computed, and is applied at its end: gradients are of
               weights one step old. synchronize() applies the last. A checkpoint holds what is under way.

    **Update units.** r accumulates lr·s·g, what the weights would have moved by, and not gradients: a residual
    earned at one learning rate is applied at just that rate, however the rate moves before it is sent, without the
    rounding that rescaling r at every change would cost. Every parameter group has its own rate and one τ serves
    them all. lr = 0 sends nothing, keeps r and u, and leaves the group's parameters to themselves. A rate so small
    that τ/lr is no number of the parameters' dtype sends nothing either (a warning; counted in held_back), and r grows.

    **Inner optimisers.** The law holds with plain SGD inside; momentum in it treats the aggregate as it would treat
    the exact mean gradient. Weight decay stays outside the residual: the inner optimiser decays all weights at every
    step, whatever is sent. Adam divides by the size of what it sees, so that rare quanta, each far larger than a
    gradient, are scaled to steps of about lr however small the gradients behind them: the weights no longer move by
    what the residual held. It works as an optimiser of its own kind; expect to retune its rate.

    One rank alone applies its threshold too, for studies, and says so. Weights in float16 or bfloat16 keep their
    residual in float32; what the inner optimiser receives is rounded to their own dtype.

    Raises ValueError on every rank where an option is out of range, or settings, shapes or initial weights differ
    between ranks; in a step, where a message is damaged or from another step, naming the sender.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        density: float | None = None,
        threshold: float | None = None,
        multi_quantum: bool = False,
        codec: str = "auto",
        capacity: float | None = None,
        ramp_steps: int = 0,
        warmup_steps: int = 0,
        momentum: float = 0.0,
        momentum_masking: bool = True,
        clip_norm: float | None = None,
        overlap: bool = False,
        bucket_bytes: int | None = None,
        delay: bool = False,
        initial_weights: str = "broadcast",
        model: torch.nn.Module | None = None,
    ) -> None:
        options = GTCOptions(
            density, threshold, multi_quantum, codec, capacity, ramp_steps, warmup_steps, momentum,
            momentum_masking, clip_norm, overlap, bucket_bytes, delay,
        )  # fmt: skip
        problems = options.find_problems(optimizer.param_groups)
        super().__init__(optimizer, comm, asdict(options), problems, initial_weights, model)
        self.options = options
        if threshold is None:
            self._controller = DensityController(options.target_density, ramp_steps)
        else:
            self._controller = FixedThreshold(move_to_level(threshold))
        self._most_quanta = MOST_QUANTA // comm.size if multi_quantum else 1
        self._mean_density = MeanDensity()
        self._num_elements = sum(bucket.num_elements for bucket in self._buckets)
        self._counters.update(dict.fromkeys(COUNTERS, 0))
        self._lay_out()
        self._overlap = Overlap(self) if options.overlap else None
        self._pending: Pending | None = None
        if comm.size == 1:
            warnings.warn(
                "GTC with one worker: its threshold is applied all the same, for studies", stacklevel=2
            )

    def metrics(self) -> dict[str, float]:
        """Beside the counts: density of the last step, its mean over 50 steps, τ, and max |r| / τ.

        carried_over  elements that a capacity made wait
        clipped       steps in which clip_norm was at work
        rounded       elements so many times τ (2²⁰ in float32) that r ∓ τ was not exact
        held_back     buckets in which a rate was too small for τ/lr to be a number of the parameters' dtype
        """
        metrics = super().metrics()
        densities = self._mean_density.densities
        metrics["density"] = densities[-1] if densities else 0.0
        metrics["mean_density"] = self._mean_density.value
        if self._controller.level is not None:
            metrics["threshold"] = threshold_at(self._controller.level)
            largest = max(max_magnitude([residual]) for residual in self._residuals if residual.numel())
            metrics["largest_residual"] = largest / metrics["threshold"]
        return metrics

    def begin_step(self, *, weight: int = 1, scaler: torch.amp.GradScaler | None = None) -> None:
        """With overlap=True: announce the step before the backward pass whose gradients it takes. Collective.

        weight  as for step(), which is to have the same
        scaler  the GradScaler under which step() will be called
        """
        if self._overlap is None:
            raise ValueError(
                "begin_step() belongs to overlap=True; leave it out, or construct GTC(…, overlap=True)"
            )
        self._overlap.begin(weight, scaler)

    @torch.no_grad()
    def abandon_step(self) -> None:
        """With overlap=True: forget the step that begin_step() has begun, as after an exception. Collective.

        Residuals and weights stay as they were, gradients are dropped, and the step does not count.
        """
        if self._overlap is None:
            raise ValueError("abandon_step() belongs to overlap=True; leave it out")
        self._overlap.abandon()

    def synchronize(self) -> None:
        """With delay=True: apply the step that is still under way. Then as every method does."""
        self.apply_pending()
        super().synchronize()

    @torch.no_grad()
    def apply_pending(self) -> None:
        """With delay=True: apply the step that is still under way."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._apply(pending)

    # ---- the step -----------------------------------------------------------------------------------------

    def _take_step(self, weight: int) -> None:
        if self._overlap is None:
            self._counters["steps"] += 1
            agreed = self._agree(weight)
        else:
            agreed = self._overlap.agree(weight)
        if agreed is None:
            self.apply_pending()  # the step before goes its way
            return
        share = scale_of(weight, agreed.total_weight, self.comm.size)
        if weight:
            share *= self._clip_factor()
        if self._is_warming_up():
            for number, bucket in enumerate(self._buckets):
                gradients, factor = self._sources(number, share)
                self._average(bucket, gradients, factor, agreed.present)
            self.inner.step()
            self.apply_pending()  # of a state saved with delay=True
            return
        exchanges = self._overlap.commit() if self._overlap is not None else []
        current = Pending(exchanges or self._start_all(share), agreed.present)
        self.apply_pending()
        if self.options.delay:
            self._pending = current
        else:
            self._apply(current)

    def _start_all(self, share: float | None) -> list[Exchange]:
        """All buckets are under way before the first is waited for; none where all gradients so far were 0."""
        if self._controller.level is None:
            self._accumulate(share)
            self._controller.level = self._propose_level()
            share = None
        if self._controller.level is None:
            return []
        exchanges = []
        for number in range(len(self._buckets)):
            fired = self._fire(number, share)
            self._note(fired)
            exchanges.append(self._start(fired))
        return exchanges

    def _apply(self, step: Pending) -> None:
        """Wait for what all ranks have sent in a step, and let the inner optimiser make it."""
        if step.exchanges:
            self._look_back(sum(self._finish(exchange, step.present) for exchange in step.exchanges))
        else:
            for number in range(len(self._buckets)):
                self._hand_over(number, [], 0.0, step.present, self._rates())
        self.inner.step()

    def _look_back(self, num_sent: int) -> None:
        """Choose the threshold of the next step by the elements that all ranks have sent in this one."""
        if any(self._rates()):
            density = num_sent / (self.comm.size * self._num_elements)
            self._mean_density.add(density)
            self._controller.update(density)

    def _clip_factor(self) -> float:
        """What this rank's gradient is to be multiplied with."""
        largest = self.options.clip_norm
        if largest is None:
            return 1.0
        norm = global_norm(self._buckets)
        if norm <= largest:
            return 1.0
        self._counters["clipped"] += 1
        return largest / norm

    def _find_problem(self, weight: Any) -> str:
        rates = self._rates()
        if not all(map(math.isfinite, rates)):
            return f"the learning rate is {next(rate for rate in rates if not math.isfinite(rate))}; give a number"
        if self.options.momentum and has_momentum(self.param_groups):  # schedulers may bring it in later
            return MOMENTUM_TWICE.format(self.options.momentum)
        return super()._find_problem(weight)

    def _unscale(self) -> None:
        if self._overlap is None or not self._overlap.has_unscaled:
            super()._unscale()

    def _propose_level(self) -> int | None:
        """The level at which the first updates would be sent with the density asked for; the ranks' mean."""
        assert isinstance(self._controller, DensityController)
        magnitudes = torch.cat([residual.abs().cpu() for residual in self._residuals])
        wanted = max(1, round(self._controller.target * magnitudes.numel()))
        smallest_sent = float(magnitudes.topk(wanted).values[-1])
        if smallest_sent == 0 and magnitudes.any():
            smallest_sent = float(magnitudes[magnitudes > 0].median())
        found = smallest_sent > 0
        proposals = torch.tensor([nearest_level(smallest_sent) if found else 0, int(found)])
        with self._exchanging():
            total, num_found = self.comm.all_reduce(proposals).tolist()
        return min(HIGHEST_LEVEL, max(LOWEST_LEVEL, total // num_found)) if num_found else None

    # ---- checkpoints --------------------------------------------------------------------------------------

    def ranks_to_load(self, saved_size: int) -> list[int]:
        return ranks_to_fold(self.comm.rank, self.comm.size, saved_size)

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """What waits in the residuals of ranks that are no more goes to those that are: see fold_states."""
        if find_saved_size(states[0]) != self.comm.size:
            states = [fold_states(states, self.comm.rank, self.comm.size)]
        super().load_state_dicts(states)

    def _hidden_state(self) -> dict[str, Any]:
        if self._overlap is not None and self._overlap.is_announced:
            raise ValueError(
                "a step is under way between begin_step() and step(); save and load after step() or abandon_step()"
            )
        velocities = self._correction.velocities if self._correction else []
        return {
            "residuals": by_parameter(self._buckets, self._residuals),
            "velocities": by_parameter(self._buckets, velocities),
            "cursors": list(self._cursors),
            "controller": self._controller.state_dict(),
            "densities": list(self._mean_density.densities),
            "pending": save_pending(self._pending),
        }

    def _load_hidden_state(self, hidden: dict[str, Any]) -> None:
        self._controller.load_state_dict(hidden["controller"])
        self._mean_density = MeanDensity(hidden["densities"])
        own = GTC._hidden_state(self)
        self._pending = None
        if hidden["size"] != self.comm.size:
            warnings.warn(
                f"this GTC state was saved by {hidden['size']} workers and is loaded by {self.comm.size}: all "
                "residuals and velocities start at zero, and what they held is lost; fold_states keeps it",
                stacklevel=3,
            )
            for view in (*own["residuals"], *own["velocities"]):
                view.zero_()
            return
        if hidden["rank"] != self.comm.rank:
            raise ValueError(
                f"rank {self.comm.rank} got the GTC state of rank {hidden['rank']}; every rank loads its own, since "
                "each has another residual"
            )
        if bool(hidden["velocities"]) != bool(own["velocities"]):
            raise ValueError(
                f"this GTC state was saved {'with' if hidden['velocities'] else 'without'} momentum correction, and "
                f"momentum is {self.options.momentum!r} now; give the momentum it was trained with"
            )
        overwrite(own["residuals"], hidden["residuals"])
        overwrite(own["velocities"], hidden["velocities"])
        if len(hidden["cursors"]) == len(self._cursors):  # else laid out in other buckets
            self._cursors = list(hidden["cursors"])
        self._pending = load_pending(hidden["pending"], self._buckets)
