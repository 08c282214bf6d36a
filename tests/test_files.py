"""Files are whole or absent, and JSON is what JSON readers read."""

import json
import math
from pathlib import Path

import pytest

from teacherstudent.files import split_lines, walk_files, write_json


def test_json_is_written_in_the_order_given(tmp_path: Path) -> None:
    contents = {"b": [1, 2.5, None], "a": "é"}
    write_json(tmp_path / "x.json", contents)
    assert list(json.loads((tmp_path / "x.json").read_text()).items()) == list(contents.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_and_what_was_there_is_left(
    tmp_path: Path, value: float
) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"deep": [value]})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == 1


def test_every_file_is_found_once_behind_links_too_but_hidden_ones(tmp_path):
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    for path in (top / "b" / "2", top / "a" / "1", top / ".hidden", elsewhere / "deep" / "3"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (top / "c").symlink_to(elsewhere)
    (top / "b" / "up").symlink_to(top)
    (elsewhere / "deep" / "round").symlink_to(elsewhere)
    found = [path.relative_to(top).as_posix() for path in walk_files(top)]
    assert found == ["a/1", "b/2", "c/deep/3"]
    assert walk_files(tmp_path / "nowhere") == []


def test_lines_end_where_a_file_counts_them_and_nowhere_else():
    assert split_lines("") == []
    assert split_lines("a\n") == split_lines("a") == split_lines("a\r\n") == ["a"]
    assert split_lines("a\n\nb\u2028c\fd\x85e\n\n") == ["a", "", "b\u2028c\fd\x85e", ""]
