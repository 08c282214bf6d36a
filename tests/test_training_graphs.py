"""A path through a transcript's graph says the transcript, and a best path is the best."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.alignment.alignments import AlignmentError
from teacherstudent.alignment.gaussians import Mixtures
from teacherstudent.alignment.tied_states import TiedStates, find_bases, num_states
from teacherstudent.alignment.training_graphs import ACOUSTIC_SCALE, StatePath, TrainingGraphs
from teacherstudent.data.lexicon import Lexicon

LEXICON = Lexicon.of(
    [
        ("a", ("A_S",)),
        ("ab", ("A_B", "B_E")),
        ("ab", ("B_B", "B_E")),
        ("cab", ("C_B", "A_I", "B_E")),
        ("Bab", ("B_B", "A_I", "B_E")),
        ("<unk>", ("C_S",)),
    ]
)
PHONES = ("SIL", *LEXICON.phones)
BASES = find_bases(PHONES)
NUM_BASES = int(BASES.max())
D = 2


def make_graphs(states: int, unknown_word: str = "") -> TrainingGraphs:
    tied = TiedStates.monophone(NUM_BASES, states)
    return TrainingGraphs(PHONES, states, tied, LEXICON, unknown_word)


GRAPHS = make_graphs(2)
TIED = TiedStates.monophone(NUM_BASES, 2)


def random_mixtures(seed: int) -> Mixtures:
    rng = np.random.default_rng(seed)
    size = TIED.num_pdfs
    return Mixtures(
        np.arange(size + 1), np.ones(size), 2 * rng.standard_normal((size, D)), np.ones((size, D))
    )


def expected_pdfs(phone: int) -> list[int]:
    """Of the states of a phone, in order."""
    return [~place for place in TIED.roots[BASES[phone - 1] - 1]]


def check_path(path: StatePath, text: str, num_frames: int) -> None:
    names = [PHONES[phone - 1] for phone in path.phones]
    spellings = [
        [phone for word in said for phone in word]
        for said in itertools.product(*(LEXICON.pronunciations[word] for word in text.split()))
    ]
    assert [name for name in names if name != "SIL"] in spellings
    assert all(pair != ("SIL", "SIL") for pair in itertools.pairwise(names))
    edges = [*path.starts, num_frames]
    assert edges[0] == 0
    for phone, start, end in zip(path.phones, edges, edges[1:]):
        assert list(dict.fromkeys(path.pdfs[start:end])) == expected_pdfs(phone)  # every state, in order
    silent = [place for place, name in enumerate(names) if name == "SIL"]
    word_ends = [place for place, name in enumerate(names) if re.search("_[ES]$", name)]
    assert all(place == 0 or place - 1 in word_ends for place in silent)


texts = st.lists(st.sampled_from(["a", "ab", "cab"]), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(24, 60), st.integers(0, 10**6), st.booleans())
def test_every_path_spells_a_pronunciation_with_silence_only_between_words(
    text: str, num_frames: int, seed: int, equal: bool
) -> None:
    graph = GRAPHS.compile(text, num_frames)
    if equal:
        path = GRAPHS.equal_path(graph, num_frames, seed)
    else:
        features = np.random.default_rng(seed).standard_normal((num_frames, D))
        path = GRAPHS.best_path(graph, features, GRAPHS.load_mixtures(random_mixtures(seed)), beam=1000.0)
    check_path(path, text, num_frames)


def brute_force(text: str, scores: np.ndarray) -> float:
    """The best acoustic score of all spellings, pauses and durations; scores: (T, P). Dynamic programming by hand."""
    best = -np.inf
    words = [LEXICON.pronunciations[word] for word in text.split()]
    for said in itertools.product(*words):
        for pauses in itertools.product([False, True], repeat=len(said) + 1):
            phones: list[int] = []
            for pause, word in zip(pauses, [*said, ()]):
                phones += [1] if pause else []
                phones += [PHONES.index(phone) + 1 for phone in word]
            chain = [pdf for phone in phones for pdf in expected_pdfs(phone)]
            if len(chain) > len(scores):
                continue
            reached = np.full(len(chain), -np.inf)
            reached[0] = scores[0, chain[0]]
            for frame in scores[1:]:
                reached = np.maximum(reached, np.concatenate([[-np.inf], reached[:-1]])) + frame[chain]
            best = max(best, reached[-1])
    return best


@settings(max_examples=25, deadline=None)
@given(texts, st.integers(0, 10**6))
def test_the_best_path_scores_as_high_as_any(text: str, seed: int) -> None:
    mixtures = random_mixtures(seed)
    features = 6 * np.random.default_rng(seed).standard_normal((30, D))
    scores = np.stack([mixtures.log_likelihoods(features, pdf)[:, 0] for pdf in range(TIED.num_pdfs)], axis=1)
    path = GRAPHS.best_path(GRAPHS.compile(text, 30), features, GRAPHS.load_mixtures(mixtures), beam=1e5)
    ours = scores[np.arange(30), path.pdfs].sum()
    slack = 40.0 / ACOUSTIC_SCALE  # what silences and transitions may weigh: far less than the features here
    best = brute_force(text, scores)
    assert best - slack <= ours <= best + 1e-6 * abs(best)


@pytest.mark.parametrize("states", [1, 3, 5])
def test_the_fewest_frames_that_phones_need_are_enough_and_one_less_is_told(states: int) -> None:
    graphs = make_graphs(states)
    needed = 3 * states
    path = graphs.equal_path(graphs.compile("cab", needed), needed, 1)
    assert (len(path.pdfs), len(path.phones)) == (needed, 3)
    with pytest.raises(AlignmentError, match=f"{needed - 1} frames of 10 ms, 3 phones need {needed}"):
        graphs.compile("cab", needed - 1)
    assert num_states(1, states) == 2 * states


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "transcript is empty"),
        ("a dab", "a word is not in the lexicon: 'dab'$"),
        ("a BAB", "a word is not in the lexicon: 'BAB', but 'Bab' is: upper and lower case differ$"),
    ],
)
def test_what_cannot_be_aligned_says_why(text: str, reason: str) -> None:
    with pytest.raises(AlignmentError, match=reason):
        GRAPHS.compile(text, 100)


def test_an_unknown_word_is_said_as_the_one_that_stands_for_it() -> None:
    graphs = make_graphs(2, unknown_word="<unk>")
    path = graphs.equal_path(graphs.compile("a dab", 60), 60, 1)
    spoken = [PHONES[phone - 1] for phone in path.phones if phone != 1]
    assert spoken == ["A_S", "C_S"]


def test_a_beam_that_loses_every_way_to_the_end_is_told() -> None:
    size = TIED.num_pdfs
    means = np.full((size, D), 50.0)
    means[expected_pdfs(PHONES.index("C_B") + 1)[0]] = 0.0
    mixtures = Mixtures(np.arange(size + 1), np.ones(size), means, np.ones((size, D)))
    graph = GRAPHS.compile(" ".join(["cab"] * 15), 200)  # the search keeps 20 states whatever the beam
    with pytest.raises(AlignmentError, match="no path within the beam: 1, then 10"):
        GRAPHS.best_path(graph, np.zeros((200, D)), GRAPHS.load_mixtures(mixtures), beam=1.0)
