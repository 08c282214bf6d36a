"""The gradient of one step on one worker."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from teacherstudent.config import Loss, Optimisation
from teacherstudent.distributed import Communicator
from teacherstudent.distributed.optimizers import DistributedOptimizer
from teacherstudent.training.batches import Batch
from teacherstudent.training.inference import computing, has_bfloat16
from teacherstudent.training.losses import (
    PLAIN,
    best_senones,
    num_frame_errors,
    posterior_loss,
    senone_loss,
    soften_targets,
)
from teacherstudent.training.masking import mask_features
from teacherstudent.training.models import AcousticModel


@dataclass(frozen=True)
class Part:
    """A micro-batch of one source, what its loss is, and what that counts in the step."""

    batch: Batch
    loss_weight: float = 1.0
    loss: Loss = PLAIN


@dataclass(frozen=True)
class Measured:
    """Sums over the frames of one part: its loss before any weight, and the frames whose best senone is wrong."""

    loss: float
    errors: int
    num_frames: int


def compute_gradient(
    model: AcousticModel,
    optimizer: DistributedOptimizer,
    parts: Sequence[Part],
    noise: torch.Generator,
    settings: Optimisation,
    multiplier: float,
) -> tuple[list[Measured], float]:
    """Leaves the gradient of the weighted mean frame loss in the parameters, clipped, then times the multiplier.

    With settings.chunk_frames the gradients of an utterance's chunks add up to that of one step: no state outlives the
    micro-batch, so that a step is of its batches and the weights alone, and sampling and resuming need not know of
    chunks. settings.numeric_mode is one that agree_numeric_mode gave.

    Returns what was measured on each part, and the norm of the gradient before it was clipped.
    """
    num_frames = sum(part.batch.num_frames for part in parts)
    if not num_frames:  # this worker has no data in this step: it takes part with weight 0
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return [Measured(0.0, 0, 0) for _ in parts], 0.0
    optimizer.zero_grad()
    with computing(settings.numeric_mode):
        measured = [_backward(model, part, noise, settings, num_frames) for part in parts]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(multiplier)
    return measured, float(norm)


def agree_numeric_mode(settings: Optimisation, comm: Communicator) -> Optimisation:
    """With "auto" resolved: bf16 where every worker's processor has bfloat16.

    Raises ValueError on every worker where bf16 is asked for and some processor lacks it.
    """
    if settings.numeric_mode == "fp32":
        return settings
    lacking = torch.tensor([not has_bfloat16(comm.device)], dtype=torch.float64, device=comm.device)
    num_lacking = int(comm.all_reduce(lacking))
    if num_lacking and settings.numeric_mode == "bf16":
        raise ValueError(
            f"optimisation.numeric_mode = 'bf16': {num_lacking} of {comm.size} workers have a processor without "
            "bfloat16: 'fp32' is needed, or 'auto', which takes bf16 where all have it"
        )
    return replace(settings, numeric_mode="fp32" if num_lacking else "bf16")


def _backward(
    model: AcousticModel, part: Part, noise: torch.Generator, settings: Optimisation, num_frames: int
) -> Measured:
    """Adds the part's share of the gradient. num_frames: of the whole step on this worker."""
    if not part.batch.num_frames:
        return Measured(0.0, 0, 0)
    total = 0.0
    errors = 0
    for batch, logits in _pass(model, part.batch, noise, settings):
        loss, wrong = batch_loss(logits, batch, part.loss)
        (part.loss_weight * loss / num_frames).backward()
        total += float(loss.detach())
        errors += wrong
    return Measured(total, errors, part.batch.num_frames)


def _pass(
    model: AcousticModel, batch: Batch, noise: torch.Generator, settings: Optimisation
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The batch and its logits: whole, or chunk by chunk."""
    assert settings.numeric_mode != "auto", "agree_numeric_mode resolves it"
    bfloat16, masking, features = settings.numeric_mode == "bf16", settings.masking, batch.features
    source = "human" if batch.senones is not None else "machine"
    if source in masking.sources and (masking.frequency_masks or masking.time_masks):
        features = mask_features(features, batch.lengths, model.mean, masking, noise)
    if not settings.chunk_frames:
        yield batch, model(features, batch.lengths, noise, bfloat16)
        return
    for frames, logits in model.chunks(features, batch.lengths, settings.chunk_frames, noise, bfloat16):
        yield _cut(batch, frames), logits


def _cut(batch: Batch, frames: slice) -> Batch:
    """Those frames of every utterance, as far as it has them."""
    values = {
        name: None if value is None else value[:, frames]
        for name, value in vars(batch).items()
        if name != "lengths"
    }
    lengths = batch.lengths.clamp(max=frames.stop) - batch.lengths.clamp(max=frames.start)
    return replace(batch, lengths=lengths, **values)  # type: ignore[arg-type]


def batch_loss(logits: torch.Tensor, batch: Batch, loss: Loss = PLAIN) -> tuple[torch.Tensor, int]:
    """Summed loss, and frame errors: against the human labels, or where there are none the teacher's best senones.

    logits (B, T, S); the loss is computed in float32 at least.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if batch.senones is None:
        assert batch.ids is not None and batch.probabilities is not None
        best = best_senones(batch.ids, batch.probabilities)
        return _soft_loss(logits, batch, loss), int(num_frame_errors(logits.detach(), best))
    errors = int(num_frame_errors(logits.detach(), batch.senones))
    total = senone_loss(logits, batch.senones, loss.label_smoothing)
    if loss.soft_share:
        total = (1 - loss.soft_share) * total + loss.soft_share * _soft_loss(logits, batch, loss)
    return total, errors


def _soft_loss(logits: torch.Tensor, batch: Batch, loss: Loss) -> torch.Tensor:
    assert batch.ids is not None and batch.probabilities is not None
    targets = soften_targets(batch.ids, batch.probabilities, batch.dropped, loss)
    return posterior_loss(logits, *targets, temperature=loss.temperature)
