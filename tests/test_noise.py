import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.synthesis.noise import KINDS, make_babble, make_coloured, make_hum, make_noise, mix

RATE = 16000
VOICES = np.random.default_rng(0).standard_normal((5, 3 * RATE)).astype(np.float32)


def power_spectrum(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and power, over the whole signal."""
    return np.fft.rfftfreq(len(samples), 1 / RATE), np.abs(np.fft.rfft(samples)) ** 2


@settings(max_examples=30, deadline=None)
@given(st.floats(-10, 60), st.integers(0, 10**6), st.floats(0.001, 1.0))
def test_the_ratio_of_speech_to_what_is_added_is_the_one_asked_for(
    snr_db: float, seed: int, level: float
) -> None:
    rng = np.random.default_rng(seed)
    speech = np.concatenate([np.zeros(2000), level * rng.standard_normal(6000), np.zeros(5000)])
    speech = speech.astype(np.float32)
    spoken = slice(2000, 8000)
    noise = rng.standard_normal(13000).astype(np.float32)
    added = mix(speech, noise, snr_db, spoken).astype(np.float64) - speech
    ratio_db = 10 * np.log10(np.mean(speech[spoken].astype(np.float64) ** 2) / np.mean(added**2))
    assert ratio_db == pytest.approx(snr_db, abs=0.05)


def test_silence_around_the_speech_does_not_change_how_loud_the_noise_is() -> None:
    rng = np.random.default_rng(1)
    speech, noise = rng.standard_normal((2, 4000)).astype(np.float32)
    alone = mix(speech, noise, 10.0, slice(0, 4000)) - speech
    padded = np.pad(speech, (4000, 4000))
    within = mix(padded, np.tile(noise, 3), 10.0, slice(4000, 8000)) - padded
    np.testing.assert_allclose(within[4000:8000], alone, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling_rate", [8000, 16000])
def test_noise_has_mean_square_one_and_follows_from_the_generator(kind, sampling_rate: int) -> None:
    first, again = (
        make_noise(kind, 20001, sampling_rate, VOICES, np.random.default_rng(3)) for _ in range(2)
    )
    other = make_noise(kind, 20001, sampling_rate, VOICES, np.random.default_rng(4))
    assert first.shape == (20001,)
    assert first.dtype == np.float32
    assert np.mean(first.astype(np.float64) ** 2) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_coloured_noise_falls_with_the_exponent_per_decade(exponent: float) -> None:
    noise = make_coloured(40 * RATE, RATE, exponent, np.random.default_rng(0))
    frequencies, power = power_spectrum(noise)
    centres = np.geomspace(50, 6000, 12)
    levels = [
        np.log10(power[(frequencies > 0.9 * hertz) & (frequencies < 1.1 * hertz)].mean()) for hertz in centres
    ]
    slope = np.polyfit(np.log10(centres), levels, 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.05)


@pytest.mark.parametrize("mains_hz", [50.0, 60.0])
def test_hum_has_nothing_but_harmonics_of_the_mains(mains_hz: float) -> None:
    for seed in range(5):
        frequencies, power = power_spectrum(
            make_hum(8 * RATE, RATE, mains_hz, np.random.default_rng(seed)) * np.hanning(8 * RATE)
        )
        lowest = frequencies[np.argmax(power * ((frequencies > 40) & (frequencies < 70)))]
        assert lowest == pytest.approx(mains_hz, rel=0.015)
        turns = frequencies / lowest
        between = (np.abs(turns - np.round(turns)) > 0.25) | (frequencies > 1600)
        assert power[between].sum() < 1e-4 * power.sum()


def test_babble_is_a_sum_of_at_least_three_of_the_voices() -> None:
    num_samples = VOICES.shape[1]
    for seed in range(5):
        babble = make_babble(num_samples, VOICES, np.random.default_rng(seed))
        spectrum = np.fft.rfft(babble)
        shares = []
        for voice in VOICES:  # white voices: a circular cross-correlation finds each where it was placed
            likeness = np.fft.irfft(spectrum * np.conj(np.fft.rfft(voice))) / num_samples
            shares.append(np.abs(likeness).max())
        present = np.array(shares) > 0.1
        assert present.sum() >= 3
        assert np.sum(np.square(np.array(shares)[present])) == pytest.approx(1, abs=0.1)


def test_babble_is_refused_from_too_few_voices() -> None:
    with pytest.raises(AssertionError, match="2 voices"):
        make_babble(100, VOICES[:2], np.random.default_rng(0))
