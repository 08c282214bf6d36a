"""When each word of a hypothesis was said.

On a decoding graph a word is written where it is first certain, after its first phones or at its end, so the
graph's best path does not tell when a word begins. Instead the words are aligned anew, over a small graph of their
pronunciations with optional silence around every word, in which every state knows its word and its phone. Words,
pronunciations, silences and durations weigh in the decoding graph as much on one path as on another (graph.py,
kaldi_tree.py), so the best path here is the decoder's own best path for these words.
"""
# T frames, S senones, M places: a phone between two neighbours, with two states each

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from teacherstudent.data.lexicon import Lexicon
from teacherstudent.tying.senones import SILENCE_ID, Inventory

SILENT = -1  # the word of a frame between words


@dataclass(frozen=True)
class Segment:
    """A phone (its id) of a word (an index into the words, or SILENT), from frame `start` until before `end`."""

    phone: int
    word: int
    start: int
    end: int


@dataclass(frozen=True)
class _Token:
    """A phone of the sentence: `rest` follows it in its pronunciation, then comes word `following`."""

    phone: int
    word: int
    rest: tuple[int, ...]
    following: int


@dataclass(frozen=True)
class _Places:
    """senones: (M, 2) of a phone's first and of its later frames; before: (M, at most P) the places that lead
    here, padded with M; opens, ends: (M,) where a sentence may begin and end.
    """

    tokens: list[_Token]
    senones: NDArray[np.int64]
    before: NDArray[np.int64]
    opens: NDArray[np.bool_]
    ends: NDArray[np.bool_]


class WordAligner:
    """Aligns words of a lexicon with frames."""

    def __init__(self, lexicon: Lexicon, inventory: Inventory) -> None:
        self._lexicon, self._inventory = lexicon, inventory

    @cached_property
    def _phone_ids(self) -> dict[str, int]:
        return {phone: index + 1 for index, phone in enumerate(self._inventory.phones)}

    def segments(
        self, scores: NDArray[np.float32], words: Sequence[str], partial: bool = False
    ) -> tuple[list[Segment], float]:
        """The phones and silences of the words over all frames, and the sum of their scores.

        scores: (T, S), log posterior - log prior. partial: the last word may be cut off anywhere. Raises
        ValueError when the frames are too few for the words.
        """
        places = self._places(words, partial)
        path, score = _best_path(scores, places)
        if not path:
            raise ValueError(f"{len(scores)} frames are too few for the words {' '.join(words)!r}")
        segments: list[Segment] = []
        for frame, (place, first) in enumerate(path):
            token = places.tokens[place]
            if first:
                segments.append(Segment(token.phone, token.word, frame, frame + 1))
            else:
                last = segments[-1]
                segments[-1] = Segment(last.phone, last.word, last.start, frame + 1)
        return segments, score

    def word_frames(
        self, scores: NDArray[np.float32], words: Sequence[str], partial: bool = False
    ) -> list[tuple[int, int]]:
        """Of each word: its first frame, and the one after its last. Frames of silence belong to no word."""
        if not words:
            return []
        spans: dict[int, tuple[int, int]] = {}
        for segment in self.segments(scores, words, partial)[0]:
            if segment.word != SILENT:
                start, _ = spans.get(segment.word, (segment.start, 0))
                spans[segment.word] = (start, segment.end)
        return [spans[index] for index in range(len(words))]

    def _after(self, word: int, words: Sequence[str], silence: bool) -> list[_Token]:
        """What may come where word number `word` is next; silence: unless it was just there."""
        tokens = [_Token(SILENCE_ID, SILENT, (), word)] if silence else []
        if word < len(words):
            for phones in self._lexicon.pronunciations[words[word]]:
                first, *rest = (self._phone_ids[phone] for phone in phones)
                tokens.append(_Token(first, word, tuple(rest), word + 1))
        return tokens

    def _next(self, token: _Token, words: Sequence[str]) -> list[_Token]:
        if token.rest:
            return [_Token(token.rest[0], token.word, token.rest[1:], token.following)]
        return self._after(token.following, words, silence=token.word != SILENT)

    def _places(self, words: Sequence[str], partial: bool) -> _Places:
        """Every (left phone, token, next token or none) that the start leads to."""
        Key = tuple[int, _Token, _Token | None]

        def spread(left: int, token: _Token) -> list[Key]:
            over = not token.rest and token.following == len(words)
            return [(left, token, after) for after in (*self._next(token, words), *([None] if over else []))]

        opening = [key for token in self._after(0, words, silence=True) for key in spread(0, token)]
        numbers = {key: number for number, key in enumerate(opening)}
        keys, before = list(opening), [list[int]() for _ in opening]
        for number, (_, token, after) in enumerate(keys):  # grows while it is read
            for key in spread(token.phone, after) if after is not None else []:
                if key not in numbers:
                    numbers[key] = len(keys)
                    keys.append(key)
                    before.append([])
                before[numbers[key]].append(number)
        width = max(1, max(map(len, before)))
        padded = [[*row, *([len(keys)] * (width - len(row)))] for row in before]
        senones = [
            [
                self._inventory.senone(left, token.phone, after.phone if after else 0, state)
                for state in (0, 1)
            ]
            for left, token, after in keys
        ]
        ends = [after is None or (partial and token.following >= len(words)) for _, token, after in keys]
        opens = np.arange(len(keys)) < len(opening)
        return _Places([key[1] for key in keys], np.array(senones), np.array(padded), opens, np.array(ends))


def _best_path(scores: NDArray[np.float32], places: _Places) -> tuple[list[tuple[int, bool]], float]:
    """(place, whether it is the phone's first frame) of every frame, and the score; Viterbi. No path: ([], -inf)."""
    num_frames, num_places = len(scores), len(places.tokens)
    if not num_frames:
        return [], -np.inf
    first_scores, later_scores = (scores[:, places.senones[:, state]].astype(np.float64) for state in (0, 1))
    first = np.where(places.opens, first_scores[0], -np.inf)
    later = np.full(num_places, -np.inf)
    came_from = np.zeros((num_frames, num_places), np.int32)  # the place before, where a phone begins
    short = np.zeros(
        (num_frames, num_places), bool
    )  # whether the best way to be here has only the first frame
    rows = np.arange(num_places)
    for frame in range(1, num_frames):
        short[frame - 1] = first >= later
        best = np.append(np.maximum(first, later), -np.inf)
        choice = best[places.before].argmax(axis=1)
        came_from[frame] = places.before[rows, choice]
        first = best[came_from[frame]] + first_scores[frame]
        later = best[:-1] + later_scores[frame]
    short[-1] = first >= later
    total = np.where(places.ends, np.maximum(first, later), -np.inf)
    place = int(total.argmax())
    score = float(total[place])
    if score == -np.inf:
        return [], score
    path: list[tuple[int, bool]] = []
    for frame in reversed(range(num_frames)):
        is_first = bool(short[frame, place])
        path.append((place, is_first))
        if is_first and frame:
            place = int(came_from[frame, place])
    return path[::-1], score
