"""Phones in time, from wherever they come, and the 30 ms frames that they fall on.

A frame belongs to the phone that is spoken at its centre; a gap in the alignment is silence. A phone too short
to hold a frame's centre has no frame.
"""
# N segments, W words, T frames of 30 ms

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.lexicon import SILENCE, mark_positions

LENGTH_TOLERANCE_SECONDS = 0.06  # two frames: an alignment further from the audio's length is of other audio
OVERLAP_TOLERANCE_SECONDS = 0.011  # what times rounded to 10 ms can overlap by; the later phone then has it
_DECIMALS = 8  # of seconds, as lhotse rounds its times
_SILENCES = {"", "sil", "sp", "silence", "<sil>", "<eps>"}


class AlignmentError(ValueError):
    """Why one utterance has no alignment. What comes before the first colon says the kind, which is counted."""

    @property
    def kind(self) -> str:
        return str(self).partition(":")[0]


Word = tuple[float, float, str]  # start, end, and what it is; "" for one of which most was cut off


@dataclass(frozen=True)
class PhoneSegments:
    """The phones of one utterance, one after the other.

    starts, ends: (N,) seconds from the utterance's beginning, ascending. phones: N symbols. words: W of them in
    order, None where the source has none. Raises AlignmentError for times that go backwards.
    """

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    phones: tuple[str, ...]
    words: tuple[Word, ...] | None = None

    def __post_init__(self) -> None:
        starts, ends = (
            np.round(np.asarray(times, np.float64), _DECIMALS) for times in (self.starts, self.ends)
        )
        assert len(starts) == len(ends) == len(self.phones)
        if not (np.isfinite(starts).all() and np.isfinite(ends).all()) or (ends < starts).any():
            raise AlignmentError(
                "times that are none: a phone ends before it starts, or a time is not finite"
            )
        overlaps = np.maximum.accumulate(ends)[:-1] - starts[1:]
        if (overlaps > OVERLAP_TOLERANCE_SECONDS).any() or (np.diff(starts) < 0).any():
            place = int(np.argmax(overlaps))
            raise AlignmentError(
                f"phones that overlap: {self.phones[place]} ends at {ends[place]:g} s, {self.phones[place + 1]} "
                f"starts at {starts[place + 1]:g} s"
            )
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "ends", ends)
        object.__setattr__(self, "phones", tuple(self.phones))

    @classmethod
    def of(
        cls, phones: Iterable[tuple[float, float, str]], words: Iterable[Word] | None = None
    ) -> "PhoneSegments":
        """From (start, end, symbol), and words, both in any order."""
        ordered = sorted(phones, key=lambda segment: segment[:2])
        starts, ends, symbols = zip(*ordered) if ordered else ((), (), ())
        said = None if words is None else tuple(sorted(words))
        return cls(np.array(starts, np.float64), np.array(ends, np.float64), symbols, said)

    def at_speed(self, speed: float) -> "PhoneSegments":
        """Of the same utterance played `speed` times as fast."""
        words = [(start / speed, end / speed, word) for start, end, word in self.words or ()]
        return self._like(self.starts / speed, self.ends / speed, words)

    def within(self, start: float, duration: float) -> "PhoneSegments":
        """The part from `start` seconds on, which becomes 0; what lies outside is cut off."""
        end = start + duration
        inside = (self.ends > start) & (self.starts < end)
        phones = tuple(phone for phone, kept in zip(self.phones, inside) if kept)
        starts, ends = (np.clip(times[inside], start, end) - start for times in (self.starts, self.ends))
        words = [
            (max(begin - start, 0.0), min(stop - start, duration), word * (start <= (begin + stop) / 2 < end))
            for begin, stop, word in self.words or ()
            if stop > start and begin < end
        ]
        return PhoneSegments(starts, ends, phones, None if self.words is None else tuple(words))

    def later(self, offset: float, duration: float) -> "PhoneSegments":
        """By `offset` seconds, but for the first phone if it begins with the audio and the last if it ends with it.

        So does a last word.
        """
        starts, ends = (np.clip(times + offset, 0.0, duration) for times in (self.starts, self.ends))
        starts[self.starts == 0] = 0.0
        if len(ends) and duration - self.ends[-1] <= LENGTH_TOLERANCE_SECONDS:
            ends[-1] = duration
        words = [
            (start + offset, duration if duration - end <= LENGTH_TOLERANCE_SECONDS else end + offset, word)
            for start, end, word in self.words or ()
        ]
        return self._like(starts, ends, words)

    def _like(self, starts: NDArray, ends: NDArray, words: Iterable[Word]) -> "PhoneSegments":
        return PhoneSegments(starts, ends, self.phones, None if self.words is None else tuple(words))

    @classmethod
    def join(cls, parts: Sequence["PhoneSegments"]) -> "PhoneSegments":
        """Of one utterance's parts, in any order."""
        phones = [segment for part in parts for segment in zip(part.starts, part.ends, part.phones)]
        known = [part.words for part in parts if part.words is not None]
        words = [word for several in known for word in several]
        return cls.of(phones, words if 0 < len(known) == len(parts) else None)

    @property
    def spoken(self) -> NDArray[np.bool_]:
        """(N,) whether it is a phone of the lexicon, not silence."""
        return np.array([phone != SILENCE for phone in self.phones], bool)


