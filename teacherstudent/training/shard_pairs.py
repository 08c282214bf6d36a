"""One shard of features beside its shard of labels: which utterances have both, and how long they are.

# N utterances, T frames, F features
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_AGAIN = "make the labels again from the cuts that the features come from"


class Features(Protocol):
    """One shard: {"values": (T, F)} by utterance."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def num_frames(self) -> NDArray[np.integer]:
        """(N,) frames of each utterance."""
        ...

    def in_epoch(self, epoch: int) -> "Features":
        """The same utterances as a training hears them in an epoch."""
        ...

    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]: ...


class Labels(Protocol):
    """One shard: {"senone": (T,)}, or {"ids": (T, K), "probabilities": (T, K)}, by utterance."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def num_frames(self) -> NDArray[np.integer] | None:
        """(N,) frames of each utterance; None where only reading them tells."""
        ...

    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True)
class ShardPair:
    """The utterances of a shard that have labels; `where` names it in errors."""

    where: str
    features: Features
    labels: Labels
    ids: Sequence[str]
    num_frames: NDArray[np.int64]  # (N,) of their features

    def read(self, row: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Features (T, F) and labels, each (T, …), of an utterance by number.

        Labels of one frame more than the features are trimmed, of one less have their last frame repeated; ValueError
        if they are further off.
        """
        utterance = self.ids[row]
        values = self.features[utterance]["values"]
        fitted = {}
        for name, label in self.labels[utterance].items():
            _check_lengths(self.where, utterance, len(label), len(values), name)
            fitted[name] = np.concatenate([label, label[-1:]])[: len(values)]
        return values, fitted

    def choose(self, rows: slice) -> "ShardPair":
        """Some of the utterances."""
        return ShardPair(self.where, self.features, self.labels, self.ids[rows], self.num_frames[rows])


def open_pair(source: str, number: int, features: Features, labels: Labels) -> ShardPair:
    """The utterances that have labels: those without an alignment, or whose audio was spoilt when the teacher came to
    them, have none.

    Raises ValueError naming source and shard for labels of utterances that have no features, or in another order, and
    for labels that are more than a frame off.
    """
    where = f"source {source!r}, shard {number}"
    ids, lengths = labels.ids, np.asarray(features.num_frames, np.int64)
    if tuple(ids) != tuple(features.ids):
        rows = {utterance: row for row, utterance in enumerate(features.ids)}
        found = np.array([rows.get(utterance, -1) for utterance in ids], np.int64)
        if (found < 0).any() or (np.diff(found) <= 0).any():
            raise ValueError(f"{where}: features and labels are of different utterances; {_AGAIN}")
        lengths = lengths[found]
    if labels.num_frames is not None:
        counts = np.asarray(labels.num_frames, np.int64)
        for row in np.flatnonzero((np.abs(counts - lengths) > 1) | (counts == 0))[:1].tolist():
            _check_lengths(where, ids[row], int(counts[row]), int(lengths[row]), "labels")
    return ShardPair(where, features, labels, ids, lengths)


def _check_lengths(where: str, utterance: str, num_labels: int, num_frames: int, name: str) -> None:
    if abs(num_labels - num_frames) > 1 or not num_labels:
        raise ValueError(
            f"{where}, utterance {utterance!r}: {num_labels} frames of {name!r} for {num_frames} of features, at most "
            f"one may be missing or too many: {_AGAIN}"
        )
