"""Where the table of a source's shards comes from: `label` leaves one beside the targets; what has none gets it when it
is first opened, after every shard was looked at once.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacherstudent.processes import map_in_processes
from teacherstudent.training.shard_pairs import Features, Labels, open_pair
from teacherstudent.training.shard_table import ShardTable

TABLE = "shard_table.npy"
_SHARDS_OF_A_PROCESS = 1000  # it is not worth its start for fewer


def find_table(
    path: Path, source: str, features: Sequence[Features], labels: Sequence[Labels], jobs: int
) -> ShardTable:
    """The table at `path`; made and written there where there is none, or one of another number of shards."""
    if path.is_file():
        table = ShardTable.load(path)
        if table.num_shards == len(labels):
            return table
    return write_table(path, source, features, labels, jobs)


def write_table(
    path: Path, source: str, features: Sequence[Features], labels: Sequence[Labels], jobs: int
) -> ShardTable:
    """Look at all shards, in up to `jobs` processes, and write what they hold.

    Raises ValueError naming source and shard where features and labels disagree (open_pair).
    """
    if len(features) != len(labels):
        raise ValueError(
            f"source {source!r}: {len(features)} feature shards but {len(labels)} label shards: the step that makes "
            "the labels has to run again"
        )
    processes = max(1, min(jobs, len(labels) // _SHARDS_OF_A_PROCESS))
    counted = map_in_processes((_Count, source, features, labels), range(len(labels)), processes)
    ShardTable.make(counted).save(path)
    return ShardTable.load(path)


class _Count:
    """What a process does: the lengths of one shard's utterances after another."""

    def __init__(self, source: str, features: Sequence[Features], labels: Sequence[Labels]) -> None:
        self._source, self._features, self._labels = source, features, labels

    def __call__(self, number: int) -> NDArray[np.uint32]:
        pair = open_pair(self._source, number, self._features[number], self._labels[number])
        return pair.num_frames.astype(np.uint32)
