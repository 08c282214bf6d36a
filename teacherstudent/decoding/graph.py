"""The decoding graph: H∘C∘L∘G as one transducer from senones to words.

G is the language model, L the lexicon with optional silence around every word, C∘H spells triphones as
senones. An input label is senone + 1; 0 is no frame. Source: Mohri, Pereira & Riley 2002, "Weighted
finite-state transducers in speech recognition"; the order of operations is Kaldi's (mkgraph.sh).
"""

import math
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from teacherstudent import wheels
from teacherstudent.data.lexicon import SILENCE, Lexicon
from teacherstudent.decoding.language_model import BEGIN, END, UNKNOWN, LanguageModel, Ngram
from teacherstudent.decoding.openfst import Arcs, make_acceptor
from teacherstudent.tying.kaldi_tree import CENTRAL_POSITION, CONTEXT_WIDTH, kaldi_tree_bytes, topology_text
from teacherstudent.tying.senones import SILENCE_ID, Inventory

SILENCE_PROBABILITY = 0.5  # that silence stands before the first word, between two, or after the last
Pronunciations = list[tuple[int, tuple[int, ...]]]  # word id, phone ids


@dataclass(frozen=True)
class Graph:
    """A decoding graph as plain data, so that it can be pickled to other processes.

    words: id = index + 1; fst: OpenFst's binary vector format.
    """

    words: tuple[str, ...]
    num_senones: int
    fst: bytes

    @classmethod
    def build(cls, lexicon: Lexicon, inventory: Inventory, language_model: LanguageModel | str) -> "Graph":
        """Compile a graph; the language model is one, or the text of an ARPA file.

        All pronunciations of a word are equally likely, without being divided by their number. Words without a
        pronunciation cannot be recognised: they are left out with a warning, as are pronounced words that the
        language model never predicts. Raises ValueError when no word is left, for a pronunciation with a phone
        that the inventory lacks, and without the wheels of teacherstudent[decode].
        """
        if isinstance(language_model, str):
            language_model = LanguageModel.from_arpa(language_model)
        words = _shared_words(lexicon, language_model)
        pronunciations = _pronunciations(lexicon, inventory, words)
        composed = _compose(pronunciations, _grammar(language_model, words), len(words), inventory)
        return cls(words, inventory.num_senones, composed)

    def load(self, word_penalty: float = 0.0) -> Any:
        """The kaldifst.StdVectorFst, every word costing the penalty more."""
        arcs = Arcs.from_bytes(self.fst)
        penalties = np.float32(word_penalty) * (arcs.outputs != 0)[:, None]
        return replace(arcs, weights=arcs.weights + penalties).load()


def _shared_words(lexicon: Lexicon, language_model: LanguageModel) -> tuple[str, ...]:
    """The words that can be recognised, sorted."""
    pronounced, predicted = set(lexicon.pronunciations) - UNKNOWN, set(language_model.words)
    for lacking, what in (
        (predicted - pronounced, "the language model's words, for which the lexicon has no pronunciation"),
        (pronounced - predicted, "the lexicon's words, which the language model lacks"),
    ):
        if lacking:
            some = ", ".join(sorted(lacking)[:5])
            warnings.warn(f"left out: {len(lacking)} of {what}: {some}", stacklevel=3)
    if not pronounced & predicted:
        raise ValueError(
            "no word is both in the lexicon and in the language model: nothing can be recognised"
        )
    return tuple(sorted(pronounced & predicted))


def _pronunciations(lexicon: Lexicon, inventory: Inventory, words: tuple[str, ...]) -> Pronunciations:
    ids = {phone: index + 1 for index, phone in enumerate(inventory.phones)}
    if ids.get(SILENCE) != SILENCE_ID:
        raise ValueError(f"the inventory's first phone is {inventory.phones[:1]}, need {SILENCE!r}")
    found: Pronunciations = []
    for number, word in enumerate(words, 1):
        for phones in lexicon.pronunciations[word]:
            unknown = [phone for phone in phones if phone not in ids]
            if unknown or not phones:
                what = f"phone {unknown[0]!r}, which the senone inventory lacks" if unknown else "no phones"
                raise ValueError(f"word {word!r} is pronounced with {what}: correct the lexicon")
            found.append((number, tuple(ids[phone] for phone in phones)))
    return found


def _grammar(language_model: LanguageModel, words: tuple[str, ...]) -> Any:
    """G: an acceptor of word ids, but that backing off reads the id after the last word and writes nothing."""
    ids = {word: index + 1 for index, word in enumerate(words)}
    known = {*ids, BEGIN}
    ngrams = sorted(
        (ngram, score)
        for ngram, score in language_model.log10_probabilities.items()
        if known.issuperset(ngram[:-1]) and (ngram[-1] in ids or ngram[-1] == END)
    )
    backoffs = {
        history: score
        for history, score in language_model.log10_backoffs.items()
        if score and known.issuperset(history)
    }
    histories = {ngram[:-1] for ngram, _ in ngrams} | set(backoffs)
    states = {history: index for index, history in enumerate(sorted(histories | {()}))}
    longest = language_model.order - 1

    def state_after(ngram: Ngram) -> int:
        tail = ngram[len(ngram) - min(len(ngram), longest) :]
        while tail not in states:
            tail = tail[1:]
        return states[tail]

    arcs, final = [], np.full(len(states), np.inf)
    for ngram, score in ngrams:
        source, cost = states[ngram[:-1]], -score * math.log(10)
        if ngram[-1] == END:
            final[source] = cost
        else:
            word = ids[ngram[-1]]
            arcs.append((source, word, word, cost, state_after(ngram)))
    for history, source in states.items():
        if history:
            cost = -backoffs.get(history, 0.0) * math.log(10)
            arcs.append((source, len(words) + 1, 0, cost, state_after(history[1:])))
    fst = make_acceptor(state_after((BEGIN,)), final, arcs).load()
    wheels.load("kaldifst", "decode").connect(fst)  # histories that nothing leads to
    return fst


