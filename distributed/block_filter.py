"""The filter of BMUF: the global weights, the filtered update, and the weights from which a block starts."""
# W global weights, Δ filtered update, η block momentum, ζ block learning rate, G mean update of a block
# n elements of a bucket

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from teacherstudent.distributed.flat import Bucket, all_pieces


class BlockFilter:
    """W and Δ of some parameters, which hold the rank's own weights while it trains.

    buckets      the parameters
    weights      W, and update, Δ: flat buffers (n), one for each bucket
    is_ahead     whether the present block started from W + ηΔ, and not from W
    """

    def __init__(self, buckets: list[Bucket], momentum: float, lr: float) -> None:
        self.buckets = buckets
        self.momentum = momentum
        self.lr = lr
        self.weights = [bucket.read_parameters() for bucket in buckets]
        self.update = [bucket.new_zeros() for bucket in buckets]
        self.is_ahead = False

    def own_updates(self) -> list[Tensor]:
        """What this rank has learnt in the block, W_rank − W_start, in new buffers."""
        updates = self.read_own()
        for number, bucket in enumerate(self.buckets):
            for piece in bucket.pieces:
                updates[number][piece.start : piece.stop].sub_(
                    self._start_of(number, piece.start, piece.stop)
                )
        return updates

    def each_update(self) -> Iterator[Tensor]:
        """The same of one parameter after another, each flat, so that no buffer is as large as the model."""
        for number, bucket in enumerate(self.buckets):
            for piece in bucket.pieces:
                yield piece.parameter.reshape(-1) - self._start_of(number, piece.start, piece.stop)

    def can_lend(self) -> bool:
        return all(piece.parameter.is_contiguous() for piece in all_pieces(self.buckets))

    def lend(self) -> list[list[Tensor]]:
        """The parameters of each bucket, flat, made to hold W_rank − W_start: no memory beside the model's."""
        for number, bucket in enumerate(self.buckets):
            for piece in bucket.pieces:
                piece.parameter.view(-1).sub_(self._start_of(number, piece.start, piece.stop))
        return [[piece.parameter.view(-1) for piece in bucket.pieces] for bucket in self.buckets]

    def apply_lent(self) -> None:
        """As apply, with the mean updates in the parameters."""
        for bucket, weights, update in zip(self.buckets, self.weights, self.update):
            update.mul_(self.momentum)
            for piece in bucket.pieces:
                update[piece.start : piece.stop].add_(piece.parameter.view(-1), alpha=self.lr)
            weights.add_(update)

    def apply(self, means: list[Tensor]) -> None:
        """Δ ← ηΔ + ζG; W ← W + Δ."""
        for weights, update, mean in zip(self.weights, self.update, means, strict=True):
            update.mul_(self.momentum).add_(mean, alpha=self.lr)
            weights.add_(update)

    def start_block(self, ahead: bool) -> None:
        """The parameters become W + ηΔ, or W."""
        self.is_ahead = ahead
        for number, bucket in enumerate(self.buckets):
            for piece in bucket.pieces:
                start = self._start_of(number, piece.start, piece.stop)
                piece.parameter.copy_(start.view(piece.parameter.shape))

    def start_block_later(self, ahead: bool, own: list[Tensor]) -> None:
        """As start_block; what the parameters have become since they were `own` is kept on top."""
        self.is_ahead = ahead
        for number, bucket in enumerate(self.buckets):
            for piece in bucket.pieces:
                start = self._start_of(number, piece.start, piece.stop)
                piece.parameter.add_(
                    (start - own[number][piece.start : piece.stop]).view(piece.parameter.shape)
                )

    def take_over(self) -> None:
        """W becomes what the parameters hold, and Δ zero."""
        for bucket, weights, update in zip(self.buckets, self.weights, self.update):
            weights.copy_(bucket.read_parameters())
            update.zero_()
        self.is_ahead = False

    def read_own(self) -> list[Tensor]:
        return [bucket.read_parameters() for bucket in self.buckets]

    def write(self, flats: list[Tensor]) -> None:
        for bucket, flat in zip(self.buckets, flats, strict=True):
            bucket.write_parameters(flat)

    def _start_of(self, number: int, start: int, stop: int) -> Tensor:
        """Part of the weights from which this block started; recomputed, with the same rounding, not kept."""
        weights = self.weights[number][start:stop]
        if not self.is_ahead:
            return weights
        return weights.add(self.update[number][start:stop], alpha=self.momentum)

    def state_dict(self) -> dict[str, Any]:
        return {"global_weights": self.weights, "update": self.update, "is_ahead": self.is_ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, kept in (("global_weights", self.weights), ("update", self.update)):
            for flat, saved in zip(kept, state[name], strict=True):
                flat.copy_(saved)
        self.is_ahead = state["is_ahead"]
