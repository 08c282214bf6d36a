import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacherstudent.data.lexicon import SILENCE, Lexicon
from teacherstudent.synthesis.espeak import SAMPLING_RATE, Event, Speech, Voice
from teacherstudent.synthesis.pronunciation import (
    MIN_PHONE_SECONDS,
    Uncovered,
    _make_room,
    align,
    build_lexicon,
    count_pronunciations,
    group_phones,
    split_phones,
    without_positions,
)

LEXICON = Lexicon({"in": (("IH", "N"),), "the": (("DH", "AX"),), "hall": (("HH", "AO", "L"),)})
LEAST = int(MIN_PHONE_SECONDS * SAMPLING_RATE)


def word(sample: int, character: int) -> Event:
    return Event("word", sample, character, "")


def phone(name: str, sample: int) -> Event:
    return Event("phoneme", sample, 0, name)


def make_speech(*events: Event, num_samples: int = 20000, quiet: slice = slice(0, 0)) -> Speech:
    samples = np.full(num_samples, 9000, np.int16)
    samples[quiet] = 0
    return Speech(samples.tobytes(), events)


def in_the_hall() -> Speech:
    """espeak-ng says "in the" as one, and a word event may come long before its phones."""
    return make_speech(
        word(0, 1), phone("I", 1000), phone("n", 3000), phone("D", 4000), phone("@2", 5000),
        word(5000, 8), phone("h", 7000), phone("'O:", 9000), phone("l", 12000),
        phone("_:", 14000), phone("_", 15000),
    )  # fmt: skip


def test_words_that_are_said_as_one_are_one_group_and_the_pauses_around_are_none() -> None:
    groups = group_phones("in the hall", in_the_hall())
    assert [group.words for group in groups] == [("in", "the"), ("hall",)]
    assert [group.pronunciation for group in groups] == [("IH", "N", "DH", "AX"), ("HH", "AO", "L")]
    assert groups[-1].phones[-1].end == 14000


def test_an_alignment_gives_every_word_its_own_phones_by_their_order() -> None:
    alignment = align("in the hall", in_the_hall(), LEXICON)
    assert [(item.symbol, item.start, item.end) for item in alignment.words] == [
        ("in", 1000, 4000),
        ("the", 4000, 7000),
        ("hall", 7000, 14000),
    ]
    assert [item.symbol for item in alignment.phones] == ["IH", "N", "DH", "AX", "HH", "AO", "L"]


def test_what_the_lexicon_does_not_cover_is_not_aligned() -> None:
    without = Lexicon({**LEXICON.pronunciations, "the": (("DH", "IY"),)})
    with pytest.raises(Uncovered, match="'in the' is said IH N DH AX"):
        align("in the hall", in_the_hall(), without)
    with pytest.raises(Uncovered, match="'hall' is not said"):
        align("in the hall", make_speech(*in_the_hall().events[:5], word(5000, 8), phone("_", 7000)), LEXICON)


def test_with_stress_the_phones_of_syllables_have_a_digit_and_all_have_their_place_in_the_word() -> None:
    lexicon = Lexicon({"in": (("IH0", "N"),), "the": (("DH", "AX0"),), "hall": (("HH", "AO1", "L"),)})
    alignment = align("in the hall", in_the_hall(), lexicon, stress=True)
    symbols = [item.symbol for item in alignment.phones]
    assert symbols == ["IH0_B", "N_E", "DH_B", "AX0_E", "HH_B", "AO1_I", "L_E"]
    assert without_positions(lexicon.with_word_positions()) == lexicon
    plain = align("in the hall", in_the_hall(), LEXICON)
    assert [(item.start, item.end) for item in alignment.phones] == [
        (item.start, item.end) for item in plain.phones
    ]
    (group,) = group_phones(
        "a", make_speech(word(0, 1), phone(",a", 0), phone("'t", 900), phone("%i:", 1500)), stress=True
    )
    assert group.pronunciation == ("AE2", "T", "IY0")


