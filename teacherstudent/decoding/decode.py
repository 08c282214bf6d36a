"""Decoding: the best paths through a graph, given a network's posteriors.

A frame's score on a senone is κ (log posterior - log prior): the posterior divided by the prior is the
likelihood up to a factor that is the same for every path (Bourlard & Morgan 1994). κ is the acoustic scale, one
over the language weight. Every word costs the word penalty more.

Two of kaldi-decoder's searches are used. The best path is FasterDecoder's, whose work max_active bounds: what is
scored, and what acoustic scale and word penalty are chosen by; each pair of them is searched anew, which is exact
where rescoring one pair's lattices would miss what was pruned, and twice as fast as making lattices. Lattices are
LatticeSimpleDecoder's, which knows no max_active: on a large graph and with a poor network keep the beam narrow.
"""
# T frames, S senones

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from teacherstudent import wheels
from teacherstudent.config import Decode
from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.lexicon import Lexicon
from teacherstudent.decoding.graph import Graph
from teacherstudent.decoding.lattice import Lattice
from teacherstudent.decoding.openfst import Arcs
from teacherstudent.decoding.word_times import WordAligner
from teacherstudent.processes import ProcessMap
from teacherstudent.tying.senones import Inventory

MIN_ACTIVE = 20  # states that stay however far behind the best they are
Utterance = tuple[str, NDArray[np.float32]]  # id, log posteriors (T, S)


class Weights(NamedTuple):
    """What acoustics and words weigh against the graph."""

    acoustic_scale: float = 1.0
    word_penalty: float = 0.0


@dataclass(frozen=True)
class Hypothesis:
    """A word sequence, and the score of its best path: scaled acoustics plus graph, natural logarithms.

    partial: no path of the whole utterance ended a sentence; these are the words of the best that did not end.
    """

    words: tuple[str, ...]
    score: float
    partial: bool = False


@dataclass(frozen=True)
class TimedWord:
    """confidence: the word's posterior in the lattice; None without lattices."""

    word: str
    start_seconds: float
    end_seconds: float
    confidence: float | None = None


@dataclass(frozen=True)
class Transcript:
    """All that is known of one utterance. nbest and lattice (its text, see lattice.py): where they were asked for."""

    best: Hypothesis
    words: tuple[TimedWord, ...]
    nbest: tuple[Hypothesis, ...] = ()
    lattice: str = ""


class Decoder:
    """Beam search over one graph; use it for utterance after utterance.

    beam: log scores behind the best that are followed further; max_active: states followed at a time;
    lattice_beam: how far behind the best a lattice's paths may be. Raises ValueError for limits that leave nothing,
    and without the wheels of teacherstudent[decode].
    """

    def __init__(
        self, graph: Graph, beam: float = 15.0, max_active: int = 7000, lattice_beam: float = 8.0
    ) -> None:
        if not beam > 0 or not lattice_beam > 0 or max_active <= MIN_ACTIVE:
            raise ValueError(
                f"decode.beam = {beam}, decode.lattice_beam = {lattice_beam}, decode.max_active = {max_active}: each "
                f"beam must be above 0, and more than {MIN_ACTIVE} states must be allowed"
            )
        self._wheel = wheels.load("kaldi_decoder", "decode")
        self._kaldifst = wheels.load("kaldifst", "decode")
        self._graph = graph
        self._best = self._wheel.FasterDecoderOptions(beam, max_active, MIN_ACTIVE)
        self._all = self._wheel.LatticeSimpleDecoderConfig(beam=beam, lattice_beam=lattice_beam)
        self._loaded: dict[float, Any] = {}  # the graph by word penalty; a search does not keep it alive

    def __call__(
        self,
        log_posteriors: ArrayLike,
        log_priors: ArrayLike,
        acoustic_scale: float,
        word_penalty: float = 0.0,
    ) -> Hypothesis:
        """log_posteriors: (T, S); log_priors: (S,); natural logarithms. T = 0 gives no words.

        Raises ValueError for other shapes and for values that are not finite.
        """
        scores = self._scores(log_posteriors, log_priors, acoustic_scale)
        if not len(scores):
            return Hypothesis((), 0.0, partial=True)
        search = self._search(word_penalty, lattices=False)
        search.decode(self._wheel.DecodableCtc(scores))
        partial = not search.reached_final()
        found, path = search.get_best_path(use_final_probs=not partial)
        if not found:
            return Hypothesis((), -np.inf, partial=True)
        linear, _, words, weight = self._kaldifst.get_linear_symbol_sequence(path)
        assert linear
        return Hypothesis(self._spell(words), -(weight.value1 + weight.value2), partial)

    def lattice(
        self,
        log_posteriors: ArrayLike,
        log_priors: ArrayLike,
        acoustic_scale: float,
        word_penalty: float = 0.0,
    ) -> Lattice | None:
        """Every path within lattice_beam of the best; None without frames, or where nothing was found.

        Costs are those of the search, as are the arguments and errors of a call.
        """
        scores = self._scores(log_posteriors, log_priors, acoustic_scale)
        if not len(scores):
            return None
        search = self._search(word_penalty, lattices=True)
        search.decode(self._wheel.DecodableCtc(scores))
        found, lattice = search.get_raw_lattice(use_final_probs=True)  # all states are final if none is
        return Lattice.of(Arcs.of(lattice)) if found else None

    def nbest(self, lattice: Lattice, n: int, partial: bool = False) -> tuple[Hypothesis, ...]:
        """The n best word sequences of a lattice, each once."""
        return tuple(Hypothesis(self._spell(path.words), -path.cost, partial) for path in lattice.nbest(n))

    def _spell(self, words: Iterable[int]) -> tuple[str, ...]:
        return tuple(self._graph.words[word - 1] for word in words)

    def _search(self, word_penalty: float, lattices: bool) -> Any:
        """A new one for every utterance: the table of states in one that was used remembers how full it was, which
        changes what is pruned among equals."""
        if word_penalty not in self._loaded:
            self._loaded[word_penalty] = self._graph.load(word_penalty)
        kind = self._wheel.LatticeSimpleDecoder if lattices else self._wheel.FasterDecoder
        return kind(self._loaded[word_penalty], self._all if lattices else self._best)

    def _scores(self, log_posteriors: ArrayLike, log_priors: ArrayLike, scale: float) -> NDArray[np.float32]:
        posteriors, priors = np.asarray(log_posteriors), np.asarray(log_priors)
        senones = self._graph.num_senones
        if posteriors.ndim != 2 or posteriors.shape[1] != senones or priors.shape != (senones,):
            raise ValueError(
                f"got log posteriors {posteriors.shape} and log priors {priors.shape}: "
                f"the graph needs (frames, {senones}) and ({senones},)"
            )
        scores = np.ascontiguousarray(scale * (posteriors - priors), dtype=np.float32)
        if not np.isfinite(scores).all():
            raise ValueError("log posteriors or log priors hold values that are not finite")
        return scores


