"""Cepstra of 10 ms frames, which Gaussians with diagonal covariance can model.

# T frames of 10 ms, T30 stacked frames of 30 ms, M mel bands, D = 39 features
"""

import numpy as np
from numpy.typing import NDArray

from teacherstudent.data.features import STACKED_FRAMES

FRAME_SHIFT_SECONDS = 0.01
NUM_CEPSTRA = 13
NUM_FEATURES = 3 * NUM_CEPSTRA
_DELTA_WINDOW = 2  # frames on either side
_SMALLEST_DEVIATION = 1e-3  # of a cepstrum over an utterance: less is digital silence

Floats = NDArray[np.float64]


def unstack(stacked: NDArray, num_frames: int) -> Floats:
    """(T30, M * STACKED_FRAMES) -> (num_frames, M), without the repeats at the end."""
    frames = stacked.astype(np.float64).reshape(-1, stacked.shape[1] // STACKED_FRAMES)
    assert len(frames) - STACKED_FRAMES < num_frames <= len(frames)
    return frames[:num_frames]


def extract(log_mel: Floats) -> Floats:
    """(T, M) -> (T, D): 13 cepstra, their slopes and the slopes of those, of mean 0 and variance 1 each.

    The normalisation is over the utterance, so that speakers, channels and levels are alike.
    """
    num_mels = log_mel.shape[1]
    waves = np.cos(np.pi / num_mels * np.outer(np.arange(num_mels) + 0.5, np.arange(NUM_CEPSTRA)))
    cepstra = np.einsum("tm,mc->tc", log_mel, waves)
    slopes = _slope(cepstra)
    features = np.concatenate([cepstra, slopes, _slope(slopes)], axis=1)
    centred = features - features.mean(axis=0)
    return centred / np.maximum(centred.std(axis=0), _SMALLEST_DEVIATION)


def _slope(values: Floats) -> Floats:
    """Of the regression line over five frames (Furui 1986, as in HTK); the ends are repeated."""
    padded = np.pad(values, ((_DELTA_WINDOW, _DELTA_WINDOW), (0, 0)), mode="edge")
    rise, size = np.zeros_like(values), len(values)
    steps = range(1, _DELTA_WINDOW + 1)
    for step in steps:
        rise += step * (padded[_DELTA_WINDOW + step :][:size] - padded[_DELTA_WINDOW - step :][:size])
    return rise / (2 * sum(step**2 for step in steps))
