"""Events: which triphone state every frame is in, and what the frames of each triphone state look like.

A phone lasts one frame or more. Its first frame is state 0, all later ones are state 1. An event is a triphone state
(left, centre, right, state), phones as ids: 0 outside of the utterance, then the phones in order from 1, silence
first. Silence does not depend on its neighbours.
"""
# T frames, D tree features, E events, P phones, M moments of an event (1 + 2 D)

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NUM_STATES = 2  # first frame of a phone, later frames
SILENCE_ID = 1
_NUM_CEPSTRA = 13
NUM_TREE_FEATURES = 2 * _NUM_CEPSTRA


def tree_features(stacked: ArrayLike, stacked_frames: int = 3) -> Floats:
    """A small decorrelated view of stacked log-mel frames, for Gaussians with diagonal covariance.

    stacked: (T, stacked_frames * mels). Returns (T, 26): 13 cepstra of the frames' mean, then of their slope.
    """
    frames = np.asarray(stacked, dtype=np.float64)
    frames = frames.reshape(len(frames), stacked_frames, frames.shape[1] // stacked_frames)
    time = np.arange(stacked_frames) - (stacked_frames - 1) / 2
    slope = time / max(float(np.linalg.norm(time)), 1.0)
    mean = np.full(stacked_frames, stacked_frames**-0.5)
    mels = frames.shape[2]
    waves = np.cos(np.pi / mels * np.outer(np.arange(mels) + 0.5, np.arange(_NUM_CEPSTRA))) * np.sqrt(
        2 / mels
    )
    waves[:, 0] *= np.sqrt(0.5)  # the DCT-II, orthonormal
    return np.concatenate([np.tensordot(frames, part, axes=(1, 0)) @ waves for part in (mean, slope)], axis=1)


def frame_events(phone: ArrayLike, first: ArrayLike) -> Integers:
    """The triphone state of every frame of an utterance.

    phone: (T,) phone ids; first: (T,) bool, whether the frame opens a phone. Returns (T, 4): left, centre,
    right, state. Silence's neighbours are given as 0. A cut may begin within a phone (first[0] False).
    Raises ValueError when the phone changes at a frame that is not marked as first.
    """
    phones, opens = np.asarray(phone, dtype=np.int64), np.asarray(first, dtype=bool)
    if phones.shape != opens.shape or phones.ndim != 1:
        raise ValueError(f"got phone {phones.shape} and first {opens.shape}: both must be (frames,)")
    if not len(phones):
        return np.zeros((0, 4), dtype=np.int64)
    changed = np.flatnonzero((phones[1:] != phones[:-1]) & ~opens[1:]) + 1
    if len(changed):
        raise ValueError(f"the phone changes at frame {changed[0]}, which is not marked as a phone's first")
    starts = opens.copy()
    starts[0] = True
    segment = np.cumsum(starts) - 1
    sequence = np.pad(phones[starts], 1)  # 0 outside of the utterance
    events = np.stack([sequence[segment], phones, sequence[segment + 2], np.where(opens, 0, 1)], axis=1)
    events[phones == SILENCE_ID, 0] = events[phones == SILENCE_ID, 2] = 0
    return events


class Statistics:
    """Count, sums and sums of squares of the tree features of every event, in float64."""

    def __init__(self, num_phones: int, num_features: int = NUM_TREE_FEATURES) -> None:
        self.num_phones, self.num_features = num_phones, num_features
        self._keys = np.zeros(0, dtype=np.int64)  # events as one number, ascending
        self._rows = np.zeros(0, dtype=np.int64)  # of _moments, for each key
        self._moments = np.zeros((1024, 1 + 2 * num_features))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_phones + 1,) * 3 + (NUM_STATES,)

    def accumulate(self, features: ArrayLike, phone: ArrayLike, first: ArrayLike) -> None:
        """Add an utterance: features (T, D), phone (T,) ids, first (T,) bool."""
        values = np.asarray(features, dtype=np.float64)
        events = frame_events(phone, first)
        if values.shape != (len(events), self.num_features):
            raise ValueError(
                f"got features {values.shape}, need ({len(events)}, {self.num_features}) for {len(events)} phones"
            )
        if not len(events):
            return
        check_phones(events[:, 1], self.num_phones)
        keys, inverse = np.unique(np.ravel_multi_index(tuple(events.T), self._shape), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(len(keys)))
        moments = np.concatenate([np.ones((len(values), 1)), values, values**2], axis=1)
        self._add(keys, np.add.reduceat(moments[order], starts, axis=0))

    def merge(self, other: "Statistics") -> None:
        """Add all that another one has seen. The bits of the sums depend on the order of merging."""
        assert other._shape == self._shape
        assert other.num_features == self.num_features
        self._add(other._keys, other._moments[other._rows])

    def _add(self, keys: Integers, moments: Floats) -> None:
        """keys ascending, all different."""
        places = np.searchsorted(self._keys, keys)
        known = np.zeros(len(keys), dtype=bool)
        inside = places < len(self._keys)
        known[inside] = self._keys[places[inside]] == keys[inside]
        num_events = len(self._keys)
        total = num_events + int((~known).sum())
        rows = np.arange(num_events, total)
        if total > len(self._moments):
            larger = np.zeros((max(total, len(self._moments) * 3 // 2), self._moments.shape[1]))
            larger[:num_events] = self._moments[:num_events]
            self._moments = larger
        self._moments[self._rows[places[known]]] += moments[known]
        self._moments[rows] = moments[~known]
        self._keys = np.insert(self._keys, places[~known], keys[~known])
        self._rows = np.insert(self._rows, places[~known], rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_moments": self._moments[: len(self._keys)]}  # without the room to grow

    @property
    def num_frames(self) -> int:
        return int(self._moments[: len(self._keys), 0].sum())

    def events(self) -> tuple[Integers, Floats]:
        """Events (E, 4) in ascending order, and their moments (E, M)."""
        return np.stack(np.unravel_index(self._keys, self._shape), axis=1), self._moments[self._rows]


def check_phones(phones: Integers, num_phones: int, lowest: int = SILENCE_ID) -> None:
    """Raises ValueError for an id that no phone has."""
    if phones.size and (phones.min() < lowest or phones.max() > num_phones):
        wrong = int(phones.min() if phones.min() < lowest else phones.max())
        raise ValueError(f"got phone id {wrong}: ids here go from {lowest} to {num_phones}")
