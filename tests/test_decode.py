import dataclasses
import sys

import numpy as np
import pytest
from tiny_speech import LANGUAGE_MODEL, LEXICON, enumerate_hypotheses, random_posteriors, tiny_inventory

from teacherstudent.config import Decode
from teacherstudent.decode import Decoder, Hypothesis, decode_many
from teacherstudent.graph import Graph
from teacherstudent.language_model import BEGIN, END, LanguageModel
from teacherstudent.lexicon import Lexicon

pytest.importorskip("kaldi_decoder")
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
        # Of five frames or more not every sentence is tried: what has more than three words does not win here.
        everything = enumerate_hypotheses(scores, inventory, max_words=num_frames if num_frames < 5 else 3)
        best = max(everything, key=everything.__getitem__)
        found = decoder(posteriors, inventory.log_priors, scale)
        assert not found.partial
        assert found.score == pytest.approx(everything[best], abs=ROUNDING)
        assert everything[found.words] == pytest.approx(everything[best], abs=ROUNDING)  # two and too may tie


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
    with pytest.raises(ValueError, match=r"utterance u1: .*not finite"):
        decode_many(graph, [("u1", bad)], inventory.log_priors, [1.0], WIDE)


@pytest.mark.parametrize("limits", [(0.0, 7000), (15.0, 20), (float("nan"), 7000)])
def test_limits_that_leave_nothing_to_follow_are_refused(graph, limits):
    with pytest.raises(ValueError, match="beam must be above 0"):
        Decoder(graph, *limits)


def test_processes_change_nothing_but_the_time(inventory, graph):
    utterances = [
        (f"u{seed}", random_posteriors(seed, 5 + seed, inventory.num_senones)) for seed in range(25)
    ]
    results = [
        decode_many(
            graph, iter(utterances), inventory.log_priors, [0.5, 1.0], dataclasses.replace(WIDE, jobs=jobs)
        )
        for jobs in (1, 2)
    ]
    assert results[0] == results[1]
    assert list(results[0]) == [0.5, 1.0]
    assert [list(found) for found in results[1].values()] == [[name for name, _ in utterances]] * 2


def test_an_error_in_a_process_names_the_utterance(inventory, graph):
    utterances = [
        ("good", random_posteriors(0, 5, inventory.num_senones)),
        ("bad", np.zeros((5, 3), np.float32)),
    ]
    with pytest.raises(ValueError, match="utterance bad: got log posteriors"):
        decode_many(graph, utterances, inventory.log_priors, [1.0], dataclasses.replace(WIDE, jobs=2))


def test_without_the_wheels_the_error_says_what_to_install(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldi_decoder", None)
    with pytest.raises(ValueError, match=r"pip install 'teacherstudent\[decode\]'"):
        Decoder(graph)
