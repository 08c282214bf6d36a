"""Micro-batches as a pure function of (seed, epoch, position): nothing to replay, nothing to lose.

An epoch deals every utterance of a source into micro-batches of similar lengths; micro-batch `position` of epoch
`epoch` is the same whoever asks. A step of N workers takes positions p, p + 1, …, p + N - 1, one a rank; where an
epoch ends inside a step, the ranks beyond it get an empty batch of weight 0.

An epoch shuffles the shards and takes a window of WINDOW_SHARDS of them at a time. How many micro-batches each window
has, the table of shards knows (shard_table.py); so the window of a position is found at once, and only its shards are
opened, dealt and shuffled. Memory and start do not grow with the number of utterances.

# B batch, T frames, F features, K kept, N shards, W windows, U utterances of a window
"""

import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacherstudent.training.losses import PADDING
from teacherstudent.training.shard_pairs import Features, Labels, ShardPair, open_pair
from teacherstudent.training.shard_table import ShardTable

WINDOW_SHARDS = 16  # shards shuffled together: bounds how far apart in the files a micro-batch reads
_KEPT = 2  # epochs, and windows, of a source

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Batch:
    """Utterances in descending order of length, padded to the longest."""

    features: Tensor  # (B, T, F) float32
    lengths: Tensor  # (B,) int64
    senones: Tensor | None = None  # (B, T) int64, PADDING beyond a length
    ids: Tensor | None = None  # (B, T, K) int64
    probabilities: Tensor | None = (
        None  # (B, T, K) float32, renormalised, the highest first, zero beyond a length
    )
    dropped: Tensor | None = None  # (B, T) float32, the mass that was dropped before

    @property
    def num_frames(self) -> int:
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> "Batch":
        """On another device; lengths stay where they are."""
        moved = {
            name: None if value is None else value.to(device)
            for name, value in vars(self).items()
            if name != "lengths"
        }
        return Batch(lengths=self.lengths, **moved)  # type: ignore[arg-type]


@dataclass
class Position:
    """Where a source stands: the micro-batches of this epoch that are consumed. This is all there is to resume."""

    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True)
class _Epoch:
    """How the shards lie in an epoch."""

    number: int
    order: NDArray[np.int64]  # (N,) the shards; every WINDOW_SHARDS of them are a window
    ends: NDArray[np.int64]  # (W,) micro-batches up to the end of each window


@dataclass(frozen=True)
class _Window:
    """Some shards opened, and their utterances dealt."""

    pairs: list[ShardPair]
    members: NDArray[np.int64]  # (U, 2) pair and row of every utterance, as they were dealt
    starts: list[int]  # where each micro-batch begins among them; then the number of all
    order: NDArray[np.int64]  # of the micro-batches

    def read(self, index: int) -> Batch:
        chosen = self.order[index]
        rows = self.members[self.starts[chosen] : self.starts[chosen + 1]].tolist()
        features, labels = zip(*(self.pairs[pair].read(row) for pair, row in rows))
        return collate(features, labels)


