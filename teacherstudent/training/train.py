"""The `teacher` and `student` steps: one loop for both. It sees an optimiser and batches, and no method's name."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from teacherstudent.config import Network, Optimisation
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, Normalisation
from teacherstudent.data.prefetch import BatchReader, Request, list_requests
from teacherstudent.distributed import Communicator
from teacherstudent.distributed.optimizers import DistributedOptimizer
from teacherstudent.progress import hours_bar
from teacherstudent.training import checkpoint
from teacherstudent.training.batches import Position, Source
from teacherstudent.training.gradient import Part, batch_loss, compute_gradient
from teacherstudent.training.models import AcousticModel, build_model, model_state
from teacherstudent.training.schedule import Plan
from teacherstudent.training.training_log import TrainingLog
from teacherstudent.training.workers import make_optimizer

_DEV = "dev"
_DIVERGED = 10.0  # times the loss of guessing: no training comes back from there


@dataclass(frozen=True)
class Training:
    """All that one training needs; the same on every worker."""

    name: str
    folder: Path
    network: Network
    num_senones: int
    normalisation: Normalisation
    plan: Plan
    optimisation: Optimisation
    seed: int
    provenance: Mapping[str, Any]
    readers: int = 0  # processes that make the batches ahead, for each worker; 0: made as they are needed


@dataclass
class Progress:
    """What a checkpoint holds besides weights: where each source stands, and the best so far."""

    step: int = 0
    frames: int = 0  # of this worker
    loss: float = 0.0  # of this worker, summed over its frames: not finite once that of any step was not
    best_frame_error: float = float("inf")
    best_step: int = 0
    positions: dict[str, Position] = field(default_factory=dict)


def train(comm: Communicator, training: Training, sources: Mapping[str, Source], dev: Source) -> None:
    """Train on this worker, together with the others; write best.pt (on dev), final.pt and log.jsonl."""
    model = build_model(training.network, training.num_senones, training.normalisation, training.seed).to(
        comm.device
    )
    optimizer = make_optimizer(model.parameters(), comm, training.optimisation)
    progress = Progress(positions={name: Position() for name in sources})
    _resume(comm, training, model, optimizer, progress)
    log = TrainingLog(training.folder / "log.jsonl", progress.step, writes=comm.rank == 0)
    plan, validate_every = training.plan, training.plan.schedule.validate_every_steps
    total_seconds = len(plan) * comm.size * training.optimisation.batch_frames * FRAME_SHIFT_SECONDS
    order = (plan[step].source for step in range(progress.step, len(plan)))
    requests = list_requests(order, sources, progress.positions, comm.rank, comm.size)
    with (
        hours_bar(total_seconds, training.name, show=comm.rank == 0) as bar,
        BatchReader({**sources, _DEV: dev}, training.readers) as reader,
    ):
        bar.update(3600 * _hours(progress, comm))
        for request, batch in reader.read(requests):
            now, batch = plan[progress.step], batch.to(comm.device)
            for group in optimizer.param_groups:
                group["lr"] = now.base_learning_rate
            noise = _noise(training.seed, progress.step, comm)
            parts = [Part(batch)]
            [measured], _ = compute_gradient(
                model, optimizer, parts, noise, training.optimisation, now.multiplier
            )
            optimizer.step(weight=batch.num_frames)
            progress.positions[now.source] = request.after
            progress.step += 1
            progress.frames += batch.num_frames
            progress.loss += measured.loss
            pauses = progress.step % validate_every == 0 or progress.step == len(plan)
            log.add(now, measured.loss, measured.errors, batch.num_frames)
            log.step(progress.step, _hours(progress, comm), optimizer.metrics, pauses)
            bar.update(batch.num_frames * comm.size * FRAME_SHIFT_SECONDS, loss=log.latest)
            if pauses:
                if progress.step == len(plan):
                    optimizer.synchronize()
                _validate(comm, training, model, optimizer, dev, reader, progress, log)
                _save(comm, training, model, optimizer, progress)
    if comm.rank == 0:
        checkpoint.save(
            training.folder / "final.pt", model_state(model, _provenance(training, progress.step))
        )
    comm.barrier()


def _hours(progress: Progress, comm: Communicator) -> float:
    """Of audio so far, over all workers, taking this one as typical."""
    return progress.frames * comm.size * FRAME_SHIFT_SECONDS / 3600


def _noise(seed: int, step: int, comm: Communicator) -> torch.Generator:
    """For dropout: of (seed, step, rank), so that nothing has to be saved and threads share nothing."""
    mixed = (seed * 1_000_003 + step) * 65_537 + comm.rank
    return torch.Generator(comm.device).manual_seed(mixed % 2**63)


@torch.no_grad()
def _validate(
    comm: Communicator,
    training: Training,
    model: AcousticModel,
    optimizer: DistributedOptimizer,
    dev: Source,
    reader: BatchReader,
    progress: Progress,
    log: TrainingLog,
) -> None:
    """Loss and frame error on the development speakers, shared out over the workers; keeps the best model.

    The best has the lowest frame error, not the lowest loss: a network that is sure of itself loses most on the
    speakers that it knows least, long before it stops to get better at telling senones apart on all of them.
    """
    sums = torch.tensor([0, 0, 0, progress.loss], dtype=torch.float64, device=comm.device)
    with optimizer.global_weights():
        mine = range(comm.rank, dev.num_batches(0), comm.size)
        for _, batch in reader.read(Request(_DEV, Position(0, index)) for index in mine):
            batch = batch.to(comm.device)
            loss, errors = batch_loss(model(batch.features, batch.lengths), batch)
            sums[:3] += sums.new_tensor([float(loss), errors or 0, batch.num_frames])
        total = comm.all_reduce(sums).tolist()
        dev_loss = total[0] / total[2]
        if not (dev_loss < _DIVERGED * math.log(training.num_senones) and math.isfinite(total[3])):
            raise ValueError(
                f"{training.name}: after {progress.step} steps the loss of a frame on the development speakers is "
                f"{dev_loss:g}, that of all frames trained on {total[3]:g}: the training diverged; a lower "
                f"learning_rate than {training.optimisation.learning_rate:g} is needed"
            )
        frame_error = total[1] / total[2]
        if frame_error < progress.best_frame_error:
            progress.best_frame_error, progress.best_step = frame_error, progress.step
            if comm.rank == 0:
                best = model_state(model, _provenance(training, progress.step))
                checkpoint.save(training.folder / "best.pt", best)
    log.write({"step": progress.step, "dev_loss": dev_loss, "dev_frame_error": 100 * frame_error})


def _provenance(training: Training, step: int) -> dict[str, Any]:
    return dict(training.provenance) | {"step": step, "seed": training.seed}


# -- checkpoints: one file a rank, and one that says which step all of them have ------------------------------


def _save(
    comm: Communicator,
    training: Training,
    model: AcousticModel,
    optimizer: DistributedOptimizer,
    progress: Progress,
) -> None:
    folder = training.folder / "checkpoint"
    contents = {
        "progress": asdict(progress),
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "num_workers": comm.size,
    }
    checkpoint.save(folder / f"step{progress.step}.rank{comm.rank}.pt", contents)
    comm.barrier()  # only when every rank's file is there may the pointer move on
    if comm.rank == 0:
        pointer = folder / ".latest"
        pointer.write_text(json.dumps({"step": progress.step, "num_workers": comm.size}))
        pointer.replace(folder / "latest.json")
        for old in folder.glob("step*.pt"):
            if not old.name.startswith(f"step{progress.step}."):
                old.unlink()


def _resume(
    comm: Communicator,
    training: Training,
    model: AcousticModel,
    optimizer: DistributedOptimizer,
    progress: Progress,
) -> None:
    pointer = training.folder / "checkpoint" / "latest.json"
    if not pointer.is_file():
        return
    latest = json.loads(pointer.read_text())
    saved_size = latest["num_workers"]
    saved_ranks = [
        checkpoint.load(pointer.parent / f"step{latest['step']}.rank{rank}.pt")
        for rank in optimizer.ranks_to_load(saved_size)
    ]
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(saved_ranks[0]["weights"][name])
    optimizer.load_state_dicts([saved_rank["optimizer"] for saved_rank in saved_ranks])
    saved = saved_ranks[0]["progress"]
    saved["frames"] = saved["frames"] * saved_size // comm.size  # of each worker, of as many in all
    positions = {name: Position(**position) for name, position in saved.pop("positions").items()}
    vars(progress).update(saved, positions=positions)
