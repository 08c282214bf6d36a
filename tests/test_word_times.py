"""Word times against trying every alignment, and against the decoder's own score."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from tiny_speech import LANGUAGE_MODEL, LEXICON, random_posteriors, sentence_score, tiny_inventory

from teacherstudent.data.lexicon import SILENCE
from teacherstudent.decoding.decode import Decoder
from teacherstudent.decoding.graph import SILENCE_PROBABILITY, Graph
from teacherstudent.decoding.language_model import BEGIN, END
from teacherstudent.decoding.word_times import SILENT, Segment, WordAligner


@pytest.fixture(scope="module")
def inventory():
    return tiny_inventory()


@pytest.fixture(scope="module")
def aligner(inventory):
    return WordAligner(LEXICON, inventory)


def every_alignment(scores, inventory, words):
    """(score, segments) of every pronunciation, silence and division of the frames."""
    ids = {phone: number for number, phone in enumerate(inventory.phones, 1)}
    for spoken in itertools.product(*(LEXICON.pronunciations[word] for word in words)):
        for silences in itertools.product((0, 1), repeat=len(words) + 1):
            phones = [(ids[SILENCE], SILENT)] * silences[0]
            for word, (pronunciation, silence) in enumerate(zip(spoken, silences[1:])):
                phones += [(ids[phone], word) for phone in pronunciation]
                phones += [(ids[SILENCE], SILENT)] * silence
            if not phones:
                continue
            for cuts in itertools.combinations(range(1, len(scores)), len(phones) - 1):
                edges = [0, *cuts, len(scores)]
                context = [0, *(phone for phone, _ in phones), 0]
                total = 0.0
                for place, (start, end) in enumerate(itertools.pairwise(edges)):
                    senones = [inventory.senone(*context[place : place + 3], state) for state in (0, 1)]
                    total += scores[start, senones[0]] + scores[start + 1 : end, senones[1]].sum()
                segments = [Segment(*phone, *edge) for phone, edge in zip(phones, itertools.pairwise(edges))]
                yield float(total), segments


@pytest.mark.parametrize("words", [("to",), ("tomb", "mmm"), ("two", "um"), ("mmm", "mmm", "mmm"), ()])
@pytest.mark.parametrize("num_frames", [5, 9])
def test_the_best_alignment_is_that_of_trying_them_all(inventory, aligner, words, num_frames):
    for seed in range(3):
        scores = random_posteriors(seed, num_frames, inventory.num_senones)
        everything = list(every_alignment(scores, inventory, words))
        best, expected = max(everything, key=lambda each: each[0])
        segments, score = aligner.segments(scores, words)
        assert score == pytest.approx(best, abs=1e-4)
        assert segments == expected
        frames = aligner.word_frames(scores, words)
        for index, span in enumerate(frames):
            mine = [segment for segment in expected if segment.word == index]
            assert span == (mine[0].start, mine[-1].end)


@pytest.mark.parametrize("num_frames", [6, 30])
def test_the_alignment_of_the_decoders_words_is_the_decoders_own_path(inventory, aligner, num_frames):
    decoder = Decoder(Graph.build(LEXICON, inventory, LANGUAGE_MODEL), 1000.0, 100000)
    for seed in range(10):
        posteriors = random_posteriors(seed, num_frames, inventory.num_senones)
        found = decoder(posteriors, inventory.log_priors, 1.0)
        sentence = (BEGIN, *found.words, END)
        grammar = math.log(10) * sum(
            LANGUAGE_MODEL.log10_probability(sentence[:i], sentence[i]) for i in range(1, len(sentence))
        )
        grammar += (len(found.words) + 1) * math.log(SILENCE_PROBABILITY)
        _, acoustics = aligner.segments(posteriors - inventory.log_priors, found.words)
        assert grammar + acoustics == pytest.approx(found.score, abs=5e-3)
        if num_frames < 10:
            assert grammar + acoustics == pytest.approx(
                sentence_score(posteriors - inventory.log_priors, inventory, found.words), abs=1e-3
            )


def test_words_are_found_where_they_were_put(inventory, aligner):
    phones = ["SIL", "T", "U", "SIL", "U", "M", "T", "U", "B", "SIL"]  # to um tomb
    lengths = [4, 2, 3, 5, 1, 2, 3, 1, 2, 6]
    ids = np.repeat([inventory.phones.index(phone) + 1 for phone in phones], lengths)
    first = np.concatenate([[True, *[False] * (length - 1)] for length in lengths])
    scores = np.full((len(ids), inventory.num_senones), -12.0, np.float32)
    scores[np.arange(len(ids)), inventory.label(ids, first)] = -0.1
    assert aligner.word_frames(scores, ("to", "um", "tomb")) == [(4, 9), (14, 17), (17, 23)]


def test_a_cut_off_last_word_is_aligned_as_far_as_it_goes(inventory, aligner):
    scores = random_posteriors(0, 2, inventory.num_senones)
    with pytest.raises(ValueError, match="2 frames are too few for the words 'tomb'"):
        aligner.segments(scores, ("tomb",))
    assert aligner.word_frames(scores, ("tomb",), partial=True) in ([(0, 2)], [(1, 2)])
    assert aligner.word_frames(scores, ()) == []


def test_a_last_word_without_a_frame_is_where_the_frames_end(inventory, aligner):
    """The graph writes a word when the phone before it begins."""
    scores = random_posteriors(0, 2, inventory.num_senones)
    spans = aligner.word_frames(scores, ("to", "um"), partial=True)
    assert spans == [(0, 2), (2, 2)]
    with pytest.raises(ValueError, match="2 frames are too few for the words 'to um'"):
        aligner.word_frames(scores, ("to", "um"))


def test_words_of_short_utterances_have_times_whatever_the_search_kept(inventory, aligner):
    graph = Graph.build(LEXICON, inventory, LANGUAGE_MODEL)
    not_begun = 0
    for decoder, seed in itertools.product((Decoder(graph, 1.0), Decoder(graph)), range(400)):
        num_frames = 1 + seed % 5
        posteriors = 4 * random_posteriors(seed, num_frames, inventory.num_senones)
        found = decoder(posteriors, inventory.log_priors, 1.0)
        spans = aligner.word_frames(posteriors - inventory.log_priors, found.words, found.partial)
        assert len(spans) == len(found.words)
        edges = [0, *(frame for span in spans for frame in span), num_frames]
        assert edges == sorted(edges)
        not_begun += any(start == end for start, end in spans)
    assert not_begun


def test_memory_for_a_long_utterance_grows_with_the_root_of_its_frames(inventory, aligner):
    words = ("to", "um", "tomb") * 40
    scores = random_posteriors(0, 2500, inventory.num_senones)
    num_places = len(aligner._places(words, False).tokens)
    tracemalloc.start()
    try:
        aligner.word_frames(scores, words)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_places >= 1000
    assert peak < 0.8 * len(scores) * num_places  # bytes; places before alone would be four times as many
