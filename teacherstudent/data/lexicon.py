"""The lexicon: how each word is pronounced, one pronunciation a line, `word phone phone …` (Kaldi's lexicon.txt).

A word may have several lines. Silence is no word's phone: it stands between words.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from teacherstudent.files import split_lines

SILENCE = "SIL"
_POSITION = re.compile("_[BIES]$")

Pronunciation = tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """Words and their pronunciations, both sorted; every word has at least one.

    Raises ValueError for a word without a pronunciation, a pronunciation without a phone, a name with white
    space in it, or silence within a pronunciation.
    """

    pronunciations: Mapping[str, tuple[Pronunciation, ...]]

    def __post_init__(self) -> None:
        for word, pronunciations in self.pronunciations.items():
            if not pronunciations:
                raise ValueError(f"word {word!r} has no pronunciation: at least one is needed")
            for phones in pronunciations:
                _check(word, phones)
        ordered = {
            word: tuple(sorted(set(self.pronunciations[word]))) for word in sorted(self.pronunciations)
        }
        object.__setattr__(self, "pronunciations", ordered)

    @property
    def words(self) -> list[str]:
        return list(self.pronunciations)

    @cached_property
    def phones(self) -> list[str]:
        """Every phone of a pronunciation, sorted; silence is not among them."""
        return sorted(
            {phone for several in self.pronunciations.values() for phones in several for phone in phones}
        )

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Pronunciation]]) -> "Lexicon":
        """From (word, pronunciation) pairs in any order; a pair may come twice."""
        pronunciations: dict[str, tuple[Pronunciation, ...]] = {}
        for word, phones in pairs:
            pronunciations[word] = (*pronunciations.get(word, ()), tuple(phones))
        return cls(pronunciations)

    @classmethod
    def read(cls, path: Path) -> "Lexicon":
        """Raises ValueError naming the file, and the line that is wrong."""
        try:
            lines = split_lines(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ValueError(
                f"no lexicon at {path}: a text file is needed, `word phone phone …` a line"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        pairs = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            word, *phones = line.split()
            if phones == [SILENCE]:  # Kaldi's `!SIL SIL` names silence itself, which is no word
                continue
            try:
                _check(word, phones)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            pairs.append((word, tuple(phones)))
        if not pairs:
            raise ValueError(f"{path} is empty: `word phone phone …` is needed, one pronunciation a line")
        return cls.of(pairs)

    def with_word_positions(self) -> "Lexicon":
        """Every phone marked by its place in the word: _B first, _I inside, _E last, _S alone (as Kaldi does)."""
        return Lexicon(
            {
                word: tuple(mark_positions(phones) for phones in several)
                for word, several in self.pronunciations.items()
            }
        )

    def write(self, path: Path) -> None:
        lines = [
            f"{word} {' '.join(phones)}\n"
            for word, several in self.pronunciations.items()
            for phones in several
        ]
        path.write_text("".join(lines), encoding="utf-8")


def mark_positions(phones: Pronunciation) -> Pronunciation:
    """("K", "AE", "T") -> ("K_B", "AE_I", "T_E")."""
    if len(phones) == 1:
        return (f"{phones[0]}_S",)
    return (f"{phones[0]}_B", *(f"{phone}_I" for phone in phones[1:-1]), f"{phones[-1]}_E")


def marks_positions(phones: Iterable[str]) -> bool:
    """Whether the phones of an inventory carry the place in the word; silence never does.

    A single name cannot tell: X-SAMPA's t_S is a sound. All must be marked, but for those that Kaldi has in all four
    places and without one, such as SPN.
    """
    names = set(phones) - {SILENCE}
    return all(
        _POSITION.search(name) or names.issuperset(f"{name}_{place}" for place in "BIES") for name in names
    )


def base_phones(phones: Sequence[str]) -> list[str]:
    """Of each phone of an inventory, without stress and, where they carry it, the place in the word: AE1_B -> AE."""
    marked = marks_positions(phones)
    plain = (_POSITION.sub("", phone) if marked else phone for phone in phones)
    return [re.sub(r"(?<=\D)[0-9]$", "", phone) for phone in plain]


def _check(word: str, phones: Iterable[str]) -> None:
    phones = list(phones)
    if not phones:
        raise ValueError(f"word {word!r} has no phones: `word phone phone …` is needed")
    for name in (word, *phones):
        if name.split() != [name]:
            raise ValueError(
                f"word {word!r}: {name!r} is empty or has white space in it, which separates names"
            )
    if SILENCE in phones:
        raise ValueError(f"word {word!r} is pronounced with {SILENCE}, which stands only between words")
