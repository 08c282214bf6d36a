"""Log-mel features stacked to 30 ms, and their normalisation.

# T10 frames of 10 ms, T frames of 30 ms, M mel bands, F features of a stacked frame (3 M)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

STACKED_FRAMES = 3
FRAME_SHIFT_SECONDS = 0.03
FRAME_RULE = "10 ms, snip_edges=False, stacked by 3, last frame repeated"
PRIOR_FRAMES = 100  # of the global mean and variance, 3 seconds, that causal normalisation starts from
_LEAST_VARIANCE = 1e-4


def num_stacked_frames(num_samples: int, sampling_rate: int) -> int:
    """T: ceil(T10 / 3), where T10 is num_samples in frames of 10 ms, rounded, halves up, as lhotse does."""
    hop = sampling_rate // 100
    return -(-((num_samples + hop // 2) // hop) // STACKED_FRAMES)


def stack(log_mel: np.ndarray, stacked_frames: int = STACKED_FRAMES) -> np.ndarray:
    """(T10, M) -> (T, M * stacked_frames) with T = ceil(T10 / stacked_frames); the last frame is repeated."""
    num_frames, num_mels = log_mel.shape
    missing = -num_frames % stacked_frames
    if missing:
        log_mel = np.concatenate([log_mel, np.repeat(log_mel[-1:], missing, axis=0)])
    return log_mel.reshape(-1, stacked_frames * num_mels)


@dataclass(frozen=True)
class Moments:
    """Sums over frames, from which the normalisation follows; they add up over shards."""

    num_frames: int
    total: np.ndarray  # (F,) float64
    total_squares: np.ndarray  # (F,) float64

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """features: (T, F)."""
        wide = features.astype(np.float64)
        return cls(len(wide), wide.sum(axis=0), (wide**2).sum(axis=0))

    @classmethod
    def add(cls, parts: Iterable["Moments"]) -> "Moments":
        """One after the other in the order given: the sum has the same bits wherever the parts were computed.

        Raises ValueError when there is no frame among them.
        """
        total: Moments | None = None
        for part in parts:
            total = part if total is None else total + part
        if total is None or not total.num_frames:
            raise ValueError("no frames to normalise by: the training parts are empty")
        return total

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.num_frames + other.num_frames,
            self.total + other.total,
            self.total_squares + other.total_squares,
        )


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation: over all training frames, or over all that one speaker said."""

    mean: np.ndarray  # (F,) float32
    deviation: np.ndarray  # (F,) float32

    @classmethod
    def from_moments(cls, moments: Moments) -> "Normalisation":
        mean = moments.total / moments.num_frames
        variance = moments.total_squares / moments.num_frames - mean**2
        return cls(mean.astype(np.float32), np.sqrt(np.maximum(variance, _LEAST_VARIANCE)).astype(np.float32))

    @classmethod
    def of(cls, features: np.ndarray) -> "Normalisation":
        """features: (T, F), one frame at least."""
        return cls.from_moments(Moments.of(features))

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Normalisation":
        return cls(np.asarray(values["mean"], np.float32), np.asarray(values["deviation"], np.float32))


def normalise_by(values: np.ndarray, own: Normalisation, overall: Normalisation) -> np.ndarray:
    """(T, F) -> (T, F) float32 with the mean and deviation of all data in the place of the speaker's own.

    x' = (x - own mean) / own deviation * overall deviation + overall mean: a model that normalises by `overall`
    then sees the speaker's values at mean 0 and deviation 1.
    """
    scaled = (values.astype(np.float32) - own.mean) / own.deviation
    return scaled * overall.deviation + overall.mean


def normalise_causally(values: np.ndarray, overall: Normalisation) -> np.ndarray:
    """(T, F) -> (T, F) float32, as normalise_by, by what was heard of the utterance up to and with each frame.

    The running mean and variance start from those of all data, which count as PRIOR_FRAMES frames; row t depends on
    rows 0 … t alone, so that a stream can do the same.
    """
    wide, mean = values.astype(np.float64), overall.mean.astype(np.float64)
    deviation = overall.deviation.astype(np.float64)
    heard = PRIOR_FRAMES + np.arange(1, len(wide) + 1)[:, None]
    running_mean = (PRIOR_FRAMES * mean + np.cumsum(wide, axis=0)) / heard
    squares = (PRIOR_FRAMES * (deviation**2 + mean**2) + np.cumsum(wide**2, axis=0)) / heard
    running_deviation = np.sqrt(np.maximum(squares - running_mean**2, _LEAST_VARIANCE))
    return ((wide - running_mean) / running_deviation * deviation + mean).astype(np.float32)
