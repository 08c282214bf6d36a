"""Made noise of three kinds, and its mixture with speech at a given ratio.

Every noise has mean square 1. Randomness comes from the generator that is given.

# N samples, V voices, M samples of a voice
"""

from typing import Literal, get_args

import numpy as np

Kind = Literal["babble", "coloured", "hum"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_EXPONENT = 2.0  # white noise has 0, pink 1, brown 2
MIN_VOICES = 3  # in babble, so that no single talker stands out
LOWEST_HZ = 20.0  # below it coloured noise is flat: a brown one would hold little else than drift
MAINS_HZ = (50.0, 60.0)
HIGHEST_HZ = 1500.0  # of the harmonics


def make_noise(
    kind: Kind, num_samples: int, sampling_rate: int, voices: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(N,) float32 of mean square 1. voices: (V, M) speech of background speakers."""
    if kind == "babble":
        return make_babble(num_samples, voices, rng)
    if kind == "coloured":
        return make_coloured(num_samples, sampling_rate, float(rng.uniform(0.0, MAX_EXPONENT)), rng)
    assert kind == "hum", kind
    return make_hum(num_samples, sampling_rate, float(rng.choice(MAINS_HZ)), rng)


def make_babble(num_samples: int, voices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Several of the voices at once, each from a random place and at a random level within 6 dB."""
    num_voices, length = voices.shape
    assert num_voices >= MIN_VOICES, f"{num_voices} voices make no babble"
    chosen = rng.permutation(num_voices)[: rng.integers(MIN_VOICES, num_voices + 1)]
    babble = np.zeros(num_samples, np.float32)
    for voice in chosen:
        places = (int(rng.integers(length)) + np.arange(num_samples)) % length
        babble += np.float32(decibels_to_gain(rng.uniform(-6.0, 0.0))) * voices[voice, places]
    return _normalise(babble)


def make_coloured(
    num_samples: int, sampling_rate: int, exponent: float, rng: np.random.Generator
) -> np.ndarray:
    """Gaussian noise with a power spectrum of 1 / frequency^exponent above LOWEST_HZ."""
    length = 1 << (num_samples - 1).bit_length()  # a power of two: some other lengths take many times as long
    frequencies = np.fft.rfftfreq(length, 1 / sampling_rate)
    spectrum = rng.standard_normal((2, len(frequencies)))
    shaped = (spectrum[0] + 1j * spectrum[1]) * np.maximum(frequencies, LOWEST_HZ) ** (-exponent / 2)
    shaped[0] = 0.0
    return _normalise(np.fft.irfft(shaped, length)[:num_samples])


def make_hum(num_samples: int, sampling_rate: int, mains_hz: float, rng: np.random.Generator) -> np.ndarray:
    """Mains hum: the mains frequency, up to 1 % off, and its harmonics below HIGHEST_HZ, the weaker the higher."""
    fundamental = mains_hz * rng.uniform(0.99, 1.01)
    numbers = np.arange(1, int(HIGHEST_HZ / fundamental) + 1)
    amplitudes = rng.uniform(0.1, 1.0, len(numbers)) * numbers ** -rng.uniform(0.5, 1.5)
    phasors = amplitudes * np.exp(1j * rng.uniform(0.0, 2 * np.pi, len(numbers)))
    # Horner's rule over powers of one turning phasor: a sine for every harmonic would take ten times as long.
    turn = np.exp(2j * np.pi * fundamental / sampling_rate * np.arange(num_samples)).astype(np.complex64)
    hum = np.zeros(num_samples, np.complex64)
    for phasor in phasors[::-1]:
        hum += np.complex64(phasor)
        hum *= turn
    return _normalise(hum.imag)


def mix(speech: np.ndarray, noise: np.ndarray, snr_db: float, spoken: slice) -> np.ndarray:
    """(N,) speech with noise added, `snr_db` below it.

    The power of the speech is that of its `spoken` samples, the power of the noise that of all of its samples:
    silence before and after an utterance does not change how loud the noise is.
    """
    assert speech.shape == noise.shape, (speech.shape, noise.shape)
    ratio = mean_square(speech[spoken]) / mean_square(noise)
    return speech + np.float32(np.sqrt(ratio) * decibels_to_gain(-snr_db)) * noise


def mean_square(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))


def decibels_to_gain(decibels: float) -> float:
    return float(10.0 ** (decibels / 20))


def _normalise(samples: np.ndarray) -> np.ndarray:
    power = mean_square(samples)
    assert power > 0, "noise of no power"
    return (samples / np.sqrt(power)).astype(np.float32)
