"""Transcripts as graphs of hidden Markov states, and the best path of an utterance's frames through its graph.

Graphs are made and searched by kaldi-hmm-gmm: the transcript composed with the lexicon (every pronunciation,
silence or none between words), phones in context, and states. Source: Kaldi's compile-train-graphs and gmm-align.
"""
# T frames of 10 ms, D features

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacherstudent import wheels
from teacherstudent.alignment.alignments import AlignmentError
from teacherstudent.alignment.gaussians import Mixtures
from teacherstudent.alignment.tied_states import SILENCE_ID, TiedStates, find_bases, num_states
from teacherstudent.data.lexicon import SILENCE, Lexicon

SILENCE_PROBABILITY = 0.5  # that silence stands before the first word, between two, or after the last
ACOUSTIC_SCALE = 0.1  # this and the next two: what Kaldi's recipes align with
_TRANSITION_SCALE, _SELF_LOOP_SCALE = 1.0, 0.1
_RETRY_FACTOR = 10.0  # how much wider the beam is when nothing was found
_EQUAL_ALIGN_TRIES = 100  # of random ways, some of which are too long for the audio

Integers = NDArray[np.int64]


def topology_text(num_phones: int, states: int) -> str:
    """Kaldi's topology of phones 1 … num_phones, silence first: from left to right, each state a frame or more.

    Staying and going on are as likely, so that durations weigh next to nothing.
    """
    lines = ["<Topology>"]
    for phones in ((SILENCE_ID,), range(SILENCE_ID + 1, num_phones + 1)):
        if phones:
            lines += ["<TopologyEntry>", f"<ForPhones> {' '.join(map(str, phones))} </ForPhones>"]
            last = num_states(phones[0], states)
            for state in range(last):
                lines.append(f"<State> {state} <PdfClass> {state}")
                lines.append(f"<Transition> {state} 0.5 <Transition> {state + 1} 0.5 </State>")
            lines += [f"<State> {last} </State>", "</TopologyEntry>"]
    return "\n".join([*lines, "</Topology>", ""])


@dataclass(frozen=True)
class StatePath:
    """One way through a graph: the pdf of every frame, and the phones with their first frames."""

    pdfs: Integers  # (T,)
    phones: Integers  # (N,) ids from 1
    starts: Integers  # (N,)


