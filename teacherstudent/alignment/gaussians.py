"""Gaussian mixtures with diagonal covariance: one for each pdf, fitted by expectation-maximisation.

All arithmetic is in float64 and without threads, so that the same frames give the same bits on any number of
cores. Components are split here and not by the wheel, whose splitting takes its randomness from the machine.
"""
# N frames, D features, P pdfs, G components of all pdfs, M = 1 + 2 D moments (count, sums, sums of squares)

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

VARIANCE_FLOOR = 0.01  # features have variance 1 over an utterance
MIN_COUNT = 10.0  # frames that a component must have seen for its mean and variance to follow them
FRAMES_A_COMPONENT = (
    100  # that a pdf must have for each: with 20, unheard speakers in noise were aligned worse
)
_SPLIT_DEVIATIONS = 0.2  # how far the halves of a component move apart, either way
_SPLIT_POWER = (
    0.25  # a pdf's share of the components grows as this power of its frames, as in Kaldi's recipes
)
_CHUNK_FRAMES = 2000  # in which posteriors are computed


@dataclass(frozen=True, eq=False)
class Mixtures:
    """The components of pdf p are rows starts[p] to starts[p + 1]; its weights sum to one."""

    starts: Integers  # (P + 1,)
    weights: Floats  # (G,)
    means: Floats  # (G, D)
    variances: Floats  # (G, D)

    @property
    def num_pdfs(self) -> int:
        return len(self.starts) - 1

    @property
    def num_components(self) -> int:
        return len(self.weights)

    @cached_property
    def pdf_of(self) -> Integers:
        """(G,) of every component."""
        return np.repeat(np.arange(self.num_pdfs), np.diff(self.starts))

    @classmethod
    def from_moments(cls, moments: Floats) -> "Mixtures":
        """One component a pdf; moments: (P, M). A pdf with fewer than MIN_COUNT frames has those of all frames."""
        dimensions = moments.shape[1] // 2
        moments = np.where(moments[:, :1] < MIN_COUNT, moments.sum(axis=0), moments)
        mean, variance = _fit(moments, dimensions)
        return cls(np.arange(len(moments) + 1), np.ones(len(moments)), mean, variance)

    def log_likelihoods(self, features: Floats, pdf: int) -> Floats:
        """Of frames (N, D) under each weighted component of a pdf: (N, components)."""
        rows = slice(*self.starts[pdf : pdf + 2])
        means, variances = self.means[rows], self.variances[rows]
        distances = np.einsum("nkd,kd->nk", (features[:, None] - means) ** 2, 1 / variances)
        constants = np.log(self.weights[rows]) - 0.5 * np.log(2 * np.pi * variances).sum(axis=1)
        return constants - 0.5 * distances

    def accumulate(self, features: Floats, pdfs: Integers) -> tuple[Floats, float]:
        """Expected moments (G, M) of all components, and the log-likelihood, of frames (N, D) of pdfs (N,)."""
        moments = np.zeros((self.num_components, 1 + 2 * self.means.shape[1]))
        total = 0.0
        for pdf, frames in _by_pdf(pdfs):
            values = features[frames]
            scores = self.log_likelihoods(values, pdf)
            highest = scores.max(axis=1, keepdims=True)
            likelihoods = np.exp(scores - highest)
            sums = likelihoods.sum(axis=1, keepdims=True)
            total += float((np.log(sums) + highest).sum())
            one = np.concatenate([np.ones((len(values), 1)), values, values**2], axis=1)
            rows = slice(*self.starts[pdf : pdf + 2])
            moments[rows] += np.einsum("nk,nm->km", likelihoods / sums, one)
        return moments, total

    def updated(self, moments: Floats) -> "Mixtures":
        """The most likely mixtures for expected moments (G, M) (Dempster, Laird & Rubin 1977).

        Components that hardly a frame belongs to keep mean and variance, pdfs without frames all they have.
        """
        counts = moments[:, 0]
        totals = np.add.reduceat(counts, self.starts[:-1])[self.pdf_of]
        weights = np.where(totals > 0, counts / np.maximum(totals, 1e-300), self.weights)
        weights = np.maximum(weights, 1e-8)
        weights = weights / np.add.reduceat(weights, self.starts[:-1])[self.pdf_of]
        mean, variance = _fit(moments, self.means.shape[1])
        seen = counts[:, None] >= MIN_COUNT
        means, variances = np.where(seen, mean, self.means), np.where(seen, variance, self.variances)
        return Mixtures(self.starts, weights, means, variances)

    def split(self, target: int, moments: Floats, rng: np.random.Generator) -> "Mixtures":
        """Halve components, the heaviest of a pdf first, until there are `target` or too few frames for more.

        moments: (G, M) as accumulated. The halves move apart by 0.2 standard deviations in every feature, with
        random signs; weight and mean of their sum stay. Pdfs share the components as Kaldi's do: in proportion
        to a power of their frames.
        """
        frames = np.add.reduceat(moments[:, 0], self.starts[:-1])
        wanted = _share_components(target, frames, np.diff(self.starts))
        parts = [self._split_pdf(pdf, int(size), rng) for pdf, size in enumerate(wanted)]
        starts = np.concatenate([[0], np.cumsum(wanted)])
        weights, means, variances = (np.concatenate(arrays) for arrays in zip(*parts))
        return Mixtures(starts, weights, means, variances)

    def _split_pdf(self, pdf: int, size: int, rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
        rows = slice(*self.starts[pdf : pdf + 2])
        weights, means = list(self.weights[rows]), list(self.means[rows])
        variances = list(self.variances[rows])
        while len(weights) < size:
            heaviest = int(np.argmax(weights))
            weights[heaviest] /= 2
            signs = rng.choice([-1.0, 1.0], size=self.means.shape[1])
            step = _SPLIT_DEVIATIONS * np.sqrt(variances[heaviest]) * signs
            weights.append(weights[heaviest])
            means.append(means[heaviest] - step)
            means[heaviest] = means[heaviest] + step
            variances.append(variances[heaviest])
        return np.array(weights), np.array(means), np.array(variances)

    def save(self, path: Path) -> None:
        """As .npz whose bytes depend on the contents alone."""
        temporary = path.with_name(f".{path.name}")
        with temporary.open("wb") as file:
            np.savez(
                file, starts=self.starts, weights=self.weights, means=self.means, variances=self.variances
            )
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Mixtures":
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in ("starts", "weights", "means", "variances")})


