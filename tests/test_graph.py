import itertools
import math
import pickle
import subprocess
import sys
import time
import warnings

import kaldifst
import numpy as np
import pytest
from tiny_speech import LANGUAGE_MODEL, LEXICON, PHONES, tiny_inventory

from teacherstudent.data.lexicon import Lexicon
from teacherstudent.decoding.graph import Graph, _disambiguation, _grammar, _transition_model
from teacherstudent.decoding.language_model import BEGIN, END, LanguageModel, estimate_bigram
from teacherstudent.tying.kaldi_tree import topology_text


@pytest.fixture(scope="module")
def inventory():
    return tiny_inventory()


@pytest.fixture(scope="module")
def graph(inventory):
    return Graph.build(LEXICON, inventory, LANGUAGE_MODEL)


def test_the_decoding_wheels_load_together():
    """Some versions of them hang when imported side by side: hence a process with a deadline."""
    script = "import kaldifst, kaldi_hmm_gmm, kaldi_decoder, kaldialign"
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kaldi_reads_the_tree_as_we_do_for_every_triphone(inventory):
    tree, _ = _transition_model(inventory)
    assert (tree.context_width, tree.central_position) == (3, 1)
    assert tree.num_pdfs == inventory.num_senones
    contexts, centres = range(len(PHONES) + 1), range(1, len(PHONES) + 1)
    for left, centre, right, state in itertools.product(contexts, centres, contexts, (0, 1)):
        assert tree.compute([left, centre, right], state) == (
            True,
            inventory.senone(left, centre, right, state),
        )


def test_kaldi_reads_the_topology_as_a_first_frame_and_later_frames(inventory):
    _, transitions = _transition_model(inventory)
    assert transitions.topo.get_phone_to_num_pdf_classes() == [-1, *[2] * len(PHONES)]
    senones = transitions.transition_id_to_pdf_array()
    events = [(*event, s) for event in itertools.product(range(7), range(1, 7), range(7)) for s in (0, 1)]
    triphone_states = {(event[1], event[3], inventory.senone(*event)) for event in events}
    kaldis = {
        (transitions.transition_id_to_phone(i), int(transitions.is_self_loop(i)), senones[i])
        for i in range(1, transitions.num_transition_ids + 1)
    }
    assert kaldis == triphone_states
    assert "<ForPhones> 1 2 3 </ForPhones>" in topology_text(3)


def sentence_cost(grammar, ids, symbol):
    """Of the cheapest way through G, in which backing off may be used anywhere, as in the lexicon."""
    fst = kaldifst.StdVectorFst()
    state = fst.start = fst.add_state()
    for word in [*ids, None]:
        fst.add_arc(state, kaldifst.StdArc(symbol, symbol, 0.0, state))
        if word is None:
            fst.set_final(state, 0.0)
        else:
            following = fst.add_state()
            fst.add_arc(state, kaldifst.StdArc(word, word, 0.0, following))
            state = following
    kaldifst.arcsort(fst, "olabel")
    kaldifst.arcsort(grammar, "ilabel")
    best = kaldifst.shortest_path(kaldifst.compose(fst, grammar))
    return kaldifst.get_linear_symbol_sequence(best)[3].value


TRIGRAM = LanguageModel(
    {
        (BEGIN,): -99.0,
        ("a",): -0.6,
        ("b",): -0.7,
        (END,): -0.3,
        (BEGIN, "a"): -0.2,
        ("a", "b"): -0.25,
        ("b", "b"): -0.1,
        (BEGIN, "a", "b"): -0.05,
        ("a", "b", END): -0.02,
    },
    {(BEGIN,): -0.3, ("a",): -0.35, ("b",): -0.5, (BEGIN, "a"): -0.4, ("a", "b"): -0.45},
)


@pytest.mark.parametrize("model", [LANGUAGE_MODEL, TRIGRAM], ids=["bigram", "trigram"])
def test_the_grammar_gives_every_sentence_the_language_models_probability(model):
    words = model.words
    grammar = _grammar(model, words)
    for length in range(4):
        for sentence in itertools.product(words, repeat=length):
            padded = (BEGIN, *sentence, END)
            expected = sum(model.log10_probability(padded[:i], padded[i]) for i in range(1, len(padded)))
            found = sentence_cost(grammar, [words.index(word) + 1 for word in sentence], len(words) + 1)
            assert found == pytest.approx(-math.log(10) * expected, abs=1e-4)


