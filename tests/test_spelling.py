"""An alignment of other words is recognised; one of another lexicon or aligner is not taken for it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.alignment.alignments import AlignmentError, PhoneSegments
from teacherstudent.alignment.spelling import check_spelling, spelling_distance
from teacherstudent.data.lexicon import Lexicon

LEXICON = Lexicon.of(
    [("ab", ("A", "B")), ("ab", ("A", "A", "B")), ("k", ("K",)), ("baka", ("B", "A", "K", "A"))]
)


def say(phones: str, words=None) -> PhoneSegments:
    return PhoneSegments.of(
        [(0.1 * n, 0.1 * n + 0.1, symbol) for n, symbol in enumerate(phones.split())], words
    )


def said(text: str) -> list[tuple[float, float, str]]:
    return [(0.1 * n, 0.1 * n + 0.1, word) for n, word in enumerate(text.split())]


def edit_distance(one, other) -> int:
    """By the recursion itself."""
    if not one or not other:
        return len(one) + len(other)
    same = edit_distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(same, edit_distance(one[1:], other) + 1, edit_distance(one, other[1:]) + 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["A", "B", "K"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(["ab", "k", "baka"]), max_size=2),
)
def test_the_distance_is_that_to_the_nearest_of_all_pronunciations(phones, words) -> None:
    ways = itertools.product(*(LEXICON.pronunciations[word] for word in words))
    nearest = min(edit_distance(phones, [phone for way in several for phone in way]) for several in ways)
    assert spelling_distance(say("SIL " + " ".join(phones) + " SIL"), " ".join(words), LEXICON) == nearest


def test_words_that_the_lexicon_lacks_may_have_any_phones() -> None:
    assert spelling_distance(say("A B B B K A B"), "ab Xanten k ab", LEXICON) == 0
    assert spelling_distance(say("A B K B"), "Xanten k", LEXICON) == 1
    assert spelling_distance(say("A B"), "Xanten", LEXICON) == 0


@pytest.mark.parametrize(
    "words, transcript",
    [
        ("one two", "ONE two,"),
        ("l' amour well known", "L'amour well-known."),
        ("one <unk> three", "one Xanten's three"),
        ("[laughter] one <unk>", "one two"),
        ("one two", "<noise> one two"),
        ("!SIL ｆｉve", "five"),
        ("<unk> <unk>", "x"),
    ],
)
def test_words_that_aligners_write_in_their_way_are_the_same(words, transcript) -> None:
    check_spelling(say("A", said(words)), transcript, LEXICON)


@pytest.mark.parametrize(
    "words, transcript",
    [
        ("one two", "one"),
        ("one", "one two"),
        ("one two", "two one"),
        ("one <unk> three", "two four three"),
        ("<unk> three <unk> three", "one three"),
        ("", "one"),
    ],
)
def test_other_words_are_refused_and_both_are_shown(words, transcript) -> None:
    with pytest.raises(AlignmentError, match=f"other words: '{words}', the transcript is '{transcript}'"):
        check_spelling(say("A", said(words)), transcript, LEXICON)


def test_many_unknown_words_take_no_longer() -> None:
    unknown = said(" ".join(["<unk>", "a"] * 40 + ["b"]))
    with pytest.raises(AlignmentError):
        check_spelling(say("A", unknown), "a" * 3000, LEXICON)


def test_half_of_the_phones_may_differ_and_no_more() -> None:
    check_spelling(say("A K A K"), "ab ab", LEXICON)
    with pytest.raises(AlignmentError, match="its 4 phones and what the lexicon has for 'ab ab' differ by 3"):
        check_spelling(say("K K A K"), "ab ab", LEXICON)
    with pytest.raises(AlignmentError, match="other words"):  # of the beginning alone
        check_spelling(say("SIL B A"), "baka k k", LEXICON)


def test_phones_of_other_speech_of_the_same_length_are_refused() -> None:
    rng = np.random.default_rng(1)
    phones = [f"P{number}" for number in range(40)]
    lexicon = Lexicon.of(
        (f"w{word}", tuple(rng.choice(phones, size=rng.integers(2, 8)))) for word in range(300)
    )
    for _ in range(200):
        one, other = (" ".join(rng.choice(lexicon.words, size=10)) for _ in range(2))
        segments = say(" ".join(phone for word in one.split() for phone in lexicon.pronunciations[word][0]))
        check_spelling(segments, one, lexicon)
        with pytest.raises(AlignmentError):
            check_spelling(segments, other, lexicon)