def sum_by_pdf(features: Floats, pdfs: Integers, num_pdfs: int) -> Floats:
    """Moments (P, M) of frames (N, D) of pdfs (N,)."""
    moments = np.zeros((num_pdfs, 1 + 2 * features.shape[1]))
    for pdf, frames in _by_pdf(pdfs):
        values = features[frames]
        moments[pdf, 0] += len(values)
        moments[pdf, 1:] += np.concatenate([values.sum(axis=0), (values**2).sum(axis=0)])
    return moments


def _by_pdf(pdfs: Integers) -> Iterator[tuple[int, Integers]]:
    """Every pdf with its frames, at most so many at a time."""
    order = np.argsort(pdfs, kind="stable")
    found, starts = np.unique(pdfs[order], return_index=True)
    for pdf, frames in zip(found, np.split(order, starts[1:])):
        for start in range(0, len(frames), _CHUNK_FRAMES):
            yield int(pdf), frames[start : start + _CHUNK_FRAMES]


def _fit(moments: Floats, dimensions: int) -> tuple[Floats, Floats]:
    """Means and variances of moments (…, M); the variances are floored."""
    divisor = np.maximum(moments[..., :1], 1e-300)
    mean = moments[..., 1 : 1 + dimensions] / divisor
    variance = moments[..., 1 + dimensions :] / divisor - mean**2
    return mean, np.maximum(variance, VARIANCE_FLOOR)


def _share_components(target: int, frames: Floats, present: Integers) -> Integers:
    """How many components each pdf gets: (P,), at least those present, at most one for FRAMES_A_COMPONENT."""
    most = np.maximum(present, (frames / FRAMES_A_COMPONENT).astype(np.int64))
    shares = np.maximum(frames, 1e-10) ** _SPLIT_POWER
    low, high = 0.0, target / shares.min()
    for _ in range(60):  # the scale at which they sum to the target
        middle = (low + high) / 2
        sizes = np.clip((shares * middle).astype(np.int64), present, most)
        low, high = (middle, high) if sizes.sum() <= target else (low, middle)
    return np.clip((shares * low).astype(np.int64), present, most)