def _disambiguation(pronunciations: Pronunciations) -> list[int]:
    """A number for each pronunciation, 0 for most: 1, 2, … where it is not unique, or the beginning of another.

    With it appended as a symbol, no two words read the same and none ends where another goes on, so that the
    lexicon can be determinised.
    """
    times = Counter(phones for _, phones in pronunciations)
    beginnings = {phones[:end] for phones in times for end in range(1, len(phones))}
    used: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for _, phones in pronunciations:
        needed = times[phones] > 1 or phones in beginnings
        used[phones] += needed
        numbers.append(used[phones] if needed else 0)
    return numbers


def _lexicon(pronunciations: Pronunciations, numbers: list[int], num_words: int, num_phones: int) -> Any:
    """L: phone ids to word ids. Symbols beyond the phones: backing off, after silence, then the numbers."""
    back_off, after_silence = num_phones + 1, num_phones + 2
    with_silence, without = -math.log(SILENCE_PROBABILITY), -math.log(1 - SILENCE_PROBABILITY)
    start, between, silent, silence_over = range(4)
    arcs = [
        (start, 0, 0, without, between),
        (start, 0, 0, with_silence, silent),
        (silent, SILENCE_ID, 0, 0.0, silence_over),
        (silence_over, after_silence, 0, 0.0, between),
        (between, back_off, num_words + 1, 0.0, between),
    ]
    num_states = 4
    for (word, phones), number in zip(pronunciations, numbers):
        symbols = [*phones, after_silence + number] if number else list(phones)
        state = between
        for index, symbol in enumerate(symbols[:-1]):
            arcs.append((state, symbol, 0 if index else word, 0.0, num_states))
            state, num_states = num_states, num_states + 1
        output = word if len(symbols) == 1 else 0
        arcs.append((state, symbols[-1], output, without, between))
        arcs.append((state, symbols[-1], output, with_silence, silent))
    final = np.full(num_states, np.inf)
    final[between] = 0.0
    return make_acceptor(start, final, arcs).load()


def _compose(pronunciations: Pronunciations, grammar: Any, num_words: int, inventory: Inventory) -> bytes:
    """The finished graph in OpenFst's binary format."""
    kaldifst, khg = wheels.load("kaldifst", "decode"), wheels.load("kaldi_hmm_gmm", "decode")
    numbers, num_phones = _disambiguation(pronunciations), len(inventory.phones)
    lexicon = _lexicon(pronunciations, numbers, num_words, num_phones)
    kaldifst.arcsort(lexicon, "olabel")
    kaldifst.arcsort(grammar, "ilabel")
    words = kaldifst.compose(lexicon, grammar)
    kaldifst.determinize_star(words)
    kaldifst.minimize_encoded(words)
    kaldifst.arcsort(words, "ilabel")
    symbols = list(range(num_phones + 1, num_phones + 3 + max(numbers)))
    triphones, labels = kaldifst.compose_context(symbols, CONTEXT_WIDTH, CENTRAL_POSITION, words)
    kaldifst.arcsort(triphones, "ilabel")
    tree, transitions = _transition_model(inventory)
    states, symbols_left = khg.get_h_transducer(labels, tree, transitions, khg.HTransducerConfig(1.0, -1))
    kaldifst.arcsort(states, "olabel")
    graph = kaldifst.compose(states, triphones)
    kaldifst.determinize_star(graph)
    arcs = Arcs.of(graph)
    graph = replace(arcs, inputs=np.where(np.isin(arcs.inputs, symbols_left), 0, arcs.inputs)).load()
    kaldifst.minimize_encoded(graph)
    graph = khg.add_self_loops(
        self_loop_scale=0.0, disambig_syms=[], reorder=True, trans_model=transitions, ifst=graph
    )
    senones = np.array(transitions.transition_id_to_pdf_array())
    arcs = Arcs.of(graph)
    inputs = np.where(arcs.inputs == 0, 0, senones[arcs.inputs] + 1)
    return replace(arcs, inputs=inputs.astype(np.int32)).to_bytes()


def _transition_model(inventory: Inventory) -> tuple[Any, Any]:
    khg = wheels.load("kaldi_hmm_gmm", "decode")
    topology = khg.HmmTopology()
    topology.read(topology_text(len(inventory.phones)))
    topology.check()
    tree = khg.ContextDependency.__new__(khg.ContextDependency)
    # Its pickled state is the binary tree as a list of signed chars.
    tree.__setstate__(([byte - 256 if byte > 127 else byte for byte in kaldi_tree_bytes(inventory)],))
    return tree, khg.TransitionModel(tree, topology)
