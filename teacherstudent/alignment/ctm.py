"""CTM files: `utterance channel start duration symbol [confidence]` a line, times in seconds.

Comments begin with `;;`. Phones may be numbers, as Kaldi's ali-to-phones --ctm-output writes them: phones.txt beside
the file then names them.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from teacherstudent.alignment.alignments import AlignmentError

Segment = tuple[float, float, str]  # start, end, symbol
_NO_WORDS = {"", "<eps>"}


def read_lines(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(utterance id, its lines) as they follow each other; an utterance may come again."""
    for path in paths:
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
                lines = (line for line in file if line.strip() and not line.startswith(";;"))
                for utterance, its in groupby(lines, key=lambda line: line.split(maxsplit=1)[0]):
                    yield utterance, "".join(line if line.endswith("\n") else line + "\n" for line in its)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}. A CTM file is text, gzipped or not") from None


def parse_lines(lines: str) -> list[Segment]:
    """Raises AlignmentError for a line that is none of a CTM."""
    segments = []
    for line in lines.removesuffix("\n").split("\n"):
        fields = line.split()
        try:
            start, duration = float(fields[2]), float(fields[3])
            segments.append((start, start + duration, fields[4]))
        except (IndexError, ValueError):
            raise AlignmentError(
                f"a line that is not `utterance channel start duration symbol`: {line!r}"
            ) from None
    return segments


def phones_of(lines: str, names: Mapping[int, str]) -> list[Segment]:
    """names: of phones that are numbers."""
    segments = parse_lines(lines)
    if not names or not all(symbol.isdecimal() for _, _, symbol in segments):
        return segments
    missing = sorted({symbol for _, _, symbol in segments if int(symbol) not in names})
    if missing:
        raise AlignmentError(f"phones that phones.txt lacks: {' '.join(missing)}")
    return [(start, end, names[int(symbol)]) for start, end, symbol in segments]


def words_of(lines: str) -> list[Segment]:
    return [segment for segment in parse_lines(lines) if segment[2] not in _NO_WORDS]
