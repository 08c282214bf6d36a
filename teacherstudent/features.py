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
        """In the order given, so that the sum has the same bits wherever the parts were computed."""
        parts = list(parts)
        if not any(part.num_frames for part in parts):
            raise ValueError("no frames to normalise by: the training parts are empty")
        squares = np.sum([part.total_squares for part in parts], axis=0)
        return cls(
            sum(part.num_frames for part in parts), np.sum([part.total for part in parts], axis=0), squares
        )


@dataclass(frozen=True)
class Normalisation:
    """Global mean and standard deviation, over all training frames."""

    mean: np.ndarray  # (F,) float32
    deviation: np.ndarray  # (F,) float32

    @classmethod
    def from_moments(cls, moments: Moments) -> "Normalisation":
        mean = moments.total / moments.num_frames
        variance = moments.total_squares / moments.num_frames - mean**2
        return cls(mean.astype(np.float32), np.sqrt(np.maximum(variance, 1e-4)).astype(np.float32))

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Normalisation":
        return cls(np.asarray(values["mean"], np.float32), np.asarray(values["deviation"], np.float32))
