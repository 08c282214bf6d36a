"""TextGrids of every format and encoding that aligners and Praat write say the same."""

import codecs

import pytest
from tiny_alignments import write_textgrid

from teacherstudent.alignment.alignments import AlignmentError
from teacherstudent.alignment.textgrid import find_textgrids, read_textgrid

PHONES = [(0.1, 0.3, "AE1"), (0.3, 0.45, "K")]
WORDS = [(0.1, 0.45, 'say ""ack""')]
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
0.6
<exists>
2
"IntervalTier"
"words"
0
0.6
3
0
0.1
""
0.1
0.45
"say ""ack\"""
0.45
0.6
""
"IntervalTier"
"phones"
0
0.6
4
0
0.1
""
0.1
0.3
"AE1"
0.3
0.45
"K"
0.45
0.6
""
"""


def long(tmp_path, tiers=None) -> str:
    path = tmp_path / "long.TextGrid"
    write_textgrid(path, 0.6, tiers or {"words": WORDS, "phones": PHONES})
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "mark, encoding",
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
@pytest.mark.parametrize("layout", ["long", "short"])
def test_every_format_and_encoding_reads_the_same(layout, mark, encoding, line_end, tmp_path) -> None:
    text = long(tmp_path) if layout == "long" else SHORT
    path = tmp_path / "u.TextGrid"
    path.write_bytes(mark + text.replace("\n", line_end).encode(encoding))
    segments, end = read_textgrid(path)
    assert (segments.starts.tolist(), segments.ends.tolist()) == ([0.1, 0.3], [0.3, 0.45])
    assert segments.phones == ("AE1", "K")
    assert segments.words is not None
    assert segments.words[0][:2] == (0.1, 0.45) and len(segments.words) == 1
    assert end == 0.6


def test_speakers_are_taken_together(tmp_path) -> None:
    tiers = {
        "anna - phones": [(0.0, 0.2, "A")],
        "ben - phones": [(0.3, 0.5, "B")],
        "notes": [(0.0, 0.1, "x")],
    }
    path = tmp_path / "u.TextGrid"
    write_textgrid(path, 0.6, tiers)
    segments, _ = read_textgrid(path)
    assert segments.phones == ("A", "B")
    assert segments.words is None


def test_files_are_found_in_any_depth_by_their_name(tmp_path) -> None:
    for path in ("anna/u1.TextGrid", "ben/later/u2.textgrid", "u3.TextGrid", "u4.txt"):
        write_textgrid(tmp_path / path, 0.6, {"phones": PHONES})
    (tmp_path / "ben" / "later").rename(tmp_path.with_name("elsewhere"))
    (tmp_path / "ben" / "later").symlink_to(tmp_path.with_name("elsewhere"))
    assert dict(find_textgrids(tmp_path)) == {
        "u1": "anna/u1.TextGrid",
        "u2": "ben/later/u2.textgrid",
        "u3": "u3.TextGrid",
    }


def test_a_file_without_phones_or_of_another_kind_costs_its_utterance_alone(tmp_path) -> None:
    whole = long(tmp_path, {"words": WORDS})
    path = tmp_path / "u.TextGrid"
    for contents, message in ((whole, 'without a tier "phones": it has words'), (whole[:300], "cannot be read"),
                              ("", "cannot be read"), ("\0\1", "cannot be read")):  # fmt: skip
        path.write_text(contents)
        with pytest.raises(AlignmentError, match=message):
            read_textgrid(path)
    with pytest.raises(AlignmentError, match="cannot be read"):
        read_textgrid(tmp_path / "absent.TextGrid")