class Recogniser:
    """A decoder in each of settings.jobs processes; a context manager.

    The processes are spawned: a script needs `if __name__ == "__main__":`. Utterances are taken as they are needed,
    and what comes out is the same whatever the number of processes. Raises ValueError, naming the utterance, for
    what cannot be decoded, and for a script without that line.
    """

    def __init__(self, graph: Graph, inventory: Inventory, lexicon: Lexicon, settings: Decode) -> None:
        wheels.load("kaldi_decoder", "decode")  # here, where the error can be understood
        self._processes = ProcessMap(settings.jobs, _Worker, graph, inventory, lexicon, settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._processes.__exit__(*error)

    def best_paths(
        self, utterances: Iterable[Utterance], weights: Sequence[Weights]
    ) -> dict[Weights, dict[str, Hypothesis]]:
        """Every utterance's hypothesis, in the order given, for each of the weights."""
        results: dict[Weights, dict[str, Hypothesis]] = {each: {} for each in weights}
        tasks = (_Task(*utterance, tuple(weights)) for utterance in utterances)
        for utterance_id, hypotheses in self._processes.map(tasks):
            for each, hypothesis in zip(weights, hypotheses):
                results[each][utterance_id] = hypothesis
        return results

    def transcripts(
        self, utterances: Iterable[Utterance], weights: Weights
    ) -> Iterator[tuple[str, Transcript]]:
        """Best path, word times and, if settings.lattices, lattice, n-best list and confidences of every utterance."""
        return self._processes.map(_Task(*utterance, weights) for utterance in utterances)


class _Task(NamedTuple):
    """Best paths for several weights, or a transcript for one."""

    utterance_id: str
    log_posteriors: NDArray[np.float32]
    weights: Weights | tuple[Weights, ...]


class _Worker:
    """What one process does: a decoder, and what all utterances share."""

    def __init__(self, graph: Graph, inventory: Inventory, lexicon: Lexicon, settings: Decode) -> None:
        self._decoder = Decoder(graph, settings.beam, settings.max_active, settings.lattice_beam)
        self._aligner = WordAligner(lexicon, inventory)
        self._log_priors = inventory.log_priors.astype(np.float32)
        self._settings = settings
        self._word_ids = {word: number for number, word in enumerate(graph.words, 1)}

    def __call__(self, task: _Task) -> tuple[str, Transcript | list[Hypothesis]]:
        name, posteriors, weights = task
        try:
            if isinstance(weights, Weights):
                return name, self._transcribe(name, posteriors, weights)
            return name, [self._decoder(posteriors, self._log_priors, *each) for each in weights]
        except ValueError as error:
            raise ValueError(f"utterance {name}: {error}") from None

    def _transcribe(self, name: str, posteriors: NDArray[np.float32], weights: Weights) -> Transcript:
        best = self._decoder(posteriors, self._log_priors, *weights)
        frames = self._aligner.word_frames(posteriors - self._log_priors, best.words, best.partial)
        confidences: Sequence[float | None] = [None] * len(best.words)
        nbest: tuple[Hypothesis, ...] = ()
        text = ""
        lattice = None
        if self._settings.lattices:
            lattice = self._decoder.lattice(posteriors, self._log_priors, *weights)
        if lattice is not None:
            confidences = lattice.confidences([self._word_ids[word] for word in best.words])
            nbest = self._decoder.nbest(lattice, self._settings.nbest, best.partial)
            scale, penalty = weights
            text = lattice.reweighted(1 / scale, -penalty).to_text(name)
        words = tuple(
            TimedWord(word, start * FRAME_SHIFT_SECONDS, end * FRAME_SHIFT_SECONDS, confidence)
            for word, (start, end), confidence in zip(best.words, frames, confidences)
        )
        return Transcript(best, words, nbest, text)