@dataclass(frozen=True)
class PhoneNames:
    """The lexicon's names for the phones of an alignment.

    phones: the lexicon's. word_positions: whether they carry the place in the word (AE1_B), which an alignment
    without it then gets from its words.
    """

    phones: frozenset[str]
    word_positions: bool

    def rename(self, segments: PhoneSegments) -> PhoneSegments:
        """Raises AlignmentError for phones that the lexicon lacks, or that cannot be marked by their words."""
        name = {phone: self._name(phone) for phone in set(segments.phones)}
        names = tuple(name[phone] for phone in segments.phones)
        unknown = sorted({name for name in names if name != SILENCE} - self.phones)
        if unknown and self.word_positions and all(self._can_be_marked(name) for name in unknown):
            names = self._mark(names, segments)
            unknown = sorted({name for name in names if name != SILENCE} - self.phones)
        if unknown:
            raise AlignmentError(f"phones that are not in the lexicon: {' '.join(unknown)}")
        if set(names) <= {SILENCE}:
            raise AlignmentError("nothing but silence in the alignment")
        return PhoneSegments(segments.starts, segments.ends, names, segments.words)

    def _name(self, phone: str) -> str:
        plain = re.sub(r"_[BIES]$", "", phone).lower()
        return SILENCE if plain in _SILENCES and phone not in self.phones else phone

    def _can_be_marked(self, phone: str) -> bool:
        return any(f"{phone}_{place}" in self.phones for place in "BIES")

    def _mark(self, names: Sequence[str], segments: PhoneSegments) -> tuple[str, ...]:
        """A phone belongs to the word that is said at its middle."""
        if segments.words is None:
            raise AlignmentError(
                "phones without their place in the word: data.word_positions needs phones such as AE1_B, or the times "
                "of the words (lhotse 'word' items, words.ctm, a 'words' tier); or set data.word_positions = false"
            )
        middles = (segments.starts + segments.ends) / 2
        begun = np.searchsorted([start for start, _, _ in segments.words], middles, side="right") - 1
        marked = list(names)
        members: dict[int, list[int]] = {}
        for place, name in enumerate(names):
            if name == SILENCE:
                continue
            word = int(begun[place])
            if word < 0 or middles[place] > segments.words[word][1]:
                raise AlignmentError(f"phones in no word: {name} at {segments.starts[place]:g} s")
            members.setdefault(word, []).append(place)
        for places in members.values():
            for place, name in zip(places, mark_positions(tuple(names[place] for place in places))):
                marked[place] = name
        return tuple(marked)


def frame_centres(num_frames: int) -> NDArray[np.float64]:
    """Seconds."""
    return np.round((np.arange(num_frames) + 0.5) * FRAME_SHIFT_SECONDS, _DECIMALS)


