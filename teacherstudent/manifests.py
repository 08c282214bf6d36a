"""The parts of a data set and their shards of cuts.

A part (human, unlabelled, dev, test) is a folder of `cuts.000000.jsonl`, `cuts.000001.jsonl`, …; shard i of the
cuts gives shard i of the features, labels and targets, in the same order.
"""

from pathlib import Path

from lhotse import CutSet

HUMAN, UNLABELLED, DEV, TEST = "human", "unlabelled", "dev", "test"
PARTS = (HUMAN, UNLABELLED, DEV, TEST)
LABELLED_PARTS = (HUMAN, DEV, TEST)


def shard_paths(data_folder: Path, part: str) -> list[Path]:
    """The cut shards of a part, in order.

    Raises ValueError naming the folder when it is missing, empty or has a gap in its numbers.
    """
    folder = data_folder / part
    if not folder.is_dir():
        raise ValueError(
            f"no folder {folder}: the data need the folders {', '.join(PARTS)}, each with cuts.000000.jsonl, …; "
            "set data.folder, or leave it out and the corpus step makes speech"
        )
    paths = sorted(folder.glob("cuts.*.jsonl"))
    if not paths:
        raise ValueError(f"no cuts.*.jsonl in {folder}: write them with lhotse, CutSet.to_file")
    expected = [f"cuts.{index:06d}.jsonl" for index in range(len(paths))]
    missing = set(expected) - {path.name for path in paths}
    if missing:
        raise ValueError(f"{folder} lacks {min(missing)}: shards are numbered from 000000 without a gap")
    return paths


def read_cuts(path: Path, audio_folder: Path | None = None) -> CutSet:
    """One shard of cuts; relative audio paths start at audio_folder, by default the shard's own."""
    return CutSet.from_jsonl_lazy(path).with_recording_path_prefix(str(audio_folder or path.parent))