def test_a_word_that_is_given_in_phonemes_is_found_by_where_it_stands_in_what_was_given() -> None:
    speech = make_speech(word(0, 3), phone("D", 0), phone("@", 900), word(2000, 13), phone("h", 2000))
    groups = group_phones("ab c", speech, spoken="[[D|@]] [[h]]")
    assert [(group.words, group.pronunciation) for group in groups] == [
        (("ab",), ("DH", "AX")),
        (("c",), ("HH",)),
    ]


def test_a_word_with_several_events_or_a_pause_within_is_one_word() -> None:
    speech = make_speech(
        word(0, 1), phone("E", 1000), phone("k", 2000), phone("_", 3000), word(4000, 3), phone("eI", 4000),
        phone("_:", 5000), word(6000, 7), phone("I", 6000),
    )  # fmt: skip
    groups = group_phones("x-ray i", speech)
    assert [(group.words, group.pronunciation) for group in groups] == [
        (("x-ray",), ("EH", "K", "EY")),
        ((), (SILENCE,)),
        (("i",), ("IH",)),
    ]
    assert [(item.start, item.end) for item in groups[0].phones] == [(1000, 2000), (2000, 4000), (4000, 5000)]


def test_pauses_in_a_row_are_one_silence_and_glides_belong_to_the_phone_before() -> None:
    speech = make_speech(
        word(0, 1), phone("D", 1000), phone("I2", 2000), phone(";", 3000),
        phone("_:", 4000), phone("_", 5000), word(6000, 5), phone("I", 6000), phone("n", 8000),
    )  # fmt: skip
    lexicon = Lexicon({"the": (("DH", "IH"),), "in": (("IH", "N"),)})
    alignment = align("the in", speech, lexicon)
    assert [(item.symbol, item.start) for item in alignment.phones] == [
        ("DH", 1000),
        ("IH", 2000),
        (SILENCE, 4000),
        ("IH", 6000),
        ("N", 8000),
    ]
    assert alignment.end == 20000


def test_a_stop_begins_with_its_closure() -> None:
    events = (word(0, 1), phone("aI", 1000), phone("t", 5000), word(7000, 4), phone("s", 7000))
    lexicon = Lexicon({"it": (("AY", "T"),), "s": (("S",),)})
    alignment = align("it s", make_speech(*events, quiet=slice(4200, 5000)), lexicon)
    assert [item.start for item in alignment.phones] == [1000, 4200, 7000]
    sounding = align("it s", make_speech(*events), lexicon)
    assert [item.start for item in sounding.phones] == [1000, 5000, 7000]


