"""Deal LibriSpeech to the four parts of an experiment: `python examples/librispeech/split.py mini|full corpora`.

Reads what `lhotse prepare librispeech` wrote to CORPORA/manifests and writes CORPORA/mini or CORPORA/full, with
cuts.000000.jsonl, … in human/, unlabelled/, dev/ and test/. The unlabelled part has no transcripts. Every cut tells
its `subset` and its `speaker`; audio paths are relative, so that CORPORA can be moved as a whole.
"""

import argparse
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
from lhotse import MonoCut, RecordingSet, SupervisionSet

SHARD_UTTERANCES = 200  # about 40 minutes of training audio: the utterances of a shard are worked on together

# Each part takes of some subsets the speakers between two shares of all, dealt at random.
PARTS = {
    "mini": {
        "human": [("train-clean-5", 0.0, 0.25)],
        "unlabelled": [("train-clean-5", 0.25, 1.0)],
        "dev": [("dev-clean-2", 0.0, 0.5)],
        "test": [("dev-clean-2", 0.5, 1.0)],
    },
    "full": {
        "human": [("train-clean-100", 0.0, 1.0)],
        "unlabelled": [("train-clean-360", 0.0, 1.0), ("train-other-500", 0.0, 1.0)],
        "dev": [("dev-clean", 0.0, 1.0), ("dev-other", 0.0, 1.0)],
        "test": [("test-clean", 0.0, 1.0), ("test-other", 0.0, 1.0)],
    },
}


def read_subset(corpora: Path, subset: str) -> Iterator[MonoCut]:
    """Its utterances in the order of lhotse's manifests, a cut each.

    Raises ValueError when a manifest is missing, or the two do not belong together.
    """
    names = [
        corpora / "manifests" / f"librispeech_{what}_{subset}.jsonl.gz"
        for what in ("recordings", "supervisions")
    ]
    for path in names:
        if not path.is_file():
            raise ValueError(
                f"no {path}: lhotse prepare librispeech {corpora}/LibriSpeech {path.parent} writes it"
            )
    recordings, supervisions = (
        RecordingSet.from_jsonl_lazy(names[0]),
        SupervisionSet.from_jsonl_lazy(names[1]),
    )
    for recording, supervision in zip_longest(recordings, supervisions):
        ids = [None if item is None else item.id for item in (recording, supervision)]
        if ids[0] != ids[1]:
            raise ValueError(
                f"{names[0]} has {ids[0]} where {names[1]} has {ids[1]}: they are not of one preparation, "
                "remove both and prepare again"
            )
        custom = {"subset": subset, "speaker": supervision.speaker}
        yield MonoCut(
            recording.id, 0.0, recording.duration, 0, [supervision], recording=recording, custom=custom
        )


def choose_speakers(cuts: list[MonoCut], subset: str, low: float, high: float) -> set[str]:
    """The speakers between two shares of a subset's, always the same ones."""
    speakers = sorted({cut.custom["speaker"] for cut in cuts})
    order = np.random.default_rng([zlib.crc32(subset.encode())]).permutation(len(speakers))
    return {speakers[index] for index in order[round(low * len(order)) : round(high * len(order))]}


def write_line(cut: MonoCut, part: str, folder: Path) -> str:
    """The cut as a line of JSON, for a shard in `folder`."""
    if part == "unlabelled":
        cut.supervisions = []
    for source in cut.recording.sources:
        if not Path(source.source).is_file():
            raise ValueError(
                f"no audio at {source.source}: run this where lhotse prepare ran, or prepare again"
            )
        source.source = os.path.relpath(source.source, folder)
    return json.dumps(cut.to_dict()) + "\n"


def write_part(corpora: Path, folder: Path, part: str, pieces: list[tuple[str, float, float]]) -> str:
    """Write a part's shards, its utterances in random order; returns what it holds, in words."""
    lines: list[tuple[str, str]] = []  # utterance, line
    seconds, num_speakers = 0.0, 0
    for subset, low, high in pieces:
        cuts = list(read_subset(corpora, subset))
        speakers = choose_speakers(cuts, subset, low, high)
        chosen = [cut for cut in cuts if cut.custom["speaker"] in speakers]
        seconds, num_speakers = seconds + sum(cut.duration for cut in chosen), num_speakers + len(speakers)
        lines += [(cut.id, write_line(cut, part, folder / part)) for cut in chosen]
    lines.sort()  # lhotse's order is that of the file system
    order = np.random.default_rng([zlib.crc32(part.encode())]).permutation(len(lines))
    folder = partial_folder(folder) / part
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(order), SHARD_UTTERANCES)):
        chosen_lines = [lines[index][1] for index in order[start : start + SHARD_UTTERANCES]]
        (folder / f"cuts.{shard:06d}.jsonl").write_text("".join(chosen_lines), encoding="utf-8")
    return f"{part:10} {len(lines):6} utterances {num_speakers:5} speakers {seconds / 3600:6.1f} hours"


def partial_folder(folder: Path) -> Path:
    """Where it is written, to be renamed when it is whole."""
    return folder.with_name(f"{folder.name}.partial")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=PARTS, help="mini_librispeech, or all of LibriSpeech")
    parser.add_argument("corpora", type=Path, help="holds LibriSpeech/ and manifests/")
    options = parser.parse_args(arguments)
    folder = options.corpora / options.size
    try:
        if folder.exists():
            raise ValueError(f"{folder} is there: remove it to deal anew")
        shutil.rmtree(partial_folder(folder), ignore_errors=True)  # of a call that was interrupted
        for part, pieces in PARTS[options.size].items():
            print(write_part(options.corpora, folder, part, pieces), flush=True)
    except ValueError as error:
        print(f"split.py: {error}", file=sys.stderr)
        return 2
    partial_folder(folder).replace(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
