"""Word error rates, their confidence intervals, and the comparison of two systems.

Intervals are percentiles of the bootstrap (Bisani & Ney 2004, "Bootstrap estimates for confidence intervals in
ASR performance evaluation"): draw as many blocks as there are, with replacement, and score what was drawn. A
block is an utterance, or all utterances of a speaker. The errors of one speaker's utterances go together, so an
interval over utterances speaks of more sentences from these speakers; only one over speakers speaks of other
speakers. With fewer than about ten speakers the latter is itself rough, and too narrow by about (n - 1) / n in
variance: give both.

Two systems are compared on the same draws, and by the matched-pairs test (Gillick & Cox 1989, "Some statistical
issues in the comparison of speech recognition algorithms"): the mean difference of a block's errors over its
standard error. Blocks stand for their segments. Theirs is standard normal if the systems are as good, which is far off
for few blocks (two that agree would be certain), so the p-value is exact: if the systems are as good, every block's
difference is as likely with the other sign, and it is the share of all ways of setting the signs that give as large a
mean difference (Fisher's randomisation test). For many blocks both say the same.
"""
# N utterances, G blocks, R bootstrap samples

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacherstudent import wheels

CONFIDENCE = 0.95
Words = Sequence[str]


@dataclass(frozen=True)
class Score:
    """Word errors of some utterances; rates are shares of the reference words; low, high: of the rate, 95 %."""

    words: int
    substitutions: int
    insertions: int
    deletions: int
    word_error_rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How much better one system is than a baseline, on the same utterances.

    relative_reduction: 1 - errors / baseline's errors; low, high: 95 % interval of it; probability_better:
    share of bootstrap samples in which the system makes fewer errors than the baseline; p_value: of the bootstrap,
    both sides: twice the share of samples in which the worse of the two is not the worse; matched_pairs: the
    statistic, positive where the system makes fewer errors (infinite where all blocks differ by as much), and
    matched_pairs_p_value of both sides; 0 and 1 where no block differs.
    """

    relative_reduction: float
    low: float
    high: float
    probability_better: float
    p_value: float
    matched_pairs: float
    matched_pairs_p_value: float


def count_errors(references: Sequence[Words], hypotheses: Sequence[Words]) -> NDArray[np.int64]:
    """(N, 4): reference words, substitutions, insertions, deletions of each utterance.

    Raises ValueError for other numbers of hypotheses than of references, and without the kaldialign wheel.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"got {len(hypotheses)} hypotheses for {len(references)} references")
    kaldialign = wheels.load("kaldialign", "decode")
    rows = []
    for reference, hypothesis in zip(references, hypotheses):
        found = kaldialign.edit_distance(list(reference), list(hypothesis))
        rows.append((len(reference), found["sub"], found["ins"], found["del"]))
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def score(
    references: Sequence[Words],
    hypotheses: Sequence[Words],
    blocks: Sequence[Hashable] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Score:
    """The word error rate over all utterances, with its interval.

    blocks: of each utterance, for instance its speaker; by default every utterance is its own. Raises
    ValueError when there are no reference words.
    """
    counts = _block_sums(count_errors(references, hypotheses), blocks)
    words, substitutions, insertions, deletions = counts.sum(axis=0).tolist()
    if not words:
        raise ValueError("there are no reference words, so no word error rate: are the transcripts empty?")
    drawn = _drawn(len(counts), samples, seed) @ counts
    rates = drawn[:, 1:].sum(axis=1) / np.maximum(drawn[:, 0], 1)
    low, high = _interval(rates)
    rate = (substitutions + insertions + deletions) / words
    return Score(words, substitutions, insertions, deletions, rate, low, high)


def compare(
    references: Sequence[Words],
    baseline: Sequence[Words],
    hypotheses: Sequence[Words],
    blocks: Sequence[Hashable] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """The relative reduction of word errors, paired: both systems are scored on the same drawn utterances."""
    sums = [
        _block_sums(count_errors(references, words), blocks)[:, 1:].sum(axis=1)
        for words in (baseline, hypotheses)
    ]
    pairs = np.stack(sums, axis=1)  # (G, 2)
    drawn = _drawn(len(pairs), samples, seed) @ pairs
    low, high = _interval(_reduction(drawn))
    value = float(_reduction(pairs.sum(axis=0, keepdims=True))[0])
    fewer, more = int((drawn[:, 1] < drawn[:, 0]).sum()), int((drawn[:, 1] > drawn[:, 0]).sum())
    p_value = min(1.0, 2 * (1 + samples - max(fewer, more)) / (1 + samples))  # never 0: so few were drawn
    statistic, matched_p_value = _matched_pairs(pairs[:, 0] - pairs[:, 1])
    return Comparison(value, low, high, fewer / samples, p_value, statistic, matched_p_value)


def _matched_pairs(differences: NDArray[np.int64]) -> tuple[float, float]:
    """(statistic, p-value of both sides). differences: (G,)"""
    mean = float(differences.mean())
    if len(differences) < 2 or not differences.any():  # nothing to tell chance from
        return 0.0, 1.0
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    statistic = mean / error if error else math.copysign(math.inf, mean)
    return statistic, _sign_flip_p_value(differences)


def _sign_flip_p_value(differences: NDArray[np.int64]) -> float:
    """The share of all ways of setting the signs whose sum is as far from 0. differences: (G,), not all 0.

    The distribution of the sum is the convolution of G coins, a product in the Fourier domain: d or -d has cos(d t).
    """
    sizes, times = np.unique(np.abs(differences), return_counts=True)
    reach, observed = int(sizes @ times), abs(int(differences.sum()))
    angles = 2 * np.pi * np.arange(2 * reach + 1) / (2 * reach + 1)
    spectrum = np.ones_like(angles)
    for size, count in zip(sizes, times):
        spectrum *= np.cos(size * angles) ** count
    chances = np.fft.ifft(spectrum).real  # of the sums 0, …, reach, -reach, …, -1
    least = 2.0 ** (1 - np.count_nonzero(differences))  # all signs alike; rounding may leave less
    return float(np.clip(chances[observed : len(chances) - observed + 1].sum(), least, 1.0))


def _reduction(errors: NDArray[np.int64]) -> NDArray[np.float64]:
    """errors: (R, 2) of baseline and system. A baseline without errors cannot be improved: 0, or -inf."""
    before, after = errors.T
    without = np.where(after > 0, -np.inf, 0.0)
    return np.where(before > 0, 1 - after / np.maximum(before, 1), without)


def _block_sums(counts: NDArray[np.int64], blocks: Sequence[Hashable] | None) -> NDArray[np.int64]:
    """(N, …) -> (G, …), in order of first appearance."""
    if blocks is None:
        return counts
    if len(blocks) != len(counts):
        raise ValueError(f"got {len(blocks)} blocks for {len(counts)} utterances")
    numbers: dict[Any, int] = {}
    index = [numbers.setdefault(block, len(numbers)) for block in blocks]
    sums = np.zeros((len(numbers), *counts.shape[1:]), dtype=np.int64)
    np.add.at(sums, index, counts)
    return sums


def _drawn(num_blocks: int, samples: int, seed: int) -> NDArray[np.int64]:
    """(R, G): how often each sample holds each block. Two systems with as many blocks get the same draws."""
    generator = np.random.default_rng([seed, _BOOTSTRAP])
    return generator.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=samples)


_BOOTSTRAP = 0x626F6F74  # "boot": a stream of its own


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")  # an element: -inf is one too
    return float(low), float(high)
