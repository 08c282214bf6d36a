"""Blockwise model-update filtering: each rank trains alone for a block, then the mean of the models is filtered.

K. Chen and Q. Huo, "Scalable training of deep learning machines by incremental block training with intra-block
parallel optimization and blockwise model-update filtering", ICASSP 2016.
"""
# N ranks, W global weights, Δ filtered update, η block momentum, ζ block learning rate, G mean update of a block

import contextlib
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.flat import Bucket
from teacherstudent.distributed.optimizers import (
    DistributedOptimizer,
    gather_integers,
    max_magnitude,
    scale_of,
)


class BMUF(DistributedOptimizer):
    """Every `block_steps` steps the ranks average what they have learnt, and filter it.

        G = Σ w·(W_rank − W_start) / Σ w;   Δ ← ηΔ + ζG;   W ← W + Δ;   W_start of the next block = W, or W + ηΔ

    w is a rank's weight summed over its steps of the block. W, Δ and the look-ahead W + ηΔ (Nesterov) are kept
    apart: during training the model holds the rank's own weights, and what is evaluated, exported and carried on is
    W. This is torch.optim.SGD(lr=ζ, momentum=η, nesterov=…) on the pseudo-gradient −G.

    block_steps     steps in a block
    block_momentum  η in [0, 1); by default 1 − 1/N, which makes the sum of a block's effects N times the mean:
                    BMUF wants its own learning rate for each N. With one rank η is 0 and the inner optimiser is all
                    that remains, within one rounding a block; this is said once.
    block_lr        ζ > 0
    nesterov        start the next block from the look-ahead

    The inner optimiser's state (momentum buffers, moments) stays on its rank across blocks. A step with weight 0,
    or with a gradient that is not finite, is left out on its rank alone and counts towards the block's length, so
    that all ranks reach the block's end together. A model that is not finite there is a FloatingPointError on every
    rank. Learning rates may change inside a block.

    Raises ValueError on every rank where a setting is out of range, where settings, shapes or initial weights
    differ between ranks, and where ranks meet at different steps of their blocks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        block_steps: int = 50,
        block_momentum: float | None = None,
        block_lr: float = 1.0,
        nesterov: bool = True,
        initial_weights: str = "broadcast",
    ) -> None:
        problems = find_problems(block_steps, block_momentum, block_lr)
        settings = {
            "block_steps": block_steps,
            "block_momentum": block_momentum,
            "block_lr": block_lr,
            "nesterov": nesterov,
        }
        super().__init__(optimizer, comm, settings, problems, initial_weights)
        self.block_steps = block_steps
        self.block_momentum = 1 - 1 / comm.size if block_momentum is None else block_momentum
        self.block_lr = block_lr
        self.nesterov = nesterov
        self._global = [bucket.read_parameters() for bucket in self._buckets]
        self._update = [bucket.new_zeros() for bucket in self._buckets]
        self._starts_ahead = False  # whether this block started from W + ηΔ
        self._steps_in_block = 0
        self._block_weight = 0
        self._set_aside: list[Tensor] | None = None  # the rank's own weights while the model shows W
        self._counters["blocks"] = 0
        if comm.size == 1 and block_momentum is None:
            warnings.warn(
                "BMUF with one worker: block momentum is 0, which leaves the inner optimizer as it is",
                stacklevel=2,
            )

    def synchronize(self) -> None:
        """Close a partial block and leave W in the model. Collective; the next block starts from W."""
        self._refuse_inside_global_weights()
        with torch.no_grad():
            self._close_block()
            self._start_block(ahead=False)

    @contextlib.contextmanager
    def global_weights(self) -> Iterator[None]:
        """The model holds W inside the `with` block, and the rank's own weights again after it. Not collective."""
        if self._set_aside is not None:
            yield
            return
        self._set_aside = [bucket.read_parameters() for bucket in self._buckets]
        write_all(self._buckets, self._global)
        try:
            yield
        finally:
            own, self._set_aside = self._set_aside, None
            write_all(self._buckets, own)

    def metrics(self) -> dict[str, float]:
        """Beside the counts: blocks closed, and steps in the present block."""
        return {**super().metrics(), "steps_in_block": self._steps_in_block}

    # ---- the step -----------------------------------------------------------------------------------------

    def _take_step(self, weight: int) -> None:
        self._refuse_inside_global_weights()
        self._counters["steps"] += 1
        if not weight:
            self._counters["skipped_empty"] += 1
        elif not self._gradients_are_finite():
            self._counters["skipped_nonfinite"] += 1
        else:
            self.inner.step()
            self._block_weight += weight
        self._steps_in_block += 1
        if self._steps_in_block == self.block_steps:
            self._close_block()
            self._start_block(ahead=self.nesterov)

    def _close_block(self) -> None:
        """Δ ← ηΔ + ζG and W ← W + Δ, unless nobody has trained in this block."""
        updates = [self._own_update(number) for number in range(len(self._buckets))]
        total = self._agree_on_block(updates)
        if total:
            share = scale_of(self._block_weight, total, self.comm.size)
            for update, filtered, weights in zip(updates, self._update, self._global):
                mean = self._mean(update, share)
                filtered.mul_(self.block_momentum).add_(mean, alpha=self.block_lr)
                weights.add_(filtered)
            self._counters["blocks"] += 1
        self._steps_in_block = self._block_weight = 0

    def _start_block(self, ahead: bool) -> None:
        self._starts_ahead = ahead
        for number, bucket in enumerate(self._buckets):
            for piece in bucket.pieces:
                piece.parameter.copy_(
                    self._start_of(number, piece.start, piece.stop).view(piece.parameter.shape)
                )

    def _start_of(self, number: int, start: int, stop: int) -> Tensor:
        """Part of the weights from which this block started; recomputed, with the same rounding, not kept."""
        weights = self._global[number][start:stop]
        if not self._starts_ahead:
            return weights
        return weights.add(self._update[number][start:stop], alpha=self.block_momentum)

    def _own_update(self, number: int) -> Tensor:
        """This rank's W_rank − W_start, flat."""
        update = self._buckets[number].read_parameters()
        for piece in self._buckets[number].pieces:
            update[piece.start : piece.stop].sub_(self._start_of(number, piece.start, piece.stop))
        return update

    def _mean(self, update: Tensor, share: float) -> Tensor:
        if not share:
            update.zero_()
        elif share != 1:
            update.mul_(share)
        with self._exchanging():
            self.comm.all_reduce(update)
        return update.div_(self.comm.size)

    def _agree_on_block(self, updates: list[Tensor]) -> int:
        """The total weight of the block; raises the same error on every rank where they cannot go on together."""
        finite = all(max_magnitude([update]) < float("inf") for update in updates if update.numel())
        with self._exchanging():
            rows = gather_integers(self.comm, [self._steps_in_block, self._block_weight, int(finite)])
        steps, weights, all_finite = (list(column) for column in zip(*rows))
        if len(set(steps)) > 1:
            raise ValueError(
                f"the ranks meet at different steps of their blocks: {dict(enumerate(steps))}. Every rank must call "
                "step and synchronize equally often; a rank without data calls step(weight=0)"
            )
        diverged = [rank for rank, is_finite in enumerate(all_finite) if not is_finite]
        if diverged:
            raise FloatingPointError(
                f"the model of rank {', '.join(map(str, diverged))} is not finite at the end of a block: training has "
                "diverged. Lower the learning rate, and go on from the last checkpoint"
            )
        return sum(weights)

    def _refuse_inside_global_weights(self) -> None:
        if self._set_aside is not None:
            raise RuntimeError(
                "leave optimizer.global_weights() before training on: the model holds W inside it"
            )

    # ---- checkpoints --------------------------------------------------------------------------------------

    def _hidden_state(self) -> dict[str, Any]:
        own = self._set_aside or [bucket.read_parameters() for bucket in self._buckets]
        return {
            "global_weights": self._global,
            "update": self._update,
            "own_weights": own,
            "starts_ahead": self._starts_ahead,
            "steps_in_block": self._steps_in_block,
            "block_weight": self._block_weight,
        }

    def _load_hidden_state(self, hidden: dict[str, Any]) -> None:
        """Puts the rank's own weights back into the model, whatever the model was loaded with."""
        self._refuse_inside_global_weights()
        for name, kept in (("global_weights", self._global), ("update", self._update)):
            for flat, saved in zip(kept, hidden[name], strict=True):
                flat.copy_(saved)
        self._starts_ahead = hidden["starts_ahead"]
        if hidden["size"] != self.comm.size:
            self._start_with_other_size(hidden)
            return
        if hidden["rank"] != self.comm.rank:
            raise ValueError(
                f"rank {self.comm.rank} got the BMUF state of rank {hidden['rank']}; every rank loads its own, since "
                "inside a block each has other weights"
            )
        self._steps_in_block = hidden["steps_in_block"]
        self._block_weight = hidden["block_weight"]
        write_all(
            self._buckets,
            [own.to(bucket.device) for own, bucket in zip(hidden["own_weights"], self._buckets)],
        )

    def _start_with_other_size(self, hidden: dict[str, Any]) -> None:
        if hidden["steps_in_block"]:
            warnings.warn(
                f"this BMUF state was saved by {hidden['size']} workers inside a block and is loaded by "
                f"{self.comm.size}: the {hidden['steps_in_block']} steps since the last block are lost",
                stacklevel=4,
            )
        self._steps_in_block = self._block_weight = 0
        with torch.no_grad():
            self._start_block(ahead=self._starts_ahead)


def find_problems(block_steps: int, block_momentum: float | None, block_lr: float) -> list[str]:
    problems = []
    try:
        is_length = operator.index(block_steps) >= 1
    except TypeError:
        is_length = False
    if not is_length:
        problems.append(f"block_steps is {block_steps!r}; give a whole number of steps, at least 1")
    if block_momentum is not None and not 0 <= block_momentum < 1:
        problems.append(f"block_momentum is {block_momentum!r}; give a number from 0 up to, not including, 1")
    if not 0 < block_lr < float("inf"):
        problems.append(f"block_lr is {block_lr!r}; give a number above 0")
    return problems


def write_all(buckets: list[Bucket], flats: list[Tensor]) -> None:
    for bucket, flat in zip(buckets, flats):
        bucket.write_parameters(flat)
