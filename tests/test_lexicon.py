from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.data.lexicon import SILENCE, Lexicon, base_phones, mark_positions, marks_positions

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=5)
PRONUNCIATIONS = st.lists(NAMES.filter(lambda name: name != SILENCE), min_size=1, max_size=4).map(tuple)
LEXICONS = st.dictionaries(NAMES, st.lists(PRONUNCIATIONS, min_size=1, max_size=3).map(tuple), min_size=1)


@settings(max_examples=50, deadline=None)
@given(LEXICONS)
def test_a_lexicon_that_is_written_and_read_is_the_same(
    pronunciations: dict[str, tuple[tuple[str, ...], ...]],
) -> None:
    lexicon = Lexicon(pronunciations)
    with TemporaryDirectory() as folder:
        path = Path(folder, "lexicon.txt")
        lexicon.write(path)
        assert Lexicon.read(path) == lexicon


def test_a_line_of_a_lexicon_ends_with_its_line_feed(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_bytes("a A\u2028B\r\nb B\x0bK\n".encode())
    assert Lexicon.read(path).pronunciations == {"a": (("A", "B"),), "b": (("B", "K"),)}


def test_words_pronunciations_and_phones_are_sorted_and_silence_is_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("the DH IY\nbee B IY\n\nthe  DH\tAX\nthe DH AX\n")
    lexicon = Lexicon.read(path)
    assert lexicon.words == ["bee", "the"]
    assert lexicon.pronunciations["the"] == (("DH", "AX"), ("DH", "IY"))
    assert lexicon.phones == ["AX", "B", "DH", "IY"]
    lexicon.write(path)
    assert path.read_text() == "bee B IY\nthe DH AX\nthe DH IY\n"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no lexicon at .*lexicon\.txt"):
        Lexicon.read(tmp_path / "lexicon.txt")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"\n", "is empty"),
        (b"a AX\nbee\n", "line 2: word 'bee' has no phones"),
        (b"a AX\n\nbee B SIL\n", "line 3: word 'bee' is pronounced with SIL"),
        (b"caf\xe9 K AE F EY\n", "not UTF-8"),
    ],
)
def test_a_wrong_line_is_named(contents: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        Lexicon.read(path)


@pytest.mark.parametrize(
    "pronunciations", [{"a": ()}, {"a": ((),)}, {"a b": (("AX",),)}, {"a": (("A X",),)}, {"": (("AX",),)}]
)
def test_what_could_not_be_written_is_refused(pronunciations: dict[str, tuple[tuple[str, ...], ...]]) -> None:
    with pytest.raises(ValueError, match=r"pronunciation|phones|white space"):
        Lexicon(pronunciations)


def test_a_base_phone_is_without_stress_and_place_in_the_word() -> None:
    assert base_phones(["SIL", "AE1_B", "AE0_E", "K_I", "T_S"]) == ["SIL", "AE", "AE", "K", "T"]
    assert base_phones(["SIL", "AE1", "K"]) == ["SIL", "AE", "K"]


def test_a_sound_that_is_spelled_like_a_mark_is_none_where_other_phones_are_unmarked() -> None:
    x_sampa = ["SIL", "t", "t_S", "a", "I_E"]
    assert not marks_positions(x_sampa)
    assert base_phones(x_sampa) == x_sampa
    marked = [*mark_positions(("t_S", "a")), *mark_positions(("t",))]
    assert base_phones(marked) == ["t_S", "a", "t"]


def test_kaldis_phones_with_and_without_a_place_are_marked_ones() -> None:
    noise = ["SPN", *(f"SPN_{place}" for place in "BIES")]
    assert base_phones(["SIL", "SIL_B", *noise, "K_B"]) == ["SIL", "SIL", *["SPN"] * 5, "K"]
    assert base_phones(["SIL", *noise[:-1], "K_B"]) == ["SIL", *noise[:-1], "K_B"]


def test_a_byte_order_mark_is_part_of_no_word(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_bytes(b"\xef\xbb\xbfa AX\n")
    assert Lexicon.read(path).words == ["a"]
