"""The parts of a data set and their shards of cuts.

A part (human, unlabelled, dev, test) is a folder of `cuts.000000.jsonl`, `cuts.000001.jsonl`, …, each of them gzipped
or not; shard i of the cuts gives shard i of the features, labels and targets, in the same order.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut

HUMAN, UNLABELLED, DEV, TEST = "human", "unlabelled", "dev", "test"
PARTS = (HUMAN, UNLABELLED, DEV, TEST)
LABELLED_PARTS = (HUMAN, DEV, TEST)
COPY_OF = "copy_of"  # custom field of copies in other conditions, which conditions.py makes


def shard_paths(data_folder: Path, part: str) -> list[Path]:
    """The cut shards of a part, in order.

    Raises ValueError naming the folder when it is missing, empty, has a gap in its numbers or one of them twice.
    """
    folder = data_folder / part
    if not folder.is_dir():
        raise ValueError(
            f"no folder {folder}: the data need the folders {', '.join(PARTS)}, each with cuts.000000.jsonl, …; "
            "set data.folder, or leave it out and the corpus step makes speech"
        )
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        number = _shard_number(path)
        if number in found:
            raise ValueError(
                f"{folder} holds {found[number].name} and {path.name}: remove one of them, both are shard {number}"
            )
        if number is not None:
            found[number] = path
    if not found:
        raise ValueError(
            f"no cuts.000000.jsonl in {folder}: shards are called cuts.000000.jsonl, cuts.000001.jsonl, … with six "
            "digits, or .jsonl.gz; write them with lhotse, CutSet.to_file"
        )
    missing = set(range(len(found))) - set(found)
    if missing:
        raise ValueError(
            f"{folder} lacks cuts.{min(missing):06d}.jsonl: shards are numbered from 000000 without a gap"
        )
    return [found[number] for number in sorted(found)]


def _shard_number(path: Path) -> int | None:
    match = re.fullmatch(r"cuts\.(\d{6,})\.jsonl(\.gz)?", path.name)
    return int(match[1]) if match else None


def read_cuts(path: Path, audio_folder: Path | None = None) -> CutSet:
    """One shard of cuts; relative audio paths start at audio_folder, by default the shard's own."""
    return CutSet.from_jsonl_lazy(path).with_recording_path_prefix(str(audio_folder or path.parent))


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The cuts of a manifest, gzipped or not, as they stand in it: not yet lhotse's.

    Raises ValueError with file and line for what is not JSON, and for what has no id.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    entry = json.loads(line)
                    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or not entry["id"]:
                        raise ValueError("a cut with an id is needed")
                    yield entry
    except (ValueError, OSError, EOFError, zlib.error) as error:  # no JSON, no UTF-8, or damaged gzip
        raise ValueError(
            f"{path}, line {number}: {error}. Every line is one cut, as lhotse's CutSet.to_file writes it"
        ) from None


def original_of(cut: Cut) -> str | None:
    """The id of the utterance that it is a copy of, in another condition; None for one that is no copy."""
    made = (cut.custom or {}).get(COPY_OF)
    return None if made is None else made["id"]


def transcript_of(cut: Cut) -> str:
    """What its supervisions say, one after the other."""
    supervisions = sorted(cut.supervisions, key=lambda supervision: supervision.start)
    return " ".join(supervision.text or "" for supervision in supervisions)


def speaker_of(cut: Cut) -> str | None:
    """Who speaks: the cut's custom field `speaker`, else that of its first supervision that names one.

    A copy in another condition sounds like somebody else: its speaker has the condition in the name.
    """
    custom = cut.custom or {}
    named = [custom.get("speaker"), *(supervision.speaker for supervision in cut.supervisions)]
    names = (" ".join(str(name).split()) for name in named if name is not None)
    speaker = next(filter(None, names), None)
    if speaker is None or original_of(cut) is None:
        return speaker
    return f"{speaker} {custom['condition']}"
