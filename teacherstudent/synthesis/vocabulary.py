"""Sentences over an open vocabulary: pseudo-words, or the words of a list.

Word frequencies follow the law of Zipf and Mandelbrot: the word of rank r comes in proportion to 1 / (r + 2.7). Words
are not independent of each other, so that there is something for a language model to learn: a word has followers that
come more often than others do, and their frequencies follow the same law.

The length of a vocabulary is bounded by what people can wait for: every word is said a few times in every accent
before the first sentence is recorded.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from teacherstudent.data.lexicon import SILENCE
from teacherstudent.files import split_lines
from teacherstudent.synthesis.pseudo_words import make_pseudo_words

SENTENCE_WORDS = (3, 12)
OFFSET = 2.7  # Mandelbrot's, to Zipf's rank
FOLLOWING_SHARE = 0.5  # of the words after the first
FOLLOWING_TURN = (
    5**0.5 - 1
) / 2  # the golden section: followers of neighbours in rank are far from each other
FOLLOWING_SPREAD = 0.002
CARRIER_ROUNDS = 6  # every word comes in each


@dataclass(frozen=True)
class Vocabulary:
    """words: the most frequent first. spoken: what espeak-ng is given for a word, if not the word itself."""

    words: tuple[str, ...]
    spoken: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """(V,) up to 1."""
        weights = 1 / (np.arange(1, len(self.words) + 1) + OFFSET)
        return np.cumsum(weights) / weights.sum()

    def draw(self, rng: np.random.Generator) -> str:
        """A walk over the unit interval, in which each word has as much room as its frequency.

        A step goes anywhere, or on by a fixed angle and a little more: both leave a place uniform over the interval,
        and so the word frequencies as they are.
        """
        lowest, highest = SENTENCE_WORDS
        place = rng.random()
        words = [self._word_at(place)]
        for _ in range(int(rng.integers(lowest, highest + 1)) - 1):
            if rng.random() < FOLLOWING_SHARE:
                place = (place + FOLLOWING_TURN + FOLLOWING_SPREAD * rng.random()) % 1.0
            else:
                place = rng.random()
            words.append(self._word_at(place))
        return " ".join(words)

    def _word_at(self, place: float) -> str:
        index = int(np.searchsorted(self._cumulative, place, side="right"))
        return self.words[min(index, len(self.words) - 1)]  # the last sum may round to less than 1

    def spell(self, text: str) -> str:
        return " ".join(self.spoken.get(word, word) for word in text.split())

    def draw_carriers(self, accent: str) -> Iterator[str]:
        """Every word CARRIER_ROUNDS times among words drawn as in sentences, in other company by accent."""
        rng = np.random.default_rng([zlib.crc32(b"carriers"), zlib.crc32(accent.encode())])
        for _ in range(CARRIER_ROUNDS):
            order = rng.permutation(len(self.words))
            place = 0
            while place < len(order):
                company = self.draw(rng).split()[::2]
                chosen = [self.words[index] for index in order[place : place + len(company)]]
                place += len(company)
                pairs = zip(company, chosen) if rng.random() < 0.5 else zip(chosen, company)
                yield " ".join(word for pair in pairs for word in pair)


def make_vocabulary(count: int, seed: int) -> Vocabulary:
    """Pseudo-words, each given to espeak-ng in phonemes."""
    words = make_pseudo_words(count, seed)
    return Vocabulary(tuple(word.spelling for word in words), {word.spelling: word.spoken for word in words})


def read_vocabulary(path: Path, count: int) -> Vocabulary:
    """The first `count` words of a list, a word a line, the most frequent first; there may be fewer.

    Raises ValueError naming the file and the line that is wrong.
    """
    try:
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(
            f"corpus.text = {str(path)!r}: it must be 'grammar', 'pseudo-words' or the path of a word list, and there "
            "is no such file"
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is no word list: {error}; UTF-8 text is needed, a word a line") from None
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        if len(places) == count:
            break
        if not word:
            continue
        if len(word.split()) > 1:
            raise ValueError(f"{path}, line {number}: {word!r} is more than one word; one a line is needed")
        if word in places:
            raise ValueError(f"{path}, line {number}: {word!r} is on line {places[word]} too; each word once")
        if "[[" in word or word == SILENCE:
            raise ValueError(
                f"{path}, line {number}: {word!r} cannot be a word: it has a meaning of its own here"
            )
        places[word] = number
    if not places:
        raise ValueError(f"{path} has no words: a word a line is needed")
    return Vocabulary(tuple(places))
