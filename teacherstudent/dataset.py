"""Where an experiment's data lie: the cuts of each part before and after `prepare`, and the lexicon.

What `prepare` could not use is left out of its cuts, and copies in other conditions are among them, so every later
step reads those; shard i of them goes with shard i of the features, in the same order.
"""

from pathlib import Path

from lhotse import CutSet

from teacherstudent.experiment import Experiment
from teacherstudent.lexicon import Lexicon
from teacherstudent.manifests import read_cuts, shard_paths


def source_folder(experiment: Experiment, part: str) -> Path:
    """Of a part's cuts as they came: made or imported by the corpus step, or brought along."""
    made = experiment.path("corpus", part)
    brought = getattr(experiment.config.data, part)
    return made if made.is_dir() else Path(brought) if brought else experiment.data_folder / part


def source_shards(experiment: Experiment, part: str) -> list[Path]:
    folder = source_folder(experiment, part)
    return shard_paths(folder.parent, folder.name)


def prepared_shards(experiment: Experiment, part: str) -> list[Path]:
    """features/PART/cuts.*.jsonl"""
    return shard_paths(experiment.path("features"), part)


def read_prepared(experiment: Experiment, part: str, shard: Path) -> CutSet:
    """One of the prepared shards; its audio is where the source's is."""
    return read_cuts(shard, source_folder(experiment, part))


def lexicon_path(experiment: Experiment) -> Path:
    named = experiment.config.data.lexicon
    return Path(named) if named else experiment.data_folder / "lexicon.txt"


def read_lexicon(experiment: Experiment) -> Lexicon:
    """With word positions marked, if data.word_positions says so."""
    lexicon = Lexicon.read(lexicon_path(experiment))
    return lexicon.with_word_positions() if experiment.config.data.word_positions else lexicon
