import dataclasses
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_speech import (
    LANGUAGE_MODEL,
    LEXICON,
    enumerate_hypotheses,
    random_posteriors,
    sentence_score,
    tiny_inventory,
)

from teacherstudent.config import Decode
from teacherstudent.data.lexicon import Lexicon
from teacherstudent.decoding.decode import Decoder, Hypothesis, Recogniser, Weights
from teacherstudent.decoding.graph import Graph
from teacherstudent.decoding.language_model import BEGIN, END, LanguageModel

ROUNDING = 5e-3  # compiling a graph rounds its weights to 1/1024
WIDE = Decode(beam=1000.0, max_active=100000, jobs=1)


@pytest.fixture(scope="module")
def inventory():
    inventory = tiny_inventory()
    return inventory.with_priors(np.arange(inventory.num_senones) + 5)


@pytest.fixture(scope="module")
def graph(inventory):
    return Graph.build(LEXICON, inventory, LANGUAGE_MODEL)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 6])
def test_the_search_finds_what_trying_everything_finds(inventory, graph, num_frames, scale):
    decoder = Decoder(graph, WIDE.beam, WIDE.max_active)
    for seed in range(4):
        posteriors = random_posteriors(seed, num_frames, inventory.num_senones)
        scores = scale * (posteriors - inventory.log_priors)
        # Of five frames or more only sentences of three words are tried: a longer one may win.
        everything = enumerate_hypotheses(scores, inventory, max_words=num_frames if num_frames < 5 else 3)
        best = max(everything.values())
        found = decoder(posteriors, inventory.log_priors, scale)
        assert not found.partial
        assert found.score == pytest.approx(sentence_score(scores, inventory, found.words), abs=ROUNDING)
        assert found.score >= best - ROUNDING


@pytest.mark.parametrize("penalty", [-1.5, 0.0, 2.5])
def test_every_word_costs_the_penalty(inventory, graph, penalty):
    decoder = Decoder(graph, WIDE.beam, WIDE.max_active, 1000.0)
    for seed in range(3):
        posteriors = random_posteriors(seed, 4, inventory.num_senones)
        everything = enumerate_hypotheses(posteriors - inventory.log_priors, inventory, max_words=4)
        penalised = {words: score - penalty * len(words) for words, score in everything.items()}
        found = decoder(posteriors, inventory.log_priors, 1.0, penalty)
        assert found.score == pytest.approx(max(penalised.values()), abs=ROUNDING)
        assert penalised[found.words] == pytest.approx(found.score, abs=ROUNDING)
        lattice = decoder.lattice(posteriors, inventory.log_priors, 1.0, penalty)
        assert decoder.nbest(lattice, 1)[0].score == pytest.approx(found.score, abs=ROUNDING)


@pytest.mark.parametrize(("num_frames", "scale"), [(1, 1.0), (2, 0.5), (3, 1.0), (4, 2.0)])
def test_a_lattice_without_pruning_holds_every_sentence_at_its_score(inventory, graph, num_frames, scale):
    decoder = Decoder(graph, WIDE.beam, WIDE.max_active, lattice_beam=1000.0)
    posteriors = random_posteriors(7, num_frames, inventory.num_senones)
    scores = scale * (posteriors - inventory.log_priors)
    everything = enumerate_hypotheses(scores, inventory, max_words=num_frames)
    lattice = decoder.lattice(posteriors, inventory.log_priors, scale)
    found = decoder.nbest(lattice, len(everything) + 10)
    assert len(found) == len(everything)
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(everything[hypothesis.words], abs=ROUNDING)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    few = decoder.nbest(lattice, 7)
    assert [each.score for each in few] == pytest.approx([each.score for each in found[:7]])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 40), st.sampled_from([0.3, 1.0, 2.0]))
def test_a_wider_beam_is_never_worse_and_a_narrow_lattice_holds_the_best_path(
    inventory, graph, seed, length, scale
):
    posteriors = random_posteriors(seed, length, inventory.num_senones)
    best = [
        Decoder(graph, beam, 100000)(posteriors, inventory.log_priors, scale) for beam in (4.0, 16.0, 1000.0)
    ]
    whole = [each.score for each in best if not each.partial]
    assert all(wide >= narrow - 1e-3 for narrow, wide in itertools.pairwise(whole))
    assert not best[-1].partial
    decoder = Decoder(graph, 1000.0, 100000, lattice_beam=0.5)
    lattice = decoder.lattice(posteriors, inventory.log_priors, scale)
    found = decoder.nbest(lattice, 3)
    assert found[0].score == pytest.approx(best[-1].score, abs=1e-3)
    assert all(each.score >= found[0].score - 0.5 - 1e-3 for each in found)
    assert [len({each.words for each in found})] == [len(found)]


def test_pruning_costs_only_what_a_wider_beam_wins_back(inventory, graph):
    posteriors = random_posteriors(1, 60, inventory.num_senones)
    exact = Decoder(graph, 1000.0, 100000)(posteriors, inventory.log_priors, 1.0)
    scores = [
        Decoder(graph, beam)(posteriors, inventory.log_priors, 1.0).score for beam in (2.0, 6.0, 20.0, 100.0)
    ]
    assert max(scores) <= exact.score + 1e-3
    assert scores[-1] == pytest.approx(exact.score, abs=1e-3)
    assert scores[0] < exact.score


