from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.data.lexicon import SILENCE, Lexicon

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