class Source:
    """Feature shards beside label shards, shard by shard and in the same order.

    Nothing is held but the table and the last windows: shards are opened, and their agreement is checked, when a
    micro-batch is first read from them. May be pickled.
    """

    def __init__(
        self,
        name: str,
        features: Sequence[Features],
        labels: Sequence[Labels],
        table: ShardTable,
        batch_frames: int,
        seed: int,
        parts: Mapping[int, slice] | None = None,
    ) -> None:
        """table: of the utterances that have labels. parts: of these shards, only some of those.

        Raises ValueError for different numbers of shards, and where there is no utterance at all.
        """
        if batch_frames < 1:
            raise ValueError(f"batch_frames = {batch_frames}: at least one frame is needed")
        if len(features) != len(labels):
            raise ValueError(
                f"source {name!r}: {len(features)} feature shards but {len(labels)} label shards: the step that makes "
                "the labels has to run again"
            )
        if not table.num_utterances.any():
            raise ValueError(f"source {name!r} holds no utterance: its part of the data is empty")
        self.name, self.features, self.labels = name, features, labels
        self.table, self.batch_frames, self.seed = table, batch_frames, seed
        self._parts = dict(parts or {})
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def __reduce__(self) -> tuple[type["Source"], tuple[object, ...]]:
        places = (self.features, self.labels, self.table)  # of what is opened, nothing travels
        return type(self), (self.name, *places, self.batch_frames, self.seed, self._parts)

    @property
    def total_frames(self) -> int:
        return self.table.total_frames

    @property
    def num_utterances(self) -> int:
        return int(self.table.num_utterances.sum())

    def num_batches(self, epoch: int) -> int:
        """Micro-batches of an epoch: with the order of the shards, their number changes a little."""
        return int(self._epoch(epoch).ends[-1])

    def batch(self, position: Position, rank: int = 0) -> Batch:
        """Micro-batch `position.consumed + rank` of the epoch; beyond its end, an empty one.

        Raises ValueError naming the shard where it is not what the table says, or its features and labels disagree.
        """
        index = position.consumed + rank
        ends = self._epoch(position.epoch).ends
        if index >= ends[-1]:
            return EMPTY
        window = int(np.searchsorted(ends, index, side="right"))
        before = int(ends[window - 1]) if window else 0
        return self._window(position.epoch, window).read(index - before)

    def advance(self, position: Position, num_workers: int) -> Position:
        """After a step in which every worker took one micro-batch."""
        consumed = position.consumed + num_workers
        if consumed >= self.num_batches(position.epoch):
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, consumed)

    def take_first(self, num_shards: int) -> "Source":
        """Of the first shards alone.

        Raises ValueError where there are not so many, or no utterance is in them.
        """
        if not 0 < num_shards <= self.table.num_shards:
            raise ValueError(
                f"schedule.machine_shards = {num_shards}: source {self.name!r} has {self.table.num_shards} shards"
            )
        return self._part(self.name, self.table.replace({}, num_shards), self._parts)

    def hold_out(self, num_utterances: int, warns: bool = True) -> tuple["Source", "Source"]:
        """What is left to train on, and so many utterances for validation: the first ones of the first shards.

        They are neighbours in the data: the more so, the less it was shuffled when it was cut into shards. At most a
        tenth of the source is held out; `warns` on one of the workers tells where that is less than asked for. Raises
        ValueError where there are too few to hold out any.
        """
        assert not self._parts, "held out once"
        tenth = self.num_utterances // 10
        if num_utterances < 1 or not tenth:
            raise ValueError(
                f"source {self.name!r}: got {num_utterances} utterances to hold out of {self.num_utterances}: one at "
                "least is needed, and may be a tenth of the source at most"
            )
        if num_utterances > tenth and warns:
            warnings.warn(
                f"schedule.held_out_utterances = {num_utterances}: that is more than a tenth of the "
                f"{self.num_utterances} of source {self.name!r}: {tenth} are held out for validation",
                stacklevel=2,
            )
        ends = np.cumsum(self.table.num_utterances)
        taken = min(num_utterances, tenth)
        num_shards = int(np.searchsorted(ends, taken)) + 1
        cuts = {shard: taken - int(ends[shard - 1]) if shard else taken for shard in range(num_shards)}
        lengths = {shard: self._open(shard).num_frames for shard in cuts}
        rest = self.table.replace({shard: lengths[shard][cut:] for shard, cut in cuts.items()})
        held = self.table.replace({shard: lengths[shard][:cut] for shard, cut in cuts.items()}, num_shards)
        return (
            self._part(self.name, rest, {shard: slice(cut, None) for shard, cut in cuts.items()}),
            self._part(f"{self.name}, held out", held, {shard: slice(cut) for shard, cut in cuts.items()}),
        )

    def _part(self, name: str, table: ShardTable, parts: Mapping[int, slice]) -> "Source":
        return Source(name, self.features, self.labels, table, self.batch_frames, self.seed, parts)

    def _random(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), *place])

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            order = self._random(number).permutation(self.table.num_shards)
            counts = self.table.count_batches(order, WINDOW_SHARDS, self.batch_frames)
            _keep(self._epochs, number, _Epoch(number, order, np.cumsum(counts)))
        return self._epochs[number]

    def _window(self, epoch: int, number: int) -> _Window:
        if (epoch, number) not in self._windows:
            order = self._epoch(epoch).order[number * WINDOW_SHARDS : (number + 1) * WINDOW_SHARDS]
            random = self._random(epoch, number + 1)  # a seed that ends in 0 is the same without it
            window = self._deal(order, random, epoch)
            ends = np.append(self._epoch(epoch).ends, 0)  # of none before the first
            assert len(window.order) == ends[number] - ends[number - 1], "as the table says"
            _keep(self._windows, (epoch, number), window)
        self._windows.move_to_end((epoch, number))
        return self._windows[epoch, number]

    def _deal(self, shards: NDArray[np.int64], random: np.random.Generator, epoch: int) -> _Window:
        pairs = [self._open(shard, epoch) for shard in shards.tolist() if self.table.num_utterances[shard]]
        counts = [len(pair.ids) for pair in pairs]
        members = np.stack(
            [np.repeat(np.arange(len(pairs)), counts), np.concatenate([np.arange(n) for n in counts])], axis=1
        )
        lengths = np.concatenate([pair.num_frames for pair in pairs])
        shuffled = random.permutation(len(members))  # so that equal lengths meet others in every epoch
        ranked = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
        sizes = self.table.find_sizes(lengths[ranked], self.batch_frames).tolist()
        starts = [0]
        while starts[-1] < len(sizes):
            starts.append(min(starts[-1] + sizes[starts[-1]], len(sizes)))
        return _Window(pairs, members[ranked], starts, random.permutation(len(starts) - 1))

    def _open(self, shard: int, epoch: int = 0) -> ShardPair:
        pair = open_pair(self.name, shard, self.features[shard].in_epoch(epoch), self.labels[shard])
        pair = pair.choose(self._parts.get(shard, slice(None)))
        if not self.table.describes(shard, pair.num_frames):
            raise ValueError(
                f"{pair.where}: its {len(pair.ids)} utterances are not those that the table of all shards counted "
                f"({self.table.origin}): the shard was exchanged since. Remove the table, it is made anew"
            )
        return pair


