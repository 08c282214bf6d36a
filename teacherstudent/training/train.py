"""The `teacher` and `student` steps: one loop for both. It sees an optimiser and batches, and no method's name."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from teacherstudent.config import Loss, Network, Optimisation
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, Normalisation
from teacherstudent.data.prefetch import BatchReader, Request, list_requests
from teacherstudent.distributed import Communicator
from teacherstudent.distributed.optimizers import DistributedOptimizer
from teacherstudent.progress import hours_bar
from teacherstudent.training import checkpoint, model_average
from teacherstudent.training.batches import Batch, Position, Source
from teacherstudent.training.gradient import Part, agree_numeric_mode, batch_loss, compute_gradient
from teacherstudent.training.losses import PLAIN
from teacherstudent.training.model_average import Validated
from teacherstudent.training.models import AcousticModel, build_model, model_state
from teacherstudent.training.schedule import HUMAN, MACHINE, Plan
from teacherstudent.training.training_log import TrainingLog
from teacherstudent.training.workers import make_optimizer

# What is validated on: the source whose labels it has, and where its lines of the log begin.
_VALIDATIONS = {"dev": HUMAN, "held_out": MACHINE}
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
    loss: Loss = PLAIN
    board: Path | None = None  # a folder for TensorBoard

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"


@dataclass
class Progress:
    """What a checkpoint holds besides weights: where each source stands, and the best so far."""

    step: int = 0
    frames: dict[str, int] = field(default_factory=dict)  # of this worker, by source
    loss: float = 0.0  # of this worker, summed over its frames: not finite once that of any step was not
    best_frame_error: float = float("inf")
    best_step: int = 0
    num_validations_since_best: int = 0
    stopped: bool = False  # before the last step of the plan
    positions: dict[str, Position] = field(default_factory=dict)
    averaged: list[Validated] = field(default_factory=list)  # what averaged.pt would be made of now


@dataclass(frozen=True)
class _Worker:
    """One training on one worker."""

    comm: Communicator
    training: Training
    model: AcousticModel
    optimizer: DistributedOptimizer
    progress: Progress

    @property
    def hours(self) -> dict[str, float]:
        """Of audio so far by source, over all workers, taking this one as typical."""
        frames = self.progress.frames.items()
        return {source: count * self.comm.size * FRAME_SHIFT_SECONDS / 3600 for source, count in frames}

    def state(self) -> dict[str, Any]:
        """Of the model as it is now."""
        training, step = self.training, self.progress.step
        mode = training.optimisation.numeric_mode
        own = {"step": step, "seed": training.seed, "numeric_mode": mode}
        return model_state(self.model, {**training.provenance, **own})


def train(
    comm: Communicator,
    training: Training,
    sources: Mapping[str, Source],
    dev: Source,
    held_out: Source | None = None,
) -> None:
    """Train on this worker, together with the others; write best.pt (on dev), final.pt and log.jsonl.

    held_out: machine-labelled, to validate on. With schedule.average_models, averaged.pt too.
    """
    plan = training.plan
    assert set(plan.sources) <= set(sources), plan.sources
    worker = _start(comm, training, sources)
    progress = worker.progress
    steps = range(progress.step, progress.step if progress.stopped else len(plan))
    order = (portion.source for step in steps for portion in plan[step].portions)
    requests = list_requests(order, sources, progress.positions, comm.rank, comm.size)
    validated = {"dev": dev} | ({} if held_out is None else {"held_out": held_out})
    total_seconds = len(plan) * comm.size * training.optimisation.batch_frames * FRAME_SHIFT_SECONDS
    done_seconds = 3600 * sum(worker.hours.values())
    with (
        TrainingLog(training.folder / "log.jsonl", progress.step, comm.rank == 0, training.board) as log,
        hours_bar(total_seconds, training.name, comm.rank == 0, done_seconds) as bar,
        BatchReader({**sources, **validated}, training.readers) as reader,
    ):
        batches = reader.read(requests)
        for step in steps:
            taken = list(islice(batches, len(plan[step].portions)))
            num_frames = _take_step(worker, taken, log)
            last = progress.step == len(plan)
            pauses = last or progress.step % plan.schedule.validate_every_steps == 0
            log.step(progress.step, worker.hours, worker.optimizer.metrics, pauses)
            bar.update(num_frames * comm.size * FRAME_SHIFT_SECONDS, loss=log.latest)
            if pauses:
                if last:
                    worker.optimizer.synchronize()
                _validate(worker, validated, reader, log)
                _save(worker)
            if progress.stopped:
                break
    if comm.rank == 0:
        _write_models(worker)
    comm.barrier()


def _write_models(worker: _Worker) -> None:
    """Final.pt, which is what was validated last, also where the training stopped inside a block; averaged.pt."""
    training, averaged = worker.training, worker.progress.averaged
    with worker.optimizer.global_weights():
        checkpoint.save(training.folder / "final.pt", worker.state())
    if averaged:
        average = model_average.average(training.checkpoints, averaged)
        checkpoint.save(training.folder / "averaged.pt", average)


def _start(comm: Communicator, training: Training, sources: Mapping[str, Source]) -> _Worker:
    """From initial weights, or from the last checkpoint."""
    model = build_model(training.network, training.num_senones, training.normalisation, training.seed).to(
        comm.device
    )
    training = replace(training, optimisation=agree_numeric_mode(training.optimisation, comm))
    optimizer = make_optimizer(model.parameters(), comm, training.optimisation)
    progress = Progress(positions={name: Position() for name in sources}, frames=dict.fromkeys(sources, 0))
    worker = _Worker(comm, training, model, optimizer, progress)
    _resume(worker)
    return worker


def _take_step(worker: _Worker, taken: Sequence[tuple[Request, Batch]], log: TrainingLog) -> int:
    """One step on a micro-batch of each of its portions. Returns the frames of this worker."""
    progress, optimizer, training = worker.progress, worker.optimizer, worker.training
    now = training.plan[progress.step]
    for group in optimizer.param_groups:
        group["lr"] = now.base_learning_rate
    parts = [
        Part(batch.to(worker.comm.device), portion.loss_weight, training.loss)
        for (_, batch), portion in zip(taken, now.portions, strict=True)
    ]
    noise = _noise(training.seed, progress.step, worker.comm)
    measured, norm = compute_gradient(
        worker.model, optimizer, parts, noise, training.optimisation, now.multiplier
    )
    num_frames = sum(part.num_frames for part in measured)
    optimizer.step(weight=num_frames)
    progress.step += 1
    for (request, _), part in zip(taken, measured, strict=True):
        progress.positions[request.source] = request.after
        progress.frames[request.source] += part.num_frames
        progress.loss += part.loss
    log.add(now, measured, norm)
    return num_frames


def _noise(seed: int, step: int, comm: Communicator) -> torch.Generator:
    """For dropout: of (seed, step, rank), so that nothing has to be saved and threads share nothing."""
    mixed = (seed * 1_000_003 + step) * 65_537 + comm.rank
    return torch.Generator(comm.device).manual_seed(mixed % 2**63)


@torch.no_grad()
def _validate(
    worker: _Worker, validated: Mapping[str, Source], reader: BatchReader, log: TrainingLog
) -> None:
    """Loss and frame error of each source's validation set, shared out over the workers; keeps the best model, and
    stops the training when none was better for long.

    The best has the lowest frame error, not the lowest loss: a network that is sure of itself loses most on the
    speakers that it knows least, long before it stops to get better at telling senones apart on all of them.
    """
    progress, step = worker.progress, worker.progress.step
    # In bf16 a worker of this process that is still in its step has turned torch's one switch (see computing).
    worker.comm.barrier()
    with worker.optimizer.global_weights():
        found = {name: _measure(worker, name, source, reader) for name, source in validated.items()}
        _check_converging(worker, found["dev"][0])
        _keep_best(worker, found["dev"][1])
    for name, (loss, frame_error) in found.items():
        figures = {f"{name}_loss": loss, f"{name}_frame_error": 100 * frame_error}
        log.write({"step": step, "source": _VALIDATIONS[name], **figures})
    patience = worker.training.plan.schedule.stop_after_validations
    if patience and progress.num_validations_since_best >= patience and step < len(worker.training.plan):
        progress.stopped = True
        log.write({"step": step, "stopped": f"no lower frame error in {patience} validations"})


def _measure(worker: _Worker, name: str, source: Source, reader: BatchReader) -> tuple[float, float]:
    """Loss of a frame and share of wrong frames, over all workers: the same on all of them."""
    comm = worker.comm
    sums = torch.zeros(3, dtype=torch.float64, device=comm.device)
    mine = range(comm.rank, source.num_batches(0), comm.size)
    for _, batch in reader.read(Request(name, Position(0, index)) for index in mine):
        batch = batch.to(comm.device)
        loss, errors = batch_loss(worker.model(batch.features, batch.lengths), batch)
        sums += sums.new_tensor([float(loss), errors, batch.num_frames])
    loss_sum, num_errors, num_frames = comm.all_reduce(sums).tolist()
    return loss_sum / num_frames, num_errors / num_frames


def _check_converging(worker: _Worker, dev_loss: float) -> None:
    """Raises ValueError on every worker where the training has diverged on any."""
    comm, training, progress = worker.comm, worker.training, worker.progress
    trained = float(comm.all_reduce(torch.tensor([progress.loss], dtype=torch.float64, device=comm.device)))
    if not (dev_loss < _DIVERGED * math.log(training.num_senones) and math.isfinite(trained)):
        raise ValueError(
            f"{training.name}: after {progress.step} steps the loss of a frame on the development speakers is "
            f"{dev_loss:g}, that of all frames trained on {trained:g}: the training diverged; a lower "
            f"learning_rate than {training.optimisation.learning_rate:g} is needed"
        )


def _keep_best(worker: _Worker, frame_error: float) -> None:
    """best.pt, and what averaged.pt will be made of."""
    progress, training = worker.progress, worker.training
    schedule, writes = training.plan.schedule, worker.comm.rank == 0
    if training.plan.has_met_all(progress.step):  # until then the best may be still to come
        progress.num_validations_since_best += 1
    if frame_error < progress.best_frame_error:
        progress.best_frame_error, progress.best_step = frame_error, progress.step
        progress.num_validations_since_best = 0
        if writes:
            checkpoint.save(training.folder / "best.pt", worker.state())
    latest = Validated(progress.step, frame_error)
    progress.averaged = model_average.choose(
        [*progress.averaged, latest], schedule.average_models, schedule.average
    )
    if writes and latest in progress.averaged:
        model_average.keep(training.checkpoints, worker.state())


# -- checkpoints: one file a rank, and one that says which step all of them have ------------------------------


def _save(worker: _Worker) -> None:
    comm, folder, progress = worker.comm, worker.training.checkpoints, worker.progress
    contents = {
        "progress": asdict(progress),
        "weights": worker.model.state_dict(),
        "optimizer": worker.optimizer.state_dict(),
        "num_workers": comm.size,
        "numeric_mode": worker.training.optimisation.numeric_mode,
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
        model_average.forget_others(folder, progress.averaged)


def _resume(worker: _Worker) -> None:
    comm, optimizer, progress = worker.comm, worker.optimizer, worker.progress
    pointer = worker.training.checkpoints / "latest.json"
    if not pointer.is_file():
        return
    latest = json.loads(pointer.read_text())
    saved_size, mode = latest["num_workers"], worker.training.optimisation.numeric_mode
    saved_ranks = [
        checkpoint.load(pointer.parent / f"step{latest['step']}.rank{rank}.pt")
        for rank in optimizer.ranks_to_load(saved_size)
    ]
    saved = _check_progress(saved_ranks[0]["progress"], pointer.parent)
    if comm.rank == 0 and (before := saved_ranks[0].get("numeric_mode", mode)) != mode:
        warnings.warn(
            f"{worker.training.name}: optimisation.numeric_mode = 'auto' was {before} up to step {latest['step']}, and "
            f"is {mode} on these processors: the training goes on in {mode}, and ends a little differently",
            stacklevel=2,
        )
    # Of each worker, of as many in all.
    saved["frames"] = {name: count * saved_size // comm.size for name, count in saved["frames"].items()}
    saved["positions"] = {name: Position(**position) for name, position in saved["positions"].items()}
    saved["averaged"] = [Validated(**model) for model in saved["averaged"]]
    vars(progress).update(saved)
    with torch.no_grad():
        for name, value in worker.model.state_dict().items():
            value.copy_(saved_ranks[0]["weights"][name])
    optimizer.load_state_dicts([saved_rank["optimizer"] for saved_rank in saved_ranks])


def _check_progress(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Raises ValueError where another version of this program saved it: its micro-batches are others, too."""
    if set(saved) != set(vars(Progress())):
        raise ValueError(
            f"{folder} was begun by another version of teacherstudent, which deals other micro-batches: remove "
            f"{folder.parent} and train again"
        )
    return saved
