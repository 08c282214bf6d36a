"""A training of a second for the tests of the train loop: everything in memory, two sources, few steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from teacherstudent.config import Network, Optimisation, Schedule
from teacherstudent.data.features import Normalisation
from teacherstudent.training.batches import Source
from teacherstudent.training.schedule import MACHINE, Plan
from teacherstudent.training.shard_table import ShardTable
from teacherstudent.training.train import Training

NUM_SENONES, NUM_FEATURES = 5, 3
STEPS, VALIDATE_EVERY, BLOCK_STEPS = 23, 3, 4  # checkpoints between two lines of the log, and inside blocks
SCHEDULE = Schedule(steps=STEPS, validate_every_steps=VALIDATE_EVERY, machine_turn_steps=2)
NETWORK = Network(layers=2, cells=6, output_delay_frames=1, dropout=0.2)


class Shard(dict[str, dict[str, np.ndarray]]):
    """One shard in memory, by utterance."""

    @property
    def ids(self) -> Sequence[str]:
        return tuple(self)

    @property
    def num_frames(self) -> np.ndarray:
        """Of features or labels."""
        return np.array([len(next(iter(arrays.values()))) for arrays in self.values()], np.int64)

    def in_epoch(self, epoch: int) -> "Shard":
        return self


def make_source(name: str, num_utterances: int = 7, batch_frames: int = 30, nan: bool = False) -> Source:
    """Senones that can be read from the features; in the machine's, two of them are likely."""
    random = np.random.default_rng([len(name), num_utterances])
    features, labels = Shard(), Shard()
    for number in range(num_utterances):
        senone = random.integers(0, NUM_SENONES, 11 + number).astype(np.int32)
        values = random.normal(size=(len(senone), NUM_FEATURES)) + senone[:, None]
        features[f"u{number}"] = {"values": np.where(nan, np.nan, values).astype(np.float16)}
        ids = np.stack([senone, (senone + 1) % NUM_SENONES], axis=1)
        probabilities = np.tile(np.float32([0.75, 0.25]), (len(senone), 1))
        labels[f"u{number}"] = (
            {"ids": ids, "probabilities": probabilities} if name == MACHINE else {"senone": senone}
        )
    counts = np.array([len(utterance["values"]) for utterance in features.values()])
    return Source(name, [features], [labels], ShardTable.make([counts]), batch_frames, seed=1)


def make_training(
    folder: Path, method: str = "exact", network: Network = NETWORK, rate: float = 0.3, group_size: int = 1
) -> Training:
    optimisation = Optimisation(
        method=method,
        learning_rate=rate,
        density=0.2,
        block_steps=BLOCK_STEPS,
        batch_frames=30,
        group_size=group_size,
    )
    normalisation = Normalisation(np.full(NUM_FEATURES, 2, np.float32), np.full(NUM_FEATURES, 2, np.float32))
    plan = Plan(SCHEDULE, rate)
    return Training(
        "student x", folder, network, NUM_SENONES, normalisation, plan, optimisation, 3, {"of": "test"}
    )
