from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.synthesis.vocabulary import (
    CARRIER_ROUNDS,
    OFFSET,
    SENTENCE_WORDS,
    Vocabulary,
    make_vocabulary,
    read_vocabulary,
)

SMALL = Vocabulary(tuple(f"w{rank}" for rank in range(1, 301)), {"w1": "[[w]]"})


@pytest.fixture(scope="module")
def sentences() -> list[list[str]]:
    rng = np.random.default_rng(0)
    return [SMALL.draw(rng).split() for _ in range(40000)]


def test_sentences_have_three_to_twelve_words(sentences: list[list[str]]) -> None:
    lengths = Counter(map(len, sentences))
    assert (min(lengths), max(lengths)) == SENTENCE_WORDS
    assert all(count == pytest.approx(len(sentences) / 10, rel=0.1) for count in lengths.values())


def test_word_frequencies_follow_the_law_of_zipf_and_mandelbrot(sentences: list[list[str]]) -> None:
    counts = Counter(word for words in sentences for word in words)
    weights = 1 / (np.arange(1, len(SMALL.words) + 1) + OFFSET)
    expected = weights / weights.sum() * counts.total()
    measured = np.array([counts[word] for word in SMALL.words])
    assert measured.sum() == counts.total()
    assert np.abs(measured[:20] / expected[:20] - 1).max() < 0.05
    assert np.abs(measured / expected - 1).max() < 0.35
    slope = np.polyfit(np.log(np.arange(1, 301) + OFFSET), np.log(measured), 1)[0]
    assert slope == pytest.approx(-1, abs=0.03)


def test_a_word_tells_something_about_the_next(sentences: list[list[str]]) -> None:
    followers = Counter(pair for words in sentences for pair in pairwise(words))
    after = {right: count for (left, right), count in followers.items() if left == "w200"}
    _, most = max(after.items(), key=lambda item: item[1])
    assert most > 0.2 * sum(after.values())  # alone, no word has more than 5 %
    assert len(after) > 50


def test_the_generator_decides_over_the_sentence() -> None:
    first, again, other = (SMALL.draw(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 60), accent=st.sampled_from(["en", "en-us"]))
def test_carriers_have_every_word_in_every_round_and_are_no_longer_than_sentences(
    count: int, accent: str
) -> None:
    vocabulary = Vocabulary(SMALL.words[:count])
    carriers = list(vocabulary.draw_carriers(accent))
    counts = Counter(word for text in carriers for word in text.split())
    assert set(counts) == set(vocabulary.words)
    assert min(counts.values()) >= CARRIER_ROUNDS
    assert max(len(text.split()) for text in carriers) <= SENTENCE_WORDS[1]
    assert carriers == list(vocabulary.draw_carriers(accent))


def test_accents_hear_the_words_in_other_company() -> None:
    assert list(SMALL.draw_carriers("en")) != list(SMALL.draw_carriers("en-us"))


def test_words_are_given_to_the_synthesiser_as_they_are_or_in_phonemes() -> None:
    assert SMALL.spell("w2 w1 w2") == "w2 [[w]] w2"
    made = make_vocabulary(20, seed=3)
    text = " ".join(made.words)
    assert len(made.spell(text).split()) == 20
    assert all(form.startswith("[[") and form.endswith("]]") for form in made.spell(text).split())


def test_a_list_is_read_in_its_order_up_to_the_count(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("don't\n\n  café \nbbc\n don't\n", encoding="utf-8")
    assert read_vocabulary(path, 3).words == ("don't", "café", "bbc")
    assert read_vocabulary(path, 1).words == ("don't",)
    path.write_text("only\n")
    assert read_vocabulary(path, 3).words == ("only",)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"one\ntwo\n\none\n", "line 4: 'one' is on line 1 too"),
        (b"one\ntwo three\n", "line 2: 'two three' is more than one word"),
        (b"a[[b\n", "line 1: .* cannot be a word"),
        (b"SIL\n", "line 1: 'SIL' cannot be a word"),
        (b"\n \n", "has no words"),
        (b"\xff\xfe", "is no word list"),
    ],
)
def test_a_list_that_is_wrong_is_refused_by_line(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message) as refused:
        read_vocabulary(path, 10)
    assert str(path) in str(refused.value)


def test_a_list_that_is_not_there_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="'pseudo-words' or the path of a word list, and there is no such file"
    ):
        read_vocabulary(tmp_path / "none", 10)
    with pytest.raises(ValueError, match="is no word list"):
        read_vocabulary(tmp_path, 10)
