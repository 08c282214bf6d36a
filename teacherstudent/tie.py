"""The `senones` step: tie triphone states by a decision tree, then label every frame with its senone."""

from pathlib import Path

import numpy as np

from teacherstudent.experiment import Experiment
from teacherstudent.manifests import HUMAN, LABELLED_PARTS
from teacherstudent.packed import PackedShard, PackedWriter, open_shards, shard_path
from teacherstudent.senones import Inventory, Statistics, build, tree_features


def tie_senones(experiment: Experiment) -> list[Path]:
    """Write senones/inventory.json and senones/PART/labels.*.h5 for the labelled parts.

    The tree and the priors come from the human-labelled part alone.
    """
    pairs = list(zip(*(open_shards(experiment.path(*where), stem) for where, stem in _INPUTS)))
    phones = tuple(pairs[0][1].header["phones"])
    inventory = build(_statistics(pairs, phones), phones, experiment.config.senones)
    outputs = [experiment.path("senones", "inventory.json")]
    counts = np.zeros(inventory.num_senones, np.int64)
    for part in LABELLED_PARTS:
        experiment.path("senones", part).mkdir(parents=True, exist_ok=True)
        for number, shard in enumerate(open_shards(experiment.path("align", part), "phones")):
            output = shard_path(experiment.path("senones", part), "labels", number)
            senones = _write_labels(output, shard, inventory)
            outputs.append(output)
            if part == HUMAN:
                counts += np.bincount(senones, minlength=inventory.num_senones)
    inventory.with_priors(counts).save(outputs[0])
    print(f"senones: {inventory.num_senones} from {len(phones)} phones", flush=True)
    return outputs


_INPUTS = ((("features", HUMAN), "features"), (("align", HUMAN), "phones"))


def _statistics(pairs: list[tuple[PackedShard, ...]], phones: tuple[str, ...]) -> Statistics:
    statistics = Statistics(len(phones), num_features=26)
    for features, alignments in pairs:
        for (utterance, values), (_, aligned) in zip(features, alignments):
            assert utterance in alignments
            statistics.accumulate(
                tree_features(values["values"].astype(np.float64)), aligned["phone"], aligned["first"]
            )
    return statistics


def _write_labels(output: Path, shard: PackedShard, inventory: Inventory) -> np.ndarray:
    """Returns the senones of all frames."""
    written = [np.zeros(0, np.int32)]
    with PackedWriter(output, {"num_senones": inventory.num_senones}, {"senone": ("int32", ())}) as writer:
        for utterance, aligned in shard:
            written.append(inventory.label(aligned["phone"], aligned["first"]))
            writer.write(utterance, senone=written[-1])
    return np.concatenate(written)
