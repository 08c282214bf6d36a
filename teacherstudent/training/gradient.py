"""The gradient of one step on one worker."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from teacherstudent.config import Optimisation
from teacherstudent.distributed.optimizers import DistributedOptimizer
from teacherstudent.training.batches import Batch
from teacherstudent.training.losses import best_senones, num_frame_errors, posterior_loss, senone_loss
from teacherstudent.training.models import AcousticModel


@dataclass(frozen=True)
class Part:
    """A micro-batch of one source, and what its loss counts in the step."""

    batch: Batch
    loss_weight: float = 1.0


@dataclass(frozen=True)
class Measured:
    """Sums over the frames of one part: its loss before any weight, and the errors where they can be told."""

    loss: float
    errors: int | None
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

    Returns what was measured on each part, and the norm of the gradient before it was clipped.
    """
    num_frames = sum(part.batch.num_frames for part in parts)
    if not num_frames:  # this worker has no data in this step: it takes part with weight 0
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return [Measured(0.0, 0, 0) for _ in parts], 0.0
    optimizer.zero_grad()
    measured = [_backward(model, part, noise, num_frames) for part in parts]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(multiplier)
    return measured, float(norm)


def _backward(model: AcousticModel, part: Part, noise: torch.Generator, num_frames: int) -> Measured:
    """Adds the part's share of the gradient. num_frames: of the whole step on this worker."""
    batch = part.batch
    if not batch.num_frames:
        return Measured(0.0, 0, 0)
    loss, errors = batch_loss(model(batch.features, batch.lengths, noise), batch)
    (part.loss_weight * loss / num_frames).backward()
    return Measured(float(loss.detach()), errors, batch.num_frames)


def batch_loss(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int | None]:
    """Summed loss, and frame errors: against human labels, or the teacher's best senone."""
    if batch.senones is not None:
        return senone_loss(logits, batch.senones), int(num_frame_errors(logits.detach(), batch.senones))
    assert batch.ids is not None and batch.probabilities is not None
    best = best_senones(batch.ids, batch.probabilities)
    errors = int(num_frame_errors(logits.detach(), best))
    return posterior_loss(logits, batch.ids, batch.probabilities), errors
