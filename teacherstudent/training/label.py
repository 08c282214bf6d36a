"""The `label` step: the teacher's highest posteriors for every frame of the unlabelled shards.

Shards are dealt to the workers; a shard's bytes depend on its cuts and the teacher alone, since batches are formed
inside the shard. A shard that is there is not labelled again, so the step goes on where it was interrupted.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from teacherstudent.data.feature_reader import ReadableShard, open_features
from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.manifests import UNLABELLED
from teacherstudent.data.packed import shard_path
from teacherstudent.data.prefetch import num_readers, read_shards
from teacherstudent.distributed import Communicator
from teacherstudent.experiment import Experiment
from teacherstudent.progress import hours_bar
from teacherstudent.store import STEM, TargetWriter
from teacherstudent.training import checkpoint
from teacherstudent.training.batches import collate
from teacherstudent.training.models import AcousticModel, model_from_state
from teacherstudent.training.trainings import target_provenance


def label(experiment: Experiment, comm: Communicator) -> list[Path]:
    """Label this worker's shards, and wait for the others."""
    folder = experiment.path("targets")
    folder.mkdir(parents=True, exist_ok=True)
    model = model_from_state(checkpoint.load(experiment.path("teacher", "best.pt"))).to(comm.device)
    provenance = target_provenance(experiment)
    settings = experiment.config.label
    shards = open_features(experiment, UNLABELLED, model.network.normalisation)
    outputs = [shard_path(folder, STEM, number) for number in range(len(shards))]
    mine = [number for number in range(comm.rank, len(shards), comm.size) if not outputs[number].exists()]
    total = sum(int(shards[number].num_frames.sum()) for number in mine) * comm.size * FRAME_SHIFT_SECONDS
    readers = num_readers(experiment.config.features)
    with (
        hours_bar(total, "label", show=comm.rank == 0) as bar,
        read_shards([shards[number] for number in mine], readers) as loaded,
    ):
        for number, shard in zip(mine, loaded):
            with TargetWriter(outputs[number], model.num_senones, settings.k, provenance) as writer:
                for utterance_id, logits in infer(model, shard, settings.batch_frames, comm.device):
                    writer.write(utterance_id, logits)
            bar.update(float(shards[number].num_frames.sum()) * comm.size * FRAME_SHIFT_SECONDS)
    comm.barrier(math.inf)  # the others may have hours to go
    return outputs


@torch.inference_mode()
def infer(
    model: AcousticModel, shard: ReadableShard, batch_frames: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """(utterance id, logits (T, S)) of every utterance of a shard, in its order.

    Utterances of similar lengths share a batch; the batches depend on the shard and batch_frames alone.
    """
    values = dict(iter(shard))
    by_length = sorted(shard.ids, key=lambda name: -len(values[name]["values"]))
    logits: dict[str, torch.Tensor] = {}
    start = 0
    while start < len(by_length):
        longest = max(1, len(values[by_length[start]]["values"]))
        names = by_length[start : start + max(1, batch_frames // longest)]
        batch = collate([values[name]["values"] for name in names], [])
        output = model(batch.features.to(device), batch.lengths)
        for name, row, length in zip(names, output, batch.lengths.tolist()):
            logits[name] = row[:length].cpu().clone()
        start += len(names)
    yield from ((name, logits[name]) for name in shard.ids)