def test_what_cannot_be_told_names_the_word() -> None:
    with pytest.raises(Uncovered, match="'b' is said with 'Q'"):
        group_phones("a b", make_speech(word(0, 1), phone("a", 0), word(900, 3), phone("Q", 900)))
    with pytest.raises(Uncovered, match="'a' is not said at all"):
        group_phones("a", make_speech(word(0, 1), phone("_:", 0)))
    with pytest.raises(Uncovered, match="'a' is not said at all"):
        group_phones("a b", make_speech(word(0, 3), phone("b", 0)))
    with pytest.raises(Uncovered, match="no word"):
        group_phones("a", make_speech(phone("b", 0), word(500, 1), phone("a", 500)))


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12))
def test_every_phone_gets_room_between_the_same_ends(lengths: list[int]) -> None:
    bounds = [500, *(500 + np.cumsum(lengths)).tolist()]
    corrected = _make_room(bounds)
    shortest = min(LEAST, (bounds[-1] - bounds[0]) // len(lengths))
    assert (corrected[0], corrected[-1]) == (bounds[0], bounds[-1])
    assert np.diff(corrected).min() >= shortest
    if min(lengths) >= LEAST:
        assert corrected == bounds


def test_a_phone_without_room_takes_it_from_the_one_before() -> None:
    assert _make_room([0, 5000, 5000, 9000]) == [0, 5000 - LEAST, 5000, 9000]


def test_phones_are_shared_out_only_if_there_is_one_way() -> None:
    pronunciations = {"a": [("X",), ("X", "Y")], "b": [("Y", "Z"), ("Z",)], "c": [("Z",)]}
    assert split_phones(("a", "c"), ("X", "Y", "Z"), pronunciations) == [("X", "Y"), ("Z",)]
    assert split_phones(("a", "b"), ("X", "Y", "Z"), pronunciations) is None
    assert split_phones(("a", "c"), ("X", "X", "Z"), pronunciations) is None
    assert split_phones(("a", "d"), ("X", "Y"), pronunciations) is None


def test_of_two_words_said_as_one_the_other_may_be_said_as_nowhere_else() -> None:
    alone = make_speech(word(0, 1), phone("D", 0), phone("@2", 900))
    merged = make_speech(word(0, 1), phone("f", 0), phone("@", 900), phone("D", 1800), phone("@2", 2700))
    counts = count_pronunciations([group_phones("the", alone), group_phones("for the", merged)])
    assert counts == {("the", ("DH", "AX")): 2, ("for", ("F", "AX")): 1}
    unclear = group_phones("the the", make_speech(*merged.events[:1], *alone.events[1:], *merged.events[3:]))
    other = group_phones("it of", merged)  # neither is known
    assert count_pronunciations([group_phones("the", alone), other]) == {("the", ("DH", "AX")): 1}
    assert count_pronunciations([group_phones("the", alone), unclear]) == {("the", ("DH", "AX")): 3}


def test_the_stress_of_words_said_as_one_is_their_own() -> None:
    events = (phone("'0", 0), phone("n", 900), phone("D", 1800), phone("@2", 2700))
    on = group_phones("on", make_speech(word(0, 1), phone(",0", 0), phone("n", 900)), stress=True)
    the = group_phones("the", make_speech(word(0, 1), *events[2:]), stress=True)
    merged = group_phones("on the", make_speech(word(0, 1), *events), stress=True)
    counts = count_pronunciations([on, the, merged])
    assert counts == {("on", ("OH2", "N")): 1, ("on", ("OH1", "N")): 1, ("the", ("DH", "AX0")): 2}


def test_rare_pronunciations_are_left_out_of_the_lexicon() -> None:
    hall = group_phones("in the hall", in_the_hall())
    parts = group_phones(
        "in the",
        make_speech(
            word(0, 1), phone("I", 0), phone("n", 900), word(2000, 4), phone("D", 2000), phone("@", 3000)
        ),
    )  # fmt: skip
    rare = group_phones("the", make_speech(word(0, 1), phone("d", 0), phone("@", 900)))
    counts = count_pronunciations([hall, *[parts] * 60, rare])
    assert counts == {
        ("in", ("IH", "N")): 61,
        ("the", ("DH", "AX")): 61,
        ("hall", ("HH", "AO", "L")): 1,
        ("the", ("D", "AX")): 1,
    }
    assert build_lexicon(counts) == LEXICON


def test_a_fresh_voice_says_the_same_texts_with_the_same_samples() -> None:
    texts = ["turn on the kitchen lights", "what's the weather in rome", "turn on the kitchen lights"]
    spoken = []
    for _ in range(2):
        with Voice("en-us+f1", 170, 50) as voice:
            spoken.append([voice.speak(text) for text in texts])
    assert spoken[0] == spoken[1]
    assert [len(speech.samples) > SAMPLING_RATE for speech in spoken[0]] == [True] * 3


def test_another_pitch_rate_or_accent_is_heard() -> None:
    lengths, samples = [], set()
    for name, rate, pitch in (
        ("en+m1", 130, 50),
        ("en+m1", 200, 50),
        ("en+m1", 130, 70),
        ("en-us+m1", 130, 50),
    ):
        with Voice(name, rate, pitch) as voice:
            speech = voice.speak("water the garden on friday")
            lengths.append(len(speech.samples))
            samples.add(speech.samples)
    assert len(samples) == 4
    assert lengths[1] < 0.8 * lengths[0]


def test_a_voice_that_is_not_there_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="'en-xx'"), Voice("en-xx", 170, 50) as voice:
        voice.speak("today")
    assert "no voice 'en-xx'" in capfd.readouterr().err
