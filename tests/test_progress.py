"""Progress where nobody watches: a log keeps lines, and few of them."""

import sys

import pytest

from teacherstudent import progress
from teacherstudent.progress import hours_bar


def test_a_log_gets_a_line_at_the_beginning_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with hours_bar(7200, "features") as bar:
        for _ in range(100):
            bar.update(72, loss="1.25")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("features:   0%")
    assert last.startswith("features: 100%")
    assert "2.00/2.00 h" in last
    assert "loss=1.25" in last


def test_a_line_comes_when_its_time_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    with progress.hours_bar(7200, "features") as bar:
        for _ in range(4):
            bar.update(1800)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("|")[0] for line in lines] == [f"features: {n:3d}%" for n in (0, 25, 50, 75, 100)]


def test_a_terminal_sees_one_line_written_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with hours_bar(7200, "features") as bar:
        bar.update(7200)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.count("\r") >= 2


def test_nothing_is_shown_where_nothing_is_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    with hours_bar(7200, "features", show=False) as bar:
        bar.update(7200)
    assert capsys.readouterr().err == ""