def test_clean_posteriors_give_back_the_words(inventory, graph):
    phones = ["SIL", "T", "U", "SIL", "U", "M", "T", "U", "B", "SIL"]  # to um tomb
    ids = [inventory.phones.index(phone) + 1 for phone in phones]
    phone, first = np.repeat(ids, 3), np.tile([True, False, False], len(ids))
    posteriors = np.full((len(phone), inventory.num_senones), -12.0, np.float32)
    posteriors[np.arange(len(phone)), inventory.label(phone, first)] = -0.1
    assert Decoder(graph)(posteriors, inventory.log_priors, 1.0).words == ("to", "um", "tomb")


def test_an_utterance_too_short_for_any_sentence_is_partial_and_not_dropped(inventory):
    """The language model ends a sentence after "um" alone, and that takes two frames."""
    half = np.log10(0.5)
    model = LanguageModel(
        {(BEGIN,): -99.0, ("um",): 0.0, ("um", "um"): half, ("um", END): half}, {("um",): -99.0}
    )
    graph = Graph.build(Lexicon({"um": (("U", "M"),)}), inventory, model)
    found = Decoder(graph)(random_posteriors(0, 1, inventory.num_senones), inventory.log_priors, 1.0)
    assert found.partial
    assert np.isfinite(found.score)
    assert set(found.words) <= {"um"}
    whole = Decoder(graph)(random_posteriors(0, 2, inventory.num_senones), inventory.log_priors, 1.0)
    assert whole.words == ("um",)
    assert not whole.partial


def test_no_frames_give_no_words(inventory, graph):
    nothing = np.zeros((0, inventory.num_senones), np.float32)
    assert Decoder(graph)(nothing, inventory.log_priors, 1.0) == Hypothesis((), 0.0, partial=True)


def test_a_decoder_remembers_nothing_of_earlier_utterances(inventory, graph):
    decoder = Decoder(graph)
    utterances = [
        random_posteriors(seed, length, inventory.num_senones) for seed, length in enumerate((30, 1, 0, 50))
    ]
    alone = [Decoder(graph)(posteriors, inventory.log_priors, 1.0) for posteriors in utterances]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 3]):
        for index in order:
            assert decoder(utterances[index], inventory.log_priors, 1.0) == alone[index]


def test_posteriors_of_another_shape_or_not_finite_are_refused(inventory, graph):
    decoder = Decoder(graph)
    with pytest.raises(ValueError, match=r"got log posteriors \(5, 3\)"):
        decoder(np.zeros((5, 3), np.float32), inventory.log_priors, 1.0)
    bad = random_posteriors(0, 5, inventory.num_senones)
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        decoder(bad, inventory.log_priors, 1.0)


@pytest.mark.parametrize("limits", [(0.0, 7000), (15.0, 20), (float("nan"), 7000), (15.0, 7000, 0.0)])
def test_limits_that_leave_nothing_to_follow_are_refused(graph, limits):
    with pytest.raises(ValueError, match="beam must be above 0"):
        Decoder(graph, *limits)


@pytest.fixture(scope="module")
def utterances(inventory):
    return [(f"u{n}", random_posteriors(n, 5 + n, inventory.num_senones)) for n in range(12)]


WEIGHTS = [Weights(0.5), Weights(1.0, 1.0)]


def test_processes_change_nothing_but_the_time(inventory, graph, utterances):
    found = []
    for jobs in (1, 2):
        options = dataclasses.replace(WIDE, jobs=jobs, lattices=True, lattice_beam=2.0)
        with Recogniser(graph, inventory, LEXICON, options) as recogniser:
            best = recogniser.best_paths(iter(utterances), WEIGHTS)
            found.append((best, list(recogniser.transcripts(iter(utterances), WEIGHTS[1]))))
    assert found[0] == found[1]
    best, transcripts = found[0]
    assert list(best) == WEIGHTS
    assert [list(each) for each in best.values()] == [[name for name, _ in utterances]] * 2
    for name, transcript in transcripts:
        assert transcript.best == best[WEIGHTS[1]][name]
        assert transcript.nbest[0].words == transcript.best.words
        assert tuple(each.word for each in transcript.words) == transcript.best.words
        assert all(0 < each.confidence <= 1 for each in transcript.words)


def test_a_transcript_without_lattices_has_words_and_times_alone(inventory, graph, utterances):
    nothing = ("silent", np.zeros((0, inventory.num_senones), np.float32))
    with Recogniser(graph, inventory, LEXICON, WIDE) as recogniser:
        found = dict(recogniser.transcripts([*utterances, nothing], Weights()))
    assert found["silent"].words == ()
    for name, posteriors in utterances:
        transcript = found[name]
        assert (transcript.nbest, transcript.lattice) == ((), "")
        times = [(each.start_seconds, each.end_seconds) for each in transcript.words]
        assert all(0 <= start < end <= 0.03 * len(posteriors) + 1e-9 for start, end in times)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))
        assert {each.confidence for each in transcript.words} <= {None}


def test_an_error_in_a_process_names_the_utterance(inventory, graph):
    bad = [("good", random_posteriors(0, 5, inventory.num_senones)), ("bad", np.zeros((5, 3), np.float32))]
    for jobs in (1, 2):
        with (
            Recogniser(graph, inventory, LEXICON, dataclasses.replace(WIDE, jobs=jobs)) as recogniser,
            pytest.raises(ValueError, match="utterance bad: got log posteriors"),
        ):
            recogniser.best_paths(bad, WEIGHTS)


def test_without_the_wheels_the_error_says_what_to_install(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldi_decoder", None)
    with pytest.raises(ValueError, match=r"pip install 'teacherstudent\[decode\]'"):
        Decoder(graph)