def test_pronunciations_that_are_alike_or_begin_others_are_told_apart():
    pronunciations = [(1, (2, 3)), (2, (2, 3, 4)), (3, (2, 3, 4)), (4, (5,)), (5, (2, 3)), (6, (5, 6))]
    assert _disambiguation(pronunciations) == [1, 1, 2, 1, 2, 0]


def test_a_graph_has_only_senones_and_words_on_its_arcs(graph, inventory):
    fst = graph.load()
    arcs = [arc for state in kaldifst.StateIterator(fst) for arc in kaldifst.ArcIterator(fst, state)]
    assert {arc.ilabel for arc in arcs} <= set(range(inventory.num_senones + 1))
    assert {arc.olabel for arc in arcs} == set(range(len(graph.words) + 1))
    assert graph.words == tuple(sorted(LEXICON.words))


def test_the_same_inputs_give_the_same_graph_also_from_text_and_after_pickling(graph, inventory):
    again = Graph.build(LEXICON, inventory, LANGUAGE_MODEL.to_arpa())
    assert again == graph == pickle.loads(pickle.dumps(graph))


def test_words_without_pronunciation_or_probability_are_left_out_with_a_warning(inventory):
    model = estimate_bigram(["to um polka", "mmm"])
    with pytest.warns(UserWarning) as caught:
        graph = Graph.build(LEXICON, inventory, model)
    texts = sorted(str(warning.message) for warning in caught)
    assert texts == [
        "left out: 1 of the language model's words, for which the lexicon has no pronunciation: polka",
        "left out: 3 of the lexicon's words, which the language model lacks: tomb, too, two",
    ]
    assert graph.words == ("mmm", "to", "um")


def test_no_word_in_common_and_a_phone_that_the_inventory_lacks_are_errors(inventory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="nothing can be recognised"):
            Graph.build(LEXICON, inventory, estimate_bigram(["polka"]))
    lexicon = Lexicon({"zoo": (("Z", "U"),)})
    with pytest.raises(
        ValueError, match="'zoo' is pronounced with phone 'Z', which the senone inventory lacks"
    ):
        Graph.build(lexicon, inventory, estimate_bigram(["zoo"]))


def test_without_the_wheels_the_error_says_what_to_install(inventory, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldifst", None)
    with pytest.raises(ValueError, match=r"pip install 'teacherstudent\[decode\]'"):
        Graph.build(LEXICON, inventory, LANGUAGE_MODEL)


def test_the_unknown_word_of_lexicon_and_language_model_is_in_no_graph_and_no_warning(inventory):
    lexicon = Lexicon({**LEXICON.pronunciations, "<UNK>": (("M",),)})
    with_unknown = dict(LANGUAGE_MODEL.log10_probabilities)
    with_unknown |= {("<UNK>",): -2.0, ("to", "<UNK>"): -1.0, ("<UNK>", "to"): -1.0}
    model = LanguageModel(with_unknown, {**LANGUAGE_MODEL.log10_backoffs, ("<UNK>",): -0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = Graph.build(lexicon, inventory, model)
    assert graph.words == tuple(sorted(LEXICON.words))
    assert graph == Graph.build(LEXICON, inventory, LANGUAGE_MODEL)


def test_a_grammar_of_150_words_takes_moments(inventory):
    generator = np.random.default_rng(0)
    spellings = {tuple(generator.choice(LEXICON.phones, generator.integers(3, 8))) for _ in range(150)}
    lexicon = Lexicon({"-".join(phones): (phones,) for phones in spellings})
    texts = [" ".join(generator.choice(lexicon.words, 5)) for _ in range(500)]
    model = estimate_bigram(texts, lexicon.words)
    began = time.perf_counter()
    Graph.build(lexicon, inventory, model)
    assert time.perf_counter() - began < 10  # 0.3 s on an idle core