def frame_labels(
    starts: ArrayLike, ends: ArrayLike, phones: ArrayLike, num_frames: int
) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Phone of each 30 ms frame and whether the frame is the first of its phone.

    starts, ends: seconds from the utterance's beginning, ascending; phones: their ids; silence has id 1.
    Returns (num_frames,) int16 and (num_frames,) bool.
    """
    centres = frame_centres(num_frames)
    segment = np.searchsorted(np.asarray(starts), centres, side="right") - 1
    covered = (segment >= 0) & (centres < np.asarray(ends)[np.maximum(segment, 0)])
    phone = np.where(covered, np.asarray(phones)[np.maximum(segment, 0)], 1).astype(np.int16)
    place = np.where(phone == 1, -1, segment)  # silence beside silence is one, aligned or a gap
    return phone, np.diff(place, prepend=-2) != 0


def frame_values(
    starts: NDArray[np.float64], ends: NDArray[np.float64], values: NDArray[np.int32], num_frames: int
) -> NDArray[np.int32]:
    """(num_frames,) the value that holds at each 30 ms frame's centre, where values[i] holds from starts[i] on.

    Raises AlignmentError where none holds for longer than rounding explains: nothing says what silence's value is.
    """
    centres = frame_centres(num_frames)
    from_, to = np.append(0.0, ends), np.append(starts, centres[-1:])
    place = int(np.argmax(to - from_))
    if to[place] - from_[place] > LENGTH_TOLERANCE_SECONDS or not len(values):
        raise AlignmentError(
            f"a gap in an alignment of pdfs: from {from_[place]:.2f} to {to[place]:.2f} s; pdf ids are needed for all "
            "of a cut"
        )
    segment = np.searchsorted(starts, centres, side="right") - 1
    return values[np.maximum(segment, 0)]


@dataclass
class Shifts:
    """How far boundaries lie from where they were, in tenths of a millisecond; they add up over shards."""

    counts: Counter[int] = field(default_factory=Counter)
    utterances: int = 0

    def add(self, seconds: NDArray[np.float64]) -> None:
        """One utterance's."""
        self.counts.update(np.rint(seconds * 1e4).astype(int).tolist())
        self.utterances += 1

    def merge(self, other: "Shifts") -> None:
        self.counts.update(other.counts)
        self.utterances += other.utterances

    def as_dict(self) -> dict[str, object]:
        return {
            "utterances": self.utterances,
            "counts": {str(tenths): self.counts[tenths] for tenths in sorted(self.counts)},
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> "Shifts":
        counts = Counter({int(tenths): count for tenths, count in values["counts"].items()})
        return cls(counts, values["utterances"])

    def summary(self) -> dict[str, float | int | None]:
        """Medians in milliseconds; None without boundaries."""
        absolute: Counter[int] = Counter()
        for tenths, count in self.counts.items():
            absolute[abs(tenths)] += count
        return {
            "utterances": self.utterances,
            "boundaries": self.counts.total(),
            "median_ms": _median(self.counts),
            "median_absolute_ms": _median(absolute),
        }


def _median(counts: Counter[int]) -> float | None:
    total = counts.total()
    if not total:
        return None
    values = sorted(counts)
    reached = np.cumsum([counts[value] for value in values])
    low, high = (
        values[int(np.searchsorted(reached, rank, side="right"))] for rank in ((total - 1) // 2, total // 2)
    )
    return round((low + high) / 20, 2)


def grid_shifts(
    segments: PhoneSegments, phone: NDArray[np.int16], first: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Seconds by which the frames of frame_labels that open a phone begin after the phone itself."""
    opening = np.flatnonzero(first & (phone != 1))
    segment = np.searchsorted(segments.starts, frame_centres(len(phone))[opening], side="right") - 1
    return opening * FRAME_SHIFT_SECONDS - segments.starts[segment]


def boundary_shifts(segments: PhoneSegments, others: PhoneSegments) -> NDArray[np.float64] | None:
    """Seconds by which phones start later than in another alignment; None where the phones are not the same.

    Silence is not compared: where it is heard, and whether, differs.
    """
    here, there = (
        (alignment.starts[alignment.spoken], [phone for phone in alignment.phones if phone != SILENCE])
        for alignment in (segments, others)
    )
    return here[0] - there[0] if here[1] == there[1] else None
