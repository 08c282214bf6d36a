"""Cepstra and their slopes."""

import numpy as np
import pytest
from scipy.fft import dct

from teacherstudent.alignment import mfcc
from teacherstudent.data.features import stack


@pytest.mark.parametrize("num_frames", range(1, 11))
def test_unstacking_undoes_stacking_whatever_was_repeated(num_frames: int) -> None:
    log_mel = np.random.default_rng(num_frames).standard_normal((num_frames, 64))
    assert (mfcc.unstack(stack(log_mel), num_frames) == log_mel).all()


def test_features_are_the_cosine_transform_of_each_frame_and_slopes_of_lines_fitted_over_five() -> None:
    log_mel = np.random.default_rng(0).standard_normal((30, 64))
    features = mfcc.extract(log_mel)
    cepstra = dct(log_mel, axis=1)[:, :13]
    place = np.arange(-2, 3)
    fitted = np.array([np.polyfit(place, cepstra[frame + place], 1)[0] for frame in range(2, 28)])
    for ours, known in ((features[2:28, :13], cepstra[2:28]), (features[2:28, 13:26], fitted)):
        for one, other in zip(ours.T, known.T):
            assert np.corrcoef(one, other)[0, 1] == pytest.approx(1.0)  # but for mean and scale


def test_every_feature_has_mean_0_and_variance_1_in_every_utterance() -> None:
    features = mfcc.extract(5 + 3 * np.random.default_rng(0).standard_normal((50, 64)))
    assert features.shape == (50, mfcc.NUM_FEATURES)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(features.std(axis=0), 1)


@pytest.mark.parametrize("num_frames", [1, 2, 40])
def test_digital_silence_has_finite_features(num_frames: int) -> None:
    assert (mfcc.extract(np.full((num_frames, 64), -15.9)) < 1e-6).all()
