"""TextGrid files, as the Montreal Forced Aligner writes them: a tier "phones", and "words" for their places in words.

Tiers of several speakers ("anna - phones") are taken together. Reading is left to praatio: long and short format,
UTF-8 and UTF-16.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teacherstudent import wheels
from teacherstudent.alignment.alignments import AlignmentError, PhoneSegments
from teacherstudent.files import walk_files

EXTRA = "align"
_SUFFIX = ".textgrid"


def find_textgrids(folder: Path) -> Iterator[tuple[str, str]]:
    """(file name without its ending, path within the folder), in any depth: speaker/utterance.TextGrid."""
    for path in walk_files(folder):
        if path.suffix.lower() == _SUFFIX:
            yield path.stem, path.relative_to(folder).as_posix()


def read_textgrid(path: Path) -> tuple[PhoneSegments, float]:
    """Its phones, with its words if it has such a tier, and the end of its time line in seconds.

    Intervals without a label are gaps. Raises AlignmentError for a file that is no TextGrid or has no such tier.
    """
    textgrid = wheels.load("praatio.textgrid", EXTRA)
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="silence")
    except Exception as error:  # praatio raises many kinds, KeyError and IndexError among them
        raise AlignmentError(f"a TextGrid that cannot be read: {path.name}: {error}") from None
    phones, words = _labels(grid, "phones"), _labels(grid, "words")
    if phones is None:
        raise AlignmentError(
            f'a TextGrid without a tier "phones": it has {", ".join(grid.tierNames) or "none"}'
        )
    return PhoneSegments.of(phones, words), float(grid.maxTimestamp)


def _labels(grid: Any, kind: str) -> list[tuple[float, float, str]] | None:
    """(start, end, label) of the tiers of that kind; None without one."""
    tiers = [tier for tier in grid.tiers if tier.name.rpartition(" - ")[2].strip().lower() == kind]
    entries = [
        (float(start), float(end), label.strip())
        for tier in tiers
        for start, end, label in tier.entries
        if label.strip()
    ]
    return entries if tiers else None
