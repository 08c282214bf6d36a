"""Files that NIST's sclite reads: transcripts (trn), reference segments (stm) and timed words (ctm).

    sclite -s -i spu_id -r ref.trn trn -h NAME.trn trn
    sclite -s -r ref.stm stm -h NAME.ctm ctm

Formats: sctk, doc/infmts.htm. -s because our word errors tell capital letters apart. sclite prints errors by
speaker: an utterance is named SPEAKER-ID, without what else would end the speaker's name. Each utterance is a
file of its own in stm and ctm, on channel 1; times are in seconds from its beginning.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from teacherstudent.decoding.decode import TimedWord
from teacherstudent.decoding.error_tables import Utterance
from teacherstudent.decoding.scoring import Words
from teacherstudent.files import write_text

_MARKS = re.compile(r"[(){}@%*;]|^<.*>$")  # of words that sclite takes for alternatives, comments or nothing


def write_references(folder: Path, test: Sequence[Utterance]) -> list[Path]:
    """ref.trn and ref.stm. A warning counts words in which sclite sees more than a word."""
    _warn_marks("reference words", (word for utterance in test for word in utterance.words))
    transcripts, segments = folder / "ref.trn", folder / "ref.stm"
    write_text(transcripts, to_trn(test, [utterance.words for utterance in test]))
    write_text(segments, to_stm(test))
    return [transcripts, segments]


def write_hypotheses(
    folder: Path, name: str, test: Sequence[Utterance], timed: Mapping[str, Sequence[TimedWord]]
) -> list[Path]:
    """NAME.trn and NAME.ctm. timed: the words of every utterance, by id. Warns as write_references does."""
    transcripts, words = folder / f"{name}.trn", folder / f"{name}.ctm"
    said = [[each.word for each in timed[utterance.id]] for utterance in test]
    _warn_marks(f"words recognised by {name}", (word for words_of in said for word in words_of))
    write_text(transcripts, to_trn(test, said))
    write_text(words, to_ctm(test, timed))
    return [transcripts, words]


def _warn_marks(what: str, words: Iterable[str]) -> None:
    marked = sorted({word for word in words if _MARKS.search(word)})
    if marked:
        warnings.warn(
            f"{len(marked)} {what} hold characters that mean something to sclite, whose count of errors may differ "
            f"from ours: {', '.join(marked[:5])}",
            stacklevel=3,
        )


def to_trn(test: Sequence[Utterance], words: Sequence[Words]) -> str:
    """`word word … (speaker-utterance)` a line."""
    lines = [
        " ".join([*said, f"({_speaker(utterance)}-{utterance.id})"]) for utterance, said in zip(test, words)
    ]
    return "".join(f"{line}\n" for line in lines)


def to_stm(test: Sequence[Utterance]) -> str:
    """`utterance channel speaker begin end word word …` a line, sorted by utterance."""
    lines = [
        " ".join([each.id, "1", _speaker(each), "0.000", f"{each.seconds:.3f}", *each.words])
        for each in sorted(test, key=lambda each: each.id)
    ]
    return "".join(f"{line}\n" for line in lines)


def to_ctm(test: Sequence[Utterance], timed: Mapping[str, Sequence[TimedWord]]) -> str:
    """`utterance channel begin duration word confidence` a line, sorted by utterance; without lattices there is no
    confidence. The last frame may reach beyond the audio: times end with it. An utterance without words gets a
    comment, since sclite wants to hear of every one.
    """
    lines = []
    for utterance in sorted(test, key=lambda each: each.id):
        if not timed[utterance.id]:
            lines.append(f";; {utterance.id} has no words")
        for each in timed[utterance.id]:
            end = min(each.end_seconds, utterance.seconds)
            start = min(each.start_seconds, end)
            confidence = [] if each.confidence is None else [f"{each.confidence:.4f}"]
            fields = [utterance.id, "1", f"{start:.3f}", f"{end - start:.3f}", each.word, *confidence]
            lines.append(" ".join(fields))
    return "".join(f"{line}\n" for line in lines)


def _speaker(utterance: Utterance) -> str:
    """sclite's spu_id ends a speaker's name at the first '-' or '_'."""
    return re.sub(r"[-_()\s]", ".", utterance.speaker)
