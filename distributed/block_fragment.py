"""Parameters that end their blocks together."""

import dataclasses
from typing import Any

from torch import Tensor

from teacherstudent.distributed.block_agreement import Tally
from teacherstudent.distributed.block_exchange import Exchange
from teacherstudent.distributed.block_filter import BlockFilter
from teacherstudent.distributed.block_state import BlockEnd, LocalState
from teacherstudent.distributed.flat import Bucket, all_pieces, make_buckets


class Fragment:
    """The whole model, or a part of it with blocks of its own.

    num_steps   length of the present block
    tally       what the rank has done in it
    own         while an exchange is under way: the rank's weights (n) at the end of the last block
    """

    def __init__(self, filter: BlockFilter, exchange: Exchange, local: LocalState, num_steps: int) -> None:
        self.filter = filter
        self.exchange = exchange
        self.local = local
        self.num_steps = num_steps
        self.tally = Tally()
        self.own: list[Tensor] | None = None
        self._next_is_ahead = False

    def end_block(self, share: float, ahead: bool) -> int:
        """Average, filter, and start the next block; returns how often the guard of the local state has acted."""
        end = BlockEnd(share, was_ahead=self.filter.is_ahead, is_ahead=ahead)
        if self.exchange.keeps_nothing_back and self.filter.can_lend():
            self._average_in_place(share)
        else:
            updates = self.filter.own_updates()
            self.exchange.average(updates, share)
            self.filter.apply(updates)
        self.filter.start_block(ahead)
        return self.local.end_block(end)

    def _average_in_place(self, share: float) -> None:
        """Without a buffer of the model's size. After an error the model is at the block's start, W as it was."""
        try:
            for parts in self.filter.lend():
                self.exchange.average_parts(parts, share)
        except BaseException:
            self.filter.start_block(self.filter.is_ahead)
            raise
        self.filter.apply_lent()

    def end_block_later(self, share: float, ahead: bool) -> int:
        """As end_block, with the exchange under way until `merge`. Training may go on meanwhile."""
        self.own, self._next_is_ahead = self.filter.read_own(), ahead
        self.exchange.start(self.filter.own_updates(), share)
        return self.local.end_block(BlockEnd(share, was_ahead=self.filter.is_ahead, is_ahead=ahead))

    def merge(self) -> None:
        """Wait for the exchange under way, filter, and move the weights by what they have missed."""
        assert self.own is not None
        self.filter.apply(self.exchange.finish())
        self.filter.start_block_later(self._next_is_ahead, self.own)
        self.own = None

    def start_again(self) -> None:
        """The rank's own work and state are lost; it goes on from the common start of the block."""
        self.filter.start_block(self.filter.is_ahead)
        self.local.start_again()
        self.tally.forfeit()
        if self.own is not None:
            self.own = self.filter.read_own()

    def state_dict(self) -> dict[str, Any]:
        return {
            "filter": self.filter.state_dict(),
            "exchange": self.exchange.state_dict(),
            "local": self.local.state_dict(),
            "tally": dataclasses.asdict(self.tally),
            "num_steps": self.num_steps,
            "own": self.own,
            "next_is_ahead": self._next_is_ahead,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Everything but the parameters themselves."""
        self.filter.load_state_dict(state["filter"])
        self.exchange.load_state_dict(state["exchange"], [flat.device for flat in self.filter.weights])
        self._load_local_state(state)
        self.tally = Tally(**state["tally"])
        self.num_steps = state["num_steps"]
        self.own = state["own"]
        if self.own is not None:
            self.own = [flat.to(own.device, copy=True) for flat, own in zip(self.own, self.filter.weights)]
        self._next_is_ahead = state["next_is_ahead"]

    def load_common_state(self, state: dict[str, Any]) -> int:
        """What does not depend on the rank; a block starts there. How many elements of residuals are lost with it."""
        self.filter.load_state_dict(state["filter"])
        self._load_local_state(state)
        self.local.return_to_start()
        self.filter.start_block(self.filter.is_ahead)
        self.tally, self.own = Tally(), None
        exchange = state["exchange"]
        residuals = [*exchange.get("residuals", ()), *exchange.get("slice_residuals", ())]
        folded = exchange.get("folded", [])
        self.exchange.reset()
        if folded and self.exchange.take_over(folded):
            folded = []
        return sum(int(residual.count_nonzero()) for residual in (*residuals, *folded))

    def load_warm_up(self, state: dict[str, Any], own: list[Tensor]) -> None:
        """Of a training in which no block has begun yet."""
        self.filter.load_state_dict(state["filter"])
        self.filter.write(own)
        self.exchange.reset()
        self.tally, self.own = Tally(), None

    def _load_local_state(self, state: dict[str, Any]) -> None:
        if bool(state["local"]) == bool(self.local.state_dict()):
            self.local.load_state_dict(state["local"])
        else:  # where ranks have the same, or need nothing
            self.local.begin()


def split_buckets(buckets: list[Bucket], num_parts: int) -> list[list[Bucket]]:
    """Whole parameters in their order, shared out in `num_parts` of about as many elements each."""
    if num_parts == 1:
        return [buckets]
    pieces = sorted(all_pieces(buckets), key=lambda piece: piece.index)
    total = sum(piece.parameter.numel() for piece in pieces)
    parts: list[list[Tensor]] = [[] for _ in range(num_parts)]
    num_passed = 0
    for piece in pieces:
        middle = num_passed + piece.parameter.numel() / 2
        parts[min(int(num_parts * middle / total), num_parts - 1)].append(piece.parameter)
        num_passed += piece.parameter.numel()
    num_filled = sum(map(bool, parts))
    if num_filled < num_parts:
        raise ValueError(
            f"fragments={num_parts}: with whole parameters, of about the same size each, {num_filled} of them would be "
            "filled; use fewer"
        )
    return [make_buckets([{"params": part}]) for part in parts]
