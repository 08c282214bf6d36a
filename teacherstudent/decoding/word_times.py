"""When each word of a hypothesis was said.

On a decoding graph a word is written where it is first certain, after its first phones or at its end, so the
graph's best path does not tell when a word begins. Instead the words are aligned anew, over a small graph of their
pronunciations with optional silence around every word, in which every state knows its word and its phone. Words,
pronunciations, silences and durations weigh in the decoding graph as much on one path as on another (graph.py,
kaldi_tree.py), so the best path here is the decoder's own best path for these words.
"""
# T frames, S senones, M places: a phone between two neighbours, with two states each

import math
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
        """Of each word: its first frame, and the one after its last. Frames of silence belong to no word.

        The graph writes a word one phone early: the last of a partial hypothesis may have no frame yet, and is then
        where the frames end.
        """
        if not words:
            return []
        try:
            segments, _ = self.segments(scores, words, partial)
        except ValueError:
            if not partial:
                raise
            return [*self.word_frames(scores, words[:-1], partial), (len(scores), len(scores))]
        spans: dict[int, tuple[int, int]] = {}
        for segment in segments:
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


_State = tuple[
    NDArray[np.float64], NDArray[np.float64]
]  # (M,) best scores of paths in a phone's first, later frames


def _best_path(scores: NDArray[np.float32], places: _Places) -> tuple[list[tuple[int, bool]], float]:
    """(place, whether it is the phone's first frame) of every frame, and the score; Viterbi. No path: ([], -inf).

    Of √T frames the scores are kept; what lies between is gone through once more on the way back, so that memory
    grows with √T · M: 10 minutes of speech (20,000 frames and places) take about 70 MB, an hour 15 times that.
    """
    num_frames = len(scores)
    if not num_frames:
        return [], -np.inf
    first = np.where(places.opens, scores[0].astype(np.float64)[places.senones[:, 0]], -np.inf)
    state: _State = first, np.full_like(first, -np.inf)
    block = math.isqrt(num_frames)
    kept = [state]  # at frames 0, block, 2 block, …
    for frame in range(1, num_frames):
        state, _ = _step(state, scores[frame], places)
        if frame % block == 0:
            kept.append(state)
    total = np.where(places.ends, np.maximum(*state), -np.inf)
    place = int(total.argmax())
    score = float(total[place])
    if score == -np.inf:
        return [], score
    path: list[tuple[int, bool]] = []
    for number, state in reversed(list(enumerate(kept))):
        steps = []
        for frame in range(number * block + 1, min((number + 1) * block + 1, num_frames)):
            state, came_from = _step(state, scores[frame], places)
            steps.append((state[0] >= state[1], came_from))
        for only_first, came_from in reversed(steps):
            path.append((place, bool(only_first[place])))
            if only_first[place]:
                place = int(came_from[place])
    return [(place, True), *path[::-1]], score


def _step(state: _State, scores: NDArray[np.float32], places: _Places) -> tuple[_State, NDArray[np.int64]]:
    """To the next frame. scores: (S,); returns with it (M,) the place before, for a phone that begins there."""
    row = scores.astype(np.float64)
    best = np.append(np.maximum(*state), -np.inf)
    choice = best[places.before].argmax(axis=1, keepdims=True)
    came_from = np.take_along_axis(places.before, choice, axis=1)[:, 0]
    opening, staying = places.senones.T
    return (best[came_from] + row[opening], best[:-1] + row[staying]), came_from
