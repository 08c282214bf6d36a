"""Whether an alignment is of what was said: its words are the transcript's, its phones near the lexicon's for it.

Files know utterances by id, and the id may be another corpus'. Words are compared by their letters and digits alone:
aligners change case, leave out punctuation and part words at apostrophes and hyphens. What stands in brackets
(<unk>, [laughter]) may be anything. Phones are those of another lexicon, perhaps, so up to half of them may differ
from the nearest pronunciation; chance agreement of other speech is far below that.
"""
# N phones

import re
import unicodedata
from collections.abc import Sequence
from fnmatch import translate

import numpy as np

from teacherstudent.alignment.alignments import AlignmentError, PhoneSegments
from teacherstudent.data.lexicon import SILENCE, Lexicon

MAX_DIFFERENT_SHARE = 0.5  # of an alignment's phones
_ANYTHING = re.compile(r"[<\[({].*[>\])}]|!.*")


def check_spelling(segments: PhoneSegments, transcript: str, lexicon: Lexicon) -> None:
    """Raises AlignmentError for an alignment of other words. segments: with the lexicon's names for phones."""
    if segments.words is not None:
        words = [word for *_, word in segments.words if word]
        if not _are_said(words, transcript):
            raise AlignmentError(
                f"alignment of other words: {' '.join(words)!r}, the transcript is {transcript!r}"
            )
    number, distance = int(segments.spoken.sum()), spelling_distance(segments, transcript, lexicon)
    if distance > MAX_DIFFERENT_SHARE * number:
        raise AlignmentError(
            f"alignment of other words: its {number} phones and what the lexicon has for {transcript!r} differ by "
            f"{distance}"
        )


def spelling_distance(segments: PhoneSegments, transcript: str, lexicon: Lexicon) -> int:
    """How many phones differ (edit distance) from the nearest pronunciation of the transcript; silence is not counted.

    Words that the lexicon lacks may have any phones.
    """
    phones = np.array([phone for phone in segments.phones if phone != SILENCE], str)
    distances = np.arange(len(phones) + 1)  # from what was said so far to the first 0 … N phones
    for word in transcript.split():
        several = lexicon.pronunciations.get(word)
        if several is None:
            distances = np.minimum.accumulate(distances)
        else:
            distances = np.minimum.reduce([_say(said, phones, distances) for said in several])
    return int(distances[-1])


def _say(said: Sequence[str], phones: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """(N + 1,) distances -> (N + 1,) after one pronunciation more."""
    places = np.arange(len(distances))
    for phone in said:
        taken = distances + 1
        taken[1:] = np.minimum(taken[1:], distances[:-1] + (phones != phone))
        distances = np.minimum.accumulate(taken - places) + places
    return distances


def _are_said(words: Sequence[str], transcript: str) -> bool:
    pattern = "".join("*" if _ANYTHING.fullmatch(word) else _letters(word) for word in words)
    said = "".join(_letters(word) for word in transcript.split() if not _ANYTHING.fullmatch(word))
    return said == pattern or re.fullmatch(translate(pattern), said) is not None


def _letters(word: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", word).casefold()))
