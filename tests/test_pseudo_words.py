import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.synthesis.pronunciation import PHONES, STRESS, SYLLABIC
from teacherstudent.synthesis.pseudo_words import _sound, make_pseudo_words

WORDS = make_pseudo_words(3000, seed=0)


def our_phone(phone: str) -> str:
    return PHONES[phone.lstrip(STRESS)]


def is_syllable(phone: str) -> bool:
    return our_phone(phone) in SYLLABIC


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 400), seed=st.integers(0, 10**6))
def test_no_two_are_spelled_or_said_alike_and_more_of_them_begin_with_the_same(count: int, seed: int) -> None:
    words = make_pseudo_words(count, seed)
    assert len({word.spelling for word in words}) == len({_sound(word.phones) for word in words}) == count
    assert all(re.fullmatch("[a-z]+", word.spelling) for word in words)
    assert make_pseudo_words(count + 10, seed)[:count] == words


def test_the_seed_decides() -> None:
    assert make_pseudo_words(50, 1) == make_pseudo_words(50, 1)
    assert not {word.spelling for word in make_pseudo_words(50, 1)} >= {
        word.spelling for word in make_pseudo_words(50, 2)
    }


def test_words_that_an_accent_says_alike_count_as_one() -> None:
    assert _sound(("D", "'I", "N")) == _sound(("d", "'I", "n"))
    assert _sound(("b", "'I", "t", "@")) == _sound(("b", "'I", "t", "V"))
    assert _sound(("b", "'V", "t")) != _sound(("b", "'@", "t"))


def test_words_have_one_to_four_syllables_and_primary_stress_on_one() -> None:
    syllables = Counter(sum(map(is_syllable, word.phones)) for word in WORDS)
    shares = [syllables[count] / len(WORDS) for count in (1, 2, 3, 4)]
    assert sum(syllables.values()) == len(WORDS) == sum(syllables[count] for count in (1, 2, 3, 4))
    assert shares == pytest.approx([0.25, 0.4, 0.25, 0.1], abs=0.05)
    for word in WORDS:
        assert sum(phone.startswith("'") for phone in word.phones) == 1
        assert all(is_syllable(phone) for phone in word.phones if phone[0] in "',")
    secondary = sum(phone.startswith(",") for word in WORDS for phone in word.phones)
    assert 0.1 * len(WORDS) < secondary < 0.5 * len(WORDS)


def test_no_vowel_is_beside_a_vowel_and_no_lax_one_is_last() -> None:
    for word in WORDS:
        kinds = "".join("V" if is_syllable(phone) else "C" for phone in word.phones)
        assert "VV" not in kinds
        if word.phones[-1].startswith("'"):
            assert our_phone(word.phones[-1]) not in {"IH", "EH", "AE", "AH", "OH", "UH"}


def test_every_phone_is_one_of_ours_and_all_are_used() -> None:
    ours = Counter(our_phone(phone) for word in WORDS for phone in word.phones)
    assert set(PHONES.values()) - set(ours) == {"", "SIL", "EL"}
    assert ours["T"] > 5 * ours["ZH"] > 0
    assert ours["AX"] > 5 * ours["OY"] > 0


def test_there_is_an_end_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacherstudent.synthesis.pseudo_words._ONSETS", "b/b:1 p/p:1")
    monkeypatch.setattr("teacherstudent.synthesis.pseudo_words._SYLLABLES", (1.0,))
    with pytest.raises(ValueError, match=r"no 5000 pseudo-words: \d+ are about as many"):
        make_pseudo_words(5000, 0)
