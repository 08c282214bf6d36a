"""Decoding: the best path through a graph, given a network's posteriors.

A frame's score on a senone is κ (log posterior - log prior): the posterior divided by the prior is the
likelihood up to a factor that is the same for every path (Bourlard & Morgan 1994). κ is the acoustic scale.
"""
# T frames, S senones

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from teacherstudent import wheels
from teacherstudent.config import Decode
from teacherstudent.graph import Graph

_MIN_ACTIVE = 20  # states that stay however far behind the best they are
Utterance = tuple[str, NDArray[np.float32]]  # id, log posteriors (T, S)


@dataclass(frozen=True)
class Hypothesis:
    """The words of the best path, and its score: scaled acoustics plus graph, natural logarithms.

    partial: no path of the whole utterance ended a sentence; these are the words of the best that did not end.
    """

    words: tuple[str, ...]
    score: float
    partial: bool = False


class Decoder:
    """Beam search over one graph; use it for utterance after utterance.

    beam: log scores behind the best that are followed further; max_active: states followed at a time.
    Raises ValueError for limits that leave nothing, and without the wheels of teacherstudent[decode].
    """

    def __init__(self, graph: Graph, beam: float = 15.0, max_active: int = 7000) -> None:
        if not beam > 0 or max_active <= _MIN_ACTIVE:
            raise ValueError(
                f"decode.beam = {beam}, decode.max_active = {max_active}: the beam must be above 0, and more than "
                f"{_MIN_ACTIVE} states must be allowed"
            )
        self._wheel = wheels.load("kaldi_decoder", "decode")
        self._kaldifst = wheels.load("kaldifst", "decode")
        self._graph, self._fst = graph, graph.load()
        options = self._wheel.FasterDecoderOptions(beam, max_active, _MIN_ACTIVE)
        self._search = self._wheel.FasterDecoder(self._fst, options)

    def __call__(self, log_posteriors: ArrayLike, log_priors: ArrayLike, acoustic_scale: float) -> Hypothesis:
        """log_posteriors: (T, S); log_priors: (S,); natural logarithms. T = 0 gives no words.

        Raises ValueError for other shapes and for values that are not finite.
        """
        posteriors, priors = np.asarray(log_posteriors), np.asarray(log_priors)
        senones = self._graph.num_senones
        if posteriors.ndim != 2 or posteriors.shape[1] != senones or priors.shape != (senones,):
            raise ValueError(
                f"got log posteriors {posteriors.shape} and log priors {priors.shape}: "
                f"the graph needs (frames, {senones}) and ({senones},)"
            )
        if not len(posteriors):
            return Hypothesis((), 0.0, partial=True)
        scores = np.ascontiguousarray(acoustic_scale * (posteriors - priors), dtype=np.float32)
        if not np.isfinite(scores).all():
            raise ValueError("log posteriors or log priors hold values that are not finite")
        self._search.decode(self._wheel.DecodableCtc(scores))
        partial = not self._search.reached_final()
        found, path = self._search.get_best_path(use_final_probs=not partial)
        if not found:
            return Hypothesis((), -np.inf, partial=True)
        linear, _, words, weight = self._kaldifst.get_linear_symbol_sequence(path)
        assert linear
        score = -(weight.value1 + weight.value2)
        return Hypothesis(tuple(self._graph.words[word - 1] for word in words), score, partial)


def decode_many(
    graph: Graph,
    utterances: Iterable[Utterance],
    log_priors: ArrayLike,
    acoustic_scales: Sequence[float],
    settings: Decode,
) -> dict[float, dict[str, Hypothesis]]:
    """Decode every utterance at every acoustic scale, in settings.jobs processes.

    Utterances are taken as they are needed. Returns, for each scale, every utterance's hypothesis, in the order
    given: the same whatever the number of processes. Raises ValueError, naming the utterance, for what cannot
    be decoded. The processes are spawned: a script needs `if __name__ == "__main__":`.
    """
    results: dict[float, dict[str, Hypothesis]] = {scale: {} for scale in acoustic_scales}
    priors = np.asarray(log_priors, dtype=np.float32)
    options = (graph, priors, tuple(acoustic_scales), settings.beam, settings.max_active)
    wheels.load("kaldi_decoder", "decode")  # here, where the error can be understood
    if settings.jobs > 1:
        decoded = _in_processes(options, utterances, settings.jobs)
    else:
        decoded = map(_Worker(*options), utterances)
    for utterance_id, hypotheses in decoded:
        for scale, hypothesis in zip(acoustic_scales, hypotheses):
            results[scale][utterance_id] = hypothesis
    return results


class _Worker:
    """What one process does: a decoder, and the settings that all utterances share."""

    def __init__(
        self,
        graph: Graph,
        log_priors: NDArray[np.float32],
        scales: Sequence[float],
        beam: float,
        max_active: int,
    ) -> None:
        self._decoder = Decoder(graph, beam, max_active)
        self._log_priors, self._scales = log_priors, scales

    def __call__(self, utterance: Utterance) -> tuple[str, list[Hypothesis]]:
        name, posteriors = utterance
        try:
            return name, [self._decoder(posteriors, self._log_priors, scale) for scale in self._scales]
        except ValueError as error:
            raise ValueError(f"utterance {name}: {error}") from None


_worker: _Worker | None = None  # of this process, where it is one of decode_many's


def _start(*options: Any) -> None:
    global _worker
    _worker = _Worker(*options)


def _decode(utterance: Utterance) -> tuple[str, list[Hypothesis]]:
    assert _worker is not None
    return _worker(utterance)


def _in_processes(
    options: tuple[Any, ...], utterances: Iterable[Utterance], jobs: int
) -> Iterator[tuple[str, list[Hypothesis]]]:
    """In the order of the utterances, of which only a few are held at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=options) as pool:
        waiting: deque[Future[tuple[str, list[Hypothesis]]]] = deque()
        try:
            for utterance in utterances:
                waiting.append(pool.submit(_decode, utterance))
                if len(waiting) >= 4 * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
