"""Where an experiment's data lie: the cuts of each part before and after `prepare`, and the lexicon.

What `prepare` could not use is left out of its cuts, and copies in other conditions are among them, so every later
step reads those; shard i of them goes with shard i of the features, in the same order.
"""

from pathlib import Path

from lhotse import CutSet

from teacherstudent.data.lexicon import Lexicon
from teacherstudent.data.manifests import read_cuts, shard_paths
from teacherstudent.experiment import Experiment


def brought_folder(experiment: Experiment, part: str) -> Path | None:
    """Where a part lies that was brought along, in whatever form; None where the corpus step makes it."""
    data = experiment.config.data
    if getattr(data, part):
        return Path(getattr(data, part))
    return Path(data.folder) / part if data.folder else None


def source_shards(experiment: Experiment, part: str) -> list[Path]:
    """Of a part's cuts as they came: made or imported by the corpus step, or brought along and used in place."""
    made, brought = experiment.path("corpus", part), brought_folder(experiment, part)
    folder = made if made.is_dir() or brought is None else brought
    return shard_paths(folder.parent, folder.name)


def audio_folder(experiment: Experiment, part: str) -> Path:
    """Where the relative audio paths of a part's cuts start: beside the audio, made or brought along."""
    made, brought = experiment.path("corpus", part), brought_folder(experiment, part)
    if brought is None or (made / "audio").is_dir():
        return made
    return brought if brought.is_dir() else brought.parent


def prepared_shards(experiment: Experiment, part: str) -> list[Path]:
    """features/PART/cuts.*.jsonl"""
    return shard_paths(experiment.path("features"), part)


def read_prepared(experiment: Experiment, part: str, shard: Path) -> CutSet:
    """One of the prepared shards; its audio is where the source's is."""
    return read_cuts(shard, audio_folder(experiment, part))


def lexicon_path(experiment: Experiment) -> Path:
    named = experiment.config.data.lexicon
    return Path(named) if named else experiment.data_folder / "lexicon.txt"


def read_lexicon(experiment: Experiment) -> Lexicon:
    """With word positions marked, if data.word_positions says so."""
    lexicon = Lexicon.read(lexicon_path(experiment))
    return lexicon.with_word_positions() if experiment.config.data.word_positions else lexicon
