"""Three frames of 10 ms make one of 30 ms, and nothing of the audio is dropped."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import Fbank, FbankConfig

from teacherstudent.data.features import Moments, Normalisation, num_stacked_frames, stack

torch.set_num_threads(1)


def random_features(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-4, 3, shape).astype(np.float32)


def test_four_frames_make_two_and_the_last_is_repeated() -> None:
    stacked = stack(np.array([[1, 2], [3, 4], [5, 6], [7, 8]]))
    assert stacked.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 7, 8, 7, 8]]


@pytest.mark.parametrize("num_frames, expected", list(enumerate([0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4])))
def test_the_number_of_frames_is_a_third_rounded_up(num_frames: int, expected: int) -> None:
    assert stack(np.zeros((num_frames, 64), np.float32)).shape == (expected, 192)


@settings(max_examples=40, deadline=None)
@given(num_frames=st.integers(1, 50), num_mels=st.integers(1, 4), by=st.integers(1, 5))
def test_every_frame_is_found_in_its_place_and_nothing_else(num_frames: int, num_mels: int, by: int) -> None:
    log_mel = random_features(num_frames, num_mels, seed=num_frames)
    stacked = stack(log_mel, by)
    assert stacked.shape == (math.ceil(num_frames / by), by * num_mels)
    assert stacked.dtype == log_mel.dtype
    for row in range(len(stacked)):
        for place in range(by):
            frame = log_mel[min(row * by + place, num_frames - 1)]
            assert (stacked[row, place * num_mels : (place + 1) * num_mels] == frame).all()


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # lhotse's
@settings(max_examples=30, deadline=None)
@given(num_samples=st.integers(200, 20_000), sampling_rate=st.sampled_from([8000, 16000]))
def test_audio_of_any_duration_gives_a_frame_for_every_30_ms_begun(
    num_samples: int, sampling_rate: int
) -> None:
    extractor = Fbank(FbankConfig(sampling_rate=sampling_rate, num_filters=8))
    audio = random_features(1, num_samples) / 100
    log_mel = extractor.extract(audio, sampling_rate)
    hop = sampling_rate // 100
    t10 = (num_samples + hop // 2) // hop  # round(duration / 10 ms), halves up
    assert len(log_mel) == t10
    assert len(stack(log_mel)) == math.ceil(t10 / 3) == num_stacked_frames(num_samples, sampling_rate)


@pytest.mark.parametrize("t10", range(1, 11))
@pytest.mark.parametrize("beyond", [-80, -1, 0, 1, 79])
def test_one_to_ten_frames_of_10_ms_make_a_third_as_many_rounded_up(t10: int, beyond: int) -> None:
    num_samples = 160 * t10 + beyond
    if num_samples >= 160:
        log_mel = Fbank(FbankConfig(num_filters=8)).extract(random_features(1, num_samples) / 100, 16000)
        assert len(log_mel) == t10
        assert (
            num_stacked_frames(num_samples, 16000)
            == len(stack(log_mel))
            == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4][t10]
        )


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any))
def test_moments_of_parts_add_up_to_the_mean_and_deviation_of_the_whole(sizes: list[int]) -> None:
    parts = [random_features(size, 3, seed=index) for index, size in enumerate(sizes)]
    whole = np.concatenate(parts).astype(np.float64)
    normalisation = Normalisation.from_moments(Moments.add(Moments.of(part) for part in parts))
    np.testing.assert_allclose(normalisation.mean, whole.mean(axis=0), rtol=1e-6, atol=1e-6)
    deviation = np.maximum(whole.std(axis=0), 0.01)
    np.testing.assert_allclose(normalisation.deviation, deviation, rtol=1e-5, atol=1e-6)


def test_half_precision_features_are_summed_in_double() -> None:
    features = np.full((100_000, 1), 60.5, np.float16)  # its sum of squares is beyond float16
    features[::2] = 61.5
    normalisation = Normalisation.from_moments(Moments.of(features))
    assert normalisation.mean == [61.0]
    assert normalisation.deviation == pytest.approx(0.5)


def test_a_value_that_never_changes_has_a_deviation_to_divide_by() -> None:
    normalisation = Normalisation.from_moments(Moments.of(np.full((10, 2), -3.1, np.float32)))
    assert normalisation.deviation.tolist() == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("parts", [[], [np.zeros((0, 4), np.float32)]])
def test_no_frames_at_all_are_refused(parts: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="no frames"):
        Moments.add(Moments.of(part) for part in parts)


def test_a_normalisation_comes_back_from_json_with_the_same_bits() -> None:
    normalisation = Normalisation.from_moments(Moments.of(random_features(31, 192)))
    again = Normalisation.from_dict(json.loads(json.dumps(normalisation.as_dict())))
    for name in ("mean", "deviation"):
        before, after = getattr(normalisation, name), getattr(again, name)
        assert after.dtype == before.dtype == np.float32
        assert (after == before).all()