class TrainingGraphs:
    """Phones as hidden Markov models whose states are tied, and the graphs of transcripts in them.

    phones: names, silence first. Raises ValueError without the wheels of teacherstudent[decode].
    """

    def __init__(
        self, phones: Sequence[str], states: int, tied: TiedStates, lexicon: Lexicon, unknown_word: str = ""
    ) -> None:
        self._khg = wheels.load("kaldi_hmm_gmm", "decode")
        self._fst = wheels.load("kaldifst", "decode")
        self.phones = tuple(phones)
        assert self.phones[0] == SILENCE
        self.bases = find_bases(phones)
        topology = self._khg.HmmTopology()
        topology.read(topology_text(len(phones), states))
        tree = self._khg.ContextDependency.__new__(self._khg.ContextDependency)
        contents = tied.to_kaldi(self.bases).binary(header=False)
        tree.__setstate__((np.frombuffer(contents, np.int8).tolist(),))
        self._transitions = self._khg.TransitionModel(tree, topology)
        self._tree = tree  # the compiler does not keep it alive
        self._states = states
        self._lexicon, self._unknown_word = lexicon, unknown_word
        self._words = {word: index for index, word in enumerate(lexicon.words, 1)}
        self._folded = {word.casefold(): word for word in lexicon.words}
        self._compiler = self._khg.TrainingGraphCompiler(
            trans_model=self._transitions,
            ctx_dep=tree,
            lex_fst=_lexicon_fst(self._fst, lexicon, self.phones),
            disambig_syms=[],
            opts=self._khg.TrainingGraphCompilerOptions(_TRANSITION_SCALE, _SELF_LOOP_SCALE, False),
        )
        # Of every transition; without reordering the last one of a phone is the one that leaves it.
        numbers = range(1, self._transitions.num_transition_ids + 1)
        self._pdfs = np.array(self._transitions.transition_id_to_pdf_array(), dtype=np.int64)
        self._phones = np.array([0, *map(self._transitions.transition_id_to_phone, numbers)], dtype=np.int64)
        self._leaves = np.array([False, *map(self._transitions.is_final, numbers)])

    def compile(self, text: str, num_frames: int) -> Any:
        """The graph of a transcript.

        Raises AlignmentError for an empty transcript, a word that is not in the lexicon when no word stands for it,
        and an utterance of fewer frames than its phones need.
        """
        words = [word if word in self._words else self._unknown_word or word for word in text.split()]
        if not words:
            raise AlignmentError("the transcript is empty")
        for word in words:
            if word not in self._words:
                other = self._folded.get(word.casefold())
                hint = f", but {other!r} is: upper and lower case differ" if other else ""
                raise AlignmentError(f"a word is not in the lexicon: {word!r}{hint}")
        fewest = sum(min(map(len, self._lexicon.pronunciations[word])) for word in words)
        if num_frames < fewest * self._states:
            raise AlignmentError(
                f"audio shorter than its phones: {num_frames} frames of 10 ms, {fewest} phones need "
                f"{fewest * self._states}"
            )
        return self._compiler.compile_graph_from_text([self._words[word] for word in words])

    def equal_path(self, graph: Any, num_frames: int, seed: int) -> StatePath:
        """Any path, whose states share the frames equally: where a flat start starts."""
        found, path = self._fst.equal_align(graph, num_frames, seed, _EQUAL_ALIGN_TRIES)
        if not found:
            raise AlignmentError(f"no path through the transcript's graph: of {num_frames} frames")
        return self._read(self._fst.get_linear_symbol_sequence(path)[1])

    def best_path(self, graph: Any, features: NDArray, scorer: Any, beam: float) -> StatePath:
        """The most likely path of features (T, D); scorer: of load_mixtures. Raises AlignmentError without one."""
        frames = np.ascontiguousarray(features, dtype=np.float32)
        scores = self._khg.DecodableAmDiagGmmScaled(scorer, self._transitions, frames, ACOUSTIC_SCALE)
        config = self._khg.AlignConfig(beam, beam * _RETRY_FACTOR)
        found = self._khg.align_utterance_wrapper(config, "", ACOUSTIC_SCALE, graph, scores, 0, 0, 0, 0.0, 0)[
            5
        ]
        if len(found) != len(frames):
            raise AlignmentError(f"no path within the beam: {beam:g}, then {beam * _RETRY_FACTOR:g}")
        return self._read(found)

    def load_mixtures(self, mixtures: Mixtures) -> Any:
        """Mixtures as the wheel wants them."""
        scorer = self._khg.AmDiagGmm()
        for pdf in range(mixtures.num_pdfs):
            rows = slice(*mixtures.starts[pdf : pdf + 2])
            means = mixtures.means[rows].astype(np.float32)
            mixture = self._khg.DiagGmm(nmix=len(means), dim=means.shape[1])
            mixture.set_weights(mixtures.weights[rows].astype(np.float32))
            mixture.set_invvars_and_means((1 / mixtures.variances[rows]).astype(np.float32), means)
            mixture.compute_gconsts()
            scorer.add_pdf(mixture)
        return scorer

    def _read(self, transitions: Sequence[int]) -> StatePath:
        numbers = np.array(transitions, dtype=np.int64)
        starts = np.concatenate([[0], np.flatnonzero(self._leaves[numbers])[:-1] + 1])
        assert self._leaves[numbers[-1]]
        return StatePath(self._pdfs[numbers], self._phones[numbers[starts]], starts)


def _lexicon_fst(kaldifst: Any, lexicon: Lexicon, phones: Sequence[str]) -> Any:
    """Phones to words, any number of words, silence or none before, between and after them."""
    ids = {phone: index for index, phone in enumerate(phones, 1)}
    silent, spoken = -math.log(SILENCE_PROBABILITY), -math.log(1 - SILENCE_PROBABILITY)
    fst = kaldifst.StdVectorFst()
    arc = kaldifst.StdArc
    fst.start, between, pausing = (fst.add_state() for _ in range(3))
    fst.add_arc(fst.start, arc(0, 0, spoken, between))
    fst.add_arc(fst.start, arc(0, 0, silent, pausing))
    fst.add_arc(pausing, arc(ids[SILENCE], 0, 0.0, between))
    for number, (_, several) in enumerate(lexicon.pronunciations.items(), 1):
        for pronunciation in several:
            here, word = between, number  # the word stands on its first arc
            for phone in pronunciation[:-1]:
                there = fst.add_state()
                fst.add_arc(here, arc(ids[phone], word, 0.0, there))
                here, word = there, 0
            last = ids[pronunciation[-1]]
            fst.add_arc(here, arc(last, word, spoken, between))
            fst.add_arc(here, arc(last, word, silent, pausing))
    fst.set_final(between, 0.0)
    kaldifst.arcsort(fst, "olabel")
    return fst
