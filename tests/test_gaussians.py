"""Mixtures are fitted as expectation-maximisation promises, and splitting loses nothing."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.alignment.gaussians import (
    FRAMES_A_COMPONENT,
    MIN_COUNT,
    VARIANCE_FLOOR,
    Mixtures,
    sum_by_pdf,
)

D = 3


def draw(seed: int, num_frames: int = 1500, num_pdfs: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) of pdfs (N,), each pdf with two or three bumps of its own; some pdfs may have no frame."""
    rng = np.random.default_rng(seed)
    pdfs = rng.integers(num_pdfs, size=num_frames)
    bumps = 3 * rng.standard_normal((num_pdfs, 3, D))
    features = bumps[pdfs, rng.integers(3, size=num_frames)] + rng.standard_normal((num_frames, D))
    return features, pdfs


def fit(seed: int, target: int) -> tuple[Mixtures, np.ndarray, np.ndarray]:
    features, pdfs = draw(seed)
    start = Mixtures.from_moments(sum_by_pdf(features, pdfs, 3))
    moments, _ = start.accumulate(features, pdfs)
    return start.split(target, moments, np.random.default_rng(seed)), features, pdfs


def density(mixtures: Mixtures, pdf: int, frame: np.ndarray) -> float:
    """By the textbook's formula, term by term."""
    total = 0.0
    for row in range(mixtures.starts[pdf], mixtures.starts[pdf + 1]):
        term = mixtures.weights[row]
        for value, mean, variance in zip(frame, mixtures.means[row], mixtures.variances[row]):
            term *= np.exp(-0.5 * (value - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
        total += term
    return total


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12))
def test_with_fixed_alignments_the_likelihood_never_decreases(seed: int, target: int) -> None:
    mixtures, features, pdfs = fit(seed, target)
    before = -np.inf
    for _ in range(6):
        moments, log_likelihood = mixtures.accumulate(features, pdfs)
        assert log_likelihood >= before - 1e-6 * abs(log_likelihood)
        before, mixtures = log_likelihood, mixtures.updated(moments)
        assert mixtures.variances.min() >= VARIANCE_FLOOR


def test_likelihoods_and_expected_counts_are_those_of_the_formula() -> None:
    mixtures, features, pdfs = fit(1, 6)
    assert mixtures.num_components == 6
    few, theirs = features[:40], pdfs[:40]
    moments, log_likelihood = mixtures.accumulate(few, theirs)
    expected = np.zeros((6, 1 + 2 * D))
    for frame, pdf in zip(few, theirs):
        whole = density(mixtures, pdf, frame)
        for row in range(mixtures.starts[pdf], mixtures.starts[pdf + 1]):
            alone = Mixtures(
                np.array([0, 1]), mixtures.weights[row : row + 1], mixtures.means[row : row + 1],
                mixtures.variances[row : row + 1],
            )  # fmt: skip
            expected[row] += density(alone, 0, frame) / whole * np.concatenate([[1.0], frame, frame**2])
    np.testing.assert_allclose(moments, expected, rtol=1e-9)
    total = sum(np.log(density(mixtures, pdf, frame)) for frame, pdf in zip(few, theirs))
    assert log_likelihood == pytest.approx(total)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 40))
def test_splitting_keeps_weight_and_mean_of_every_pdf(seed: int, target: int) -> None:
    features, pdfs = draw(seed, num_frames=2500)
    before = Mixtures.from_moments(sum_by_pdf(features, pdfs, 3))
    moments, _ = before.accumulate(features, pdfs)
    after = before.split(target, moments, np.random.default_rng(seed))
    most = np.bincount(pdfs, minlength=3) // FRAMES_A_COMPONENT
    assert after.num_components <= max(target, 3)
    assert (np.diff(after.starts) <= np.maximum(most, 1)).all()
    for pdf in range(3):
        old, new = (slice(*mixtures.starts[pdf : pdf + 2]) for mixtures in (before, after))
        assert after.weights[new].sum() == pytest.approx(1.0)
        np.testing.assert_allclose(
            after.weights[new] @ after.means[new], before.weights[old] @ before.means[old], atol=1e-9
        )


def test_the_target_is_reached_when_there_are_frames_enough() -> None:
    features, pdfs = draw(3, num_frames=5000)
    before = Mixtures.from_moments(sum_by_pdf(features, pdfs, 3))
    after = before.split(21, before.accumulate(features, pdfs)[0], np.random.default_rng(0))
    assert 19 <= after.num_components <= 21


def test_the_same_seed_splits_the_same_way_and_another_one_does_not() -> None:
    one, again, other = (fit(5, 6)[0], fit(5, 6)[0], None)
    features, pdfs = draw(5)
    start = Mixtures.from_moments(sum_by_pdf(features, pdfs, 3))
    other = start.split(6, start.accumulate(features, pdfs)[0], np.random.default_rng(99))
    assert (one.means == again.means).all()
    assert (one.means != other.means).any()


def test_one_component_is_the_sample_mean_and_variance() -> None:
    features, pdfs = draw(2)
    mixtures = Mixtures.from_moments(sum_by_pdf(features, pdfs, 3))
    for pdf in range(3):
        np.testing.assert_allclose(mixtures.means[pdf], features[pdfs == pdf].mean(axis=0))
        np.testing.assert_allclose(mixtures.variances[pdf], features[pdfs == pdf].var(axis=0))


def test_a_pdf_with_few_frames_or_none_starts_as_all_speech_and_stays_finite() -> None:
    features, pdfs = draw(2)
    pdfs = np.where(pdfs == 1, 0, pdfs)
    pdfs[: int(MIN_COUNT) - 1] = 3
    mixtures = Mixtures.from_moments(sum_by_pdf(features, pdfs, 4))
    for pdf in (1, 3):
        np.testing.assert_allclose(mixtures.means[pdf], features.mean(axis=0))
    updated = mixtures.updated(mixtures.accumulate(features, pdfs)[0])
    assert np.isfinite(updated.means).all()
    assert (updated.means[1] == mixtures.means[1]).all()
    assert updated.weights.tolist() == [1.0] * 4


def test_a_file_holds_the_mixtures_and_nothing_of_when_it_was_written(tmp_path: Path) -> None:
    mixtures, features, pdfs = fit(4, 6)
    for name in ("one.npz", "two.npz"):
        mixtures.save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = Mixtures.load(tmp_path / "one.npz")
    assert loaded.accumulate(features, pdfs)[1] == mixtures.accumulate(features, pdfs)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]