def _keep(cache: "OrderedDict[Key, Value]", key: "Key", value: "Value") -> None:
    """Of the last ones only: the end of one and the beginning of the next are needed at the same time."""
    cache[key] = value
    if len(cache) > _KEPT:
        cache.popitem(last=False)


EMPTY = Batch(torch.zeros(0, 0, 0), torch.zeros(0, dtype=torch.int64))


def collate(features: Sequence[np.ndarray], labels: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    """Utterances longest first; labels hold "senone" (T,), or "ids" and "probabilities" (T, K) with "dropped" (T,), or
    both, or nothing.
    """
    lengths = [len(values) for values in features]
    assert lengths == sorted(lengths, reverse=True), "longest first"
    padded = {
        "features": _pad(features, np.float32, 0),
        "lengths": torch.tensor(lengths, dtype=torch.int64),
    }
    if labels and "senone" in labels[0]:
        padded["senones"] = _pad([label["senone"] for label in labels], np.int64, PADDING)
    if labels and "ids" in labels[0]:
        padded["ids"] = _pad([label["ids"] for label in labels], np.int64, 0)
        padded["probabilities"] = _pad([label["probabilities"] for label in labels], np.float32, 0)
    if labels and "dropped" in labels[0]:
        padded["dropped"] = _pad([label["dropped"] for label in labels], np.float32, 0)
    return Batch(**padded)


def _pad(arrays: Sequence[np.ndarray], dtype: type, value: float) -> Tensor:
    """(B, T, …), filled with `value` beyond each length."""
    longest = max(len(array) for array in arrays)
    padded = np.full((len(arrays), longest, *arrays[0].shape[1:]), value, dtype)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return torch.from_numpy(padded)
