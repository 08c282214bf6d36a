"""CTM files are read line by line, and a bad line costs its utterance, not the corpus."""

import gzip

import pytest

from teacherstudent.alignment.alignments import AlignmentError
from teacherstudent.alignment.ctm import phones_of, read_lines, words_of


@pytest.mark.parametrize("name", ["phones.ctm", "phones.ctm.gz"])
def test_an_utterance_s_lines_are_found_wherever_they_are(name, tmp_path) -> None:
    text = ";; comment\nb 1 0 0.1 A\n\na A 0.0 0.2 B 0.9\na A 0.2 0.1 A 0.9\nb 1 0.1 0.1 B"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = list(read_lines([tmp_path / name]))
    assert found == [
        ("b", "b 1 0 0.1 A\n"),
        ("a", "a A 0.0 0.2 B 0.9\na A 0.2 0.1 A 0.9\n"),
        ("b", "b 1 0.1 0.1 B\n"),
    ]
    assert phones_of(found[1][1], {}) == [(0.0, 0.2, "B"), (0.2, pytest.approx(0.3), "A")]


def test_numbers_are_named_by_phones_txt() -> None:
    lines = "u 1 0 0.1 1\nu 1 0.1 0.1 2\n"
    assert [symbol for *_, symbol in phones_of(lines, {1: "SIL", 2: "A"})] == ["SIL", "A"]
    with pytest.raises(AlignmentError, match=r"phones\.txt lacks: 2"):
        phones_of(lines, {1: "SIL"})
    assert [symbol for *_, symbol in phones_of("u 1 0 0.1 A\n", {1: "SIL"})] == ["A"]


def test_silence_between_words_is_no_word() -> None:
    assert words_of("u 1 0.5 0.25 to\nu 1 0.75 0.1 <eps>\n") == [(0.5, 0.75, "to")]


@pytest.mark.parametrize("line", ["u 1 0.0 0.1", "u 1 zero 0.1 A", "u"])
def test_a_bad_line_is_shown(line) -> None:
    with pytest.raises(AlignmentError, match=f"duration symbol`: '{line}'"):
        phones_of(f"u 1 0 0.1 A\n{line}\n", {})


def test_a_line_ends_with_its_line_feed() -> None:
    lines = "u 1 0 0.1 A\u2028 0.9\nu 1 0.1 0.1 B\n"
    assert [symbol for *_, symbol in phones_of(lines, {})] == ["A", "B"]


def test_a_file_that_is_no_text_is_named(tmp_path) -> None:
    damaged = bytearray(gzip.compress(b"u 1 0 0.1 A\n", mtime=0))
    damaged[10] |= 7  # the first block is of a kind that there is not
    contents_of = {"a.ctm.gz": b"u 1 0 0.1 A\n", "a.ctm": b"\xff\xfe\x00", "b.ctm.gz": bytes(damaged)}
    for name, contents in contents_of.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=name):
            list(read_lines([tmp_path / name]))
