"""Micro-batches as a pure function of (seed, epoch, position): nothing to replay, nothing to lose.

An epoch deals every utterance of a source into micro-batches of similar lengths; micro-batch `position` of epoch
`epoch` is the same whoever asks. A step of N workers takes positions p, p + 1, …, p + N - 1, one a rank; where an
epoch ends inside a step, the ranks beyond it get an empty batch of weight 0.

# B batch, T frames, F features, K kept
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from teacherstudent.training.losses import PADDING

WINDOW_SHARDS = 16  # shards shuffled together: bounds how far apart in the files a micro-batch reads


class Utterances(Protocol):
    """One shard of features or labels, by utterance."""

    @property
    def ids(self) -> Sequence[str]: ...
    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True)
class Batch:
    """Utterances in descending order of length, padded to the longest."""

    features: Tensor  # (B, T, F) float32
    lengths: Tensor  # (B,) int64
    senones: Tensor | None = None  # (B, T) int64, PADDING beyond a length
    ids: Tensor | None = None  # (B, T, K) int64
    probabilities: Tensor | None = None  # (B, T, K) float32, zero beyond a length

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


class Source:
    """Feature shards beside label shards, shard by shard and in the same order."""

    def __init__(
        self,
        name: str,
        features: Sequence[Utterances],
        labels: Sequence[Utterances],
        num_frames: Sequence[np.ndarray],
        batch_frames: int,
        seed: int,
    ) -> None:
        """num_frames: of the utterances of each shard. Raises ValueError where features and labels disagree."""
        _check_pairs(name, features, labels)
        if batch_frames < 1:
            raise ValueError(f"batch_frames = {batch_frames}: at least one frame is needed")
        self.name, self.features, self.labels = name, features, labels
        self.num_frames, self.batch_frames, self.seed = num_frames, batch_frames, seed
        self._planned: tuple[int, list[np.ndarray]] | None = None

    @property
    def total_frames(self) -> int:
        return int(sum(int(counts.sum()) for counts in self.num_frames))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The epoch's micro-batches, each (B, 2) of shard and utterance number, longest utterance first."""
        if self._planned is None or self._planned[0] != epoch:
            random = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), epoch])
            order = random.permutation(len(self.features))
            windows = [order[i : i + WINDOW_SHARDS] for i in range(0, len(order), WINDOW_SHARDS)]
            self._planned = (epoch, [batch for window in windows for batch in self._deal(window, random)])
        return self._planned[1]

    def _deal(self, window: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        members = np.concatenate(
            [np.stack([np.full(len(counts), shard), np.arange(len(counts))], axis=1)
             for shard in window
             for counts in [self.num_frames[shard]]]
        )  # fmt: skip
        lengths = np.concatenate([self.num_frames[shard] for shard in window])
        shuffled = random.permutation(len(members))  # so that equal lengths meet others in every epoch
        ranked = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
        batches, start = [], 0
        while start < len(ranked):
            size = max(1, self.batch_frames // max(1, int(lengths[ranked[start]])))
            batches.append(members[ranked[start : start + size]])
            start += size
        return [batches[index] for index in random.permutation(len(batches))]

    def batch(self, position: Position, rank: int = 0) -> Batch:
        """Micro-batch `position.consumed + rank` of the epoch; beyond its end, an empty one."""
        plan = self.plan(position.epoch)
        index = position.consumed + rank
        if index >= len(plan):
            return EMPTY
        utterances = [(int(shard), self.features[shard].ids[number]) for shard, number in plan[index]]
        features = [self.features[shard][name]["values"] for shard, name in utterances]
        labels = [
            _fit(self.labels[shard][name], len(values), f"source {self.name!r}, utterance {name!r}")
            for (shard, name), values in zip(utterances, features)
        ]
        return collate(features, labels)

    def advance(self, position: Position, num_workers: int) -> Position:
        """After a step in which every worker took one micro-batch."""
        consumed = position.consumed + num_workers
        if consumed >= len(self.plan(position.epoch)):
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, consumed)


EMPTY = Batch(torch.zeros(0, 0, 0), torch.zeros(0, dtype=torch.int64))


def collate(features: Sequence[np.ndarray], labels: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    """Utterances longest first; labels hold either "senone" (T,) or "ids" and "probabilities" (T, K)."""
    lengths = [len(values) for values in features]
    assert lengths == sorted(lengths, reverse=True), "longest first"
    padded = {
        "features": _pad(features, np.float32, 0),
        "lengths": torch.tensor(lengths, dtype=torch.int64),
    }
    if labels and "senone" in labels[0]:
        padded["senones"] = _pad([label["senone"] for label in labels], np.int64, PADDING)
    elif labels and "ids" in labels[0]:
        padded["ids"] = _pad([label["ids"] for label in labels], np.int64, 0)
        padded["probabilities"] = _pad([label["probabilities"] for label in labels], np.float32, 0)
    return Batch(**padded)


def _pad(arrays: Sequence[np.ndarray], dtype: type, value: float) -> Tensor:
    """(B, T, …), filled with `value` beyond each length."""
    longest = max(len(array) for array in arrays)
    padded = np.full((len(arrays), longest, *arrays[0].shape[1:]), value, dtype)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return torch.from_numpy(padded)


def _fit(labels: Mapping[str, np.ndarray], num_frames: int, where: str) -> dict[str, np.ndarray]:
    """Labels of one frame more than the features are trimmed, of one less have their last frame repeated."""
    fitted = {}
    for name, values in labels.items():
        if abs(len(values) - num_frames) > 1 or not len(values):
            raise ValueError(
                f"{where}: {len(values)} frames of {name!r} for {num_frames} of features, at most one may be "
                "missing or too many: make the labels again from the cuts that the features come from"
            )
        fitted[name] = np.concatenate([values, values[-1:]])[:num_frames]
    return fitted


def _check_pairs(name: str, features: Sequence[Utterances], labels: Sequence[Utterances]) -> None:
    if not any(len(shard.ids) for shard in features):
        raise ValueError(f"source {name!r} holds no utterance: its part of the data is empty")
    if len(features) != len(labels):
        raise ValueError(f"source {name!r}: {len(features)} feature shards but {len(labels)} label shards")
    for index, (values, targets) in enumerate(zip(features, labels)):
        if tuple(values.ids) != tuple(targets.ids):
            raise ValueError(
                f"source {name!r}, shard {index}: features and labels are of different utterances; "
                "make the labels again from the cuts that the features come from"
            )
