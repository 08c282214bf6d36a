"""Word errors of each system over the test utterances: together, by the fields of the cuts, and compared."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from teacherstudent.config import Decode
from teacherstudent.decoding.scoring import Words, compare, score

ALL = "all"
UNMARKED = "unmarked"  # the value of a field that some cuts have and this one has not
_SPEAKER = "speaker"


@dataclass(frozen=True)
class Utterance:
    """What was said. fields: of the cut, by name, such as its condition."""

    id: str
    words: tuple[str, ...]
    speaker: str
    seconds: float = 0.0
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> tuple[str, tuple[str, ...]]:
        """The same in all conditions: drawn together for an interval, since its errors go together."""
        return self.speaker, self.words

    @classmethod
    def of(cls, cut: Any, score_by: Sequence[str]) -> "Utterance":
        """From a lhotse cut. A field is looked for in the cut, then in its first supervision: custom ones, then the
        manifest's own, such as gender.
        """
        supervisions = cut.supervisions
        first = supervisions[0] if supervisions else None
        custom = {**((first.custom if first else None) or {}), **(cut.custom or {})}
        spoken = sorted(supervisions, key=lambda supervision: supervision.start)  # as manifests.transcript_of
        text = " ".join(supervision.text or "" for supervision in spoken)
        speaker = str(custom.get(_SPEAKER) or getattr(first, _SPEAKER, None) or cut.id)
        values = {name: custom.get(name, getattr(first, name, None)) for name in score_by} | {
            _SPEAKER: speaker
        }
        fields = {name: str(value) for name, value in values.items() if value is not None}
        return cls(cut.id, tuple(text.split()), speaker, cut.duration, fields)


def score_system(
    test: Sequence[Utterance], hypotheses: Sequence[Words], settings: Decode, seed: int
) -> dict[str, Any]:
    """{"conditions": {"all": row, …}, "by": {field: {value: row}}}: the rows of the field "condition", and of the
    other fields of decode.score_by that the cuts have.
    """
    together = _row(test, hypotheses, settings, seed)
    together["speaker_interval"] = _row(test, hypotheses, settings, seed, by_speaker=True)["interval"]
    tables: dict[str, Any] = {}
    for name in settings.score_by:
        present = [utterance.fields.get(name, UNMARKED) for utterance in test]
        if set(present) != {UNMARKED}:
            tables[name] = {}
        for value in sorted(set(present) - ({UNMARKED} if name not in tables else set()), key=quietest_first):
            chosen = [index for index, there in enumerate(present) if there == value]
            rows = [test[index] for index in chosen], [hypotheses[index] for index in chosen]
            if any(utterance.words for utterance in rows[0]):  # a rate is over words
                tables[name][value] = _row(*rows, settings, seed)
    return {"conditions": {ALL: together} | tables.pop("condition", {}), "by": tables}


def warn_missing_fields(test: Sequence[Utterance], settings: Decode) -> None:
    """Fields that no cut has; "condition" is the default, and may be missing."""
    for name in settings.score_by:
        if name != "condition" and not any(name in utterance.fields for utterance in test):
            warnings.warn(
                f"decode.score_by names {name!r}, which no test cut has, neither as a custom field nor in its "
                "supervision: no table by it",
                stacklevel=2,
            )


def _row(
    test: Sequence[Utterance],
    hypotheses: Sequence[Words],
    settings: Decode,
    seed: int,
    by_speaker: bool = False,
) -> dict[str, Any]:
    found = score(
        [utterance.words for utterance in test],
        hypotheses,
        blocks=[utterance.speaker if by_speaker else utterance.sentence for utterance in test],
        samples=settings.bootstrap_samples,
        seed=seed,
    )
    return {
        "utterances": len(test),
        "words": found.words,
        "errors": found.substitutions + found.insertions + found.deletions,
        "substitutions": found.substitutions,
        "insertions": found.insertions,
        "deletions": found.deletions,
        "word_error_rate": 100 * found.word_error_rate,
        "interval": [100 * found.low, 100 * found.high],
    }


def quietest_first(condition: str) -> tuple[float, str]:
    """ "clean", then "20dB" or "snr20", "10dB"; other values by name, after these."""
    number = r"(-?\d+(?:\.\d+)?)"
    decibels = re.fullmatch(f"{number}dB|snr{number}", condition)
    if condition in ("clean", UNMARKED):
        return -math.inf, condition
    return (-float(decibels[1] or decibels[2]), condition) if decibels else (math.inf, condition)


def compare_systems(
    names: Sequence[str],
    baselines: Sequence[str],
    test: Sequence[Utterance],
    words: Mapping[str, Sequence[Words]],
    errors: Mapping[str, int],
    settings: Decode,
    seed: int,
) -> dict[str, Any]:
    """Each of the named systems against the better of the baselines, paired by sentence.

    None is what has no finite value: how many times fewer errors than a baseline that makes none, and the matched-pairs
    statistic where all sentences differ by as much.
    """
    if not baselines:
        return {"baseline": None, "comparisons": []}
    baseline = min(baselines, key=lambda name: errors[name])
    comparisons = []
    for name in names:
        found = compare(
            [utterance.words for utterance in test],
            words[baseline],
            words[name],
            blocks=[utterance.sentence for utterance in test],
            samples=settings.bootstrap_samples,
            seed=seed,
        )
        comparisons.append(
            {
                "system": name,
                "baseline": baseline,
                "relative_reduction": _finite(100 * found.relative_reduction),
                "interval": [_finite(100 * found.low), _finite(100 * found.high)],
                "p_value": found.p_value,
                "matched_pairs": {
                    "statistic": _finite(found.matched_pairs),
                    "p_value": found.matched_pairs_p_value,
                },
            }
        )
    return {"baseline": baseline, "comparisons": comparisons}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
