"""Frame losses. Every loss is a sum over the valid frames; the train loop divides by their number.

A frame of a low weight counts less; it does not make the others count more: the mean is over frames, not over weights.
So the gradient of a step is the same however frames are dealt to workers, each of which stands for its frames
(`optimizer.step(weight=frames)`).

# B batch, T frames, S senones, K kept
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from teacherstudent.config import Loss
from teacherstudent.settings import require

PADDING = -1  # senone of a frame that is none
PLAIN = Loss()  # no option is used


class SoftTargets(NamedTuple):
    """What the teacher says of frames. Probabilities and tail of a frame sum to its weight, in padding to zero."""

    ids: Tensor  # (B, T, K) int64, no senone twice in a valid frame
    probabilities: Tensor  # (B, T, K)
    tail: Tensor | None = None  # (B, T) of any other senone


def senone_loss(logits: Tensor, senones: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy against hard labels, in nats, summed. logits (B, T, S), senones (B, T) or PADDING.

    With label smoothing e a frame's loss is -(1 - e) log q_label - (e / S) sum_s log q_s, where q is the softmax of
    its logits (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7).
    """
    return functional.cross_entropy(
        logits.flatten(0, 1),
        senones.flatten().long(),
        ignore_index=PADDING,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def posterior_loss(
    logits: Tensor,
    ids: Tensor,
    probabilities: Tensor,
    tail: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Cross-entropy against SoftTargets, in nats, summed, without a dense target. logits (B, T, S).

    Without a tail a frame's loss is logsumexp(z) - sum_k p_k z_k: against the renormalised kept posteriors and the
    student's full softmax (Parthasarathi & Strom 2019, section 3). A tail stands for one more class, any senone but
    the kept: the loss is -sum_k p_k log q_k - p_tail log(1 - sum_k q_k).

    With a temperature the logits are divided by it and the loss is multiplied by its square, so that the size of the
    gradient stays (Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.1); the
    targets are taken as they are: soften_targets has raised them.

    Holds one tensor of the logits' size besides the logits, until its gradient is taken, which works once.
    """
    loss: Tensor = _PosteriorLoss.apply(logits, ids, probabilities, tail, temperature)
    return loss


class _PosteriorLoss(torch.autograd.Function):
    """The kept senones apart from the rest: 1 - sum_k q_k, of which float32 would leave nothing when the kept are
    almost certain, is never computed as a difference. With r the softmax over the rest, the gradient is
    weight * q_k - p_k for those that were kept, and (weight * q_rest - p_tail) * r_j for the others.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, probabilities: Tensor, tail: Tensor | None, temperature: float
    ) -> Tensor:
        kept = logits.gather(2, ids) / temperature
        rest = logits.scatter(2, ids, -torch.inf)
        if temperature != 1:
            rest.div_(temperature)
        top = rest.amax(dim=2, keepdim=True).clamp(
            min=torch.finfo(rest.dtype).min
        )  # -inf: every senone is kept
        rest.sub_(top).exp_()
        rest_sum = rest.sum(dim=2, keepdim=True)
        highest = torch.maximum(top, kept.amax(dim=2, keepdim=True))  # all logarithms are relative to it
        kept.sub_(highest)
        rest_log_sum = top - highest + rest_sum.log()
        log_sum = torch.logaddexp(rest_log_sum, kept.logsumexp(dim=2, keepdim=True))
        tail = torch.zeros_like(log_sum) if tail is None else tail[:, :, None]
        weight = probabilities.sum(dim=2, keepdim=True) + tail
        ctx.save_for_backward(rest, rest_sum, rest_log_sum, kept, log_sum, ids, probabilities, tail, weight)
        ctx.temperature = temperature
        surprise = weight * log_sum - (probabilities * kept).sum(dim=2, keepdim=True)
        tail_surprise = torch.where(tail > 0, tail * rest_log_sum, 0)
        return temperature**2 * (surprise - tail_surprise).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rest, rest_sum, rest_log_sum, kept, log_sum, ids, probabilities, tail, weight = ctx.saved_tensors
        scale = upstream * ctx.temperature
        share = weight * (rest_log_sum - log_sum).exp() - tail
        gradient = rest.mul_(scale * share / rest_sum.clamp(min=1))  # a sum below 1 is 0: there is no rest
        gradient.scatter_(2, ids, scale * (weight * (kept - log_sum).exp() - probabilities))
        return gradient, None, None, None, None


def soften_targets(ids: Tensor, probabilities: Tensor, dropped: Tensor | None, settings: Loss) -> SoftTargets:
    """What a frame is trained on, from what is stored: ids and renormalised probabilities (B, T, K), the highest first,
    and the mass (B, T) that was dropped before they were renormalised.

    In this order: the best `kept` are taken; they are renormalised, or what is left is the tail; with a temperature
    each is raised to 1 / temperature and they are renormalised again, which the senones that were dropped should have
    a part in, but have none; all of a frame are multiplied by its confidence.

    Raises ValueError for `kept` above K, and where `dropped` is needed and missing.
    """
    stored = ids.shape[2]
    require(settings.kept <= stored, "loss.kept", settings.kept, f"at most the {stored} that are stored")
    k = settings.kept or stored
    weighs = settings.confidence != "none" or settings.confidence_floor > 0
    ids, chosen = ids[:, :, :k], probabilities[:, :, :k]
    tail = None
    if settings.tail or weighs:
        if dropped is None:
            raise ValueError("these targets have no dropped mass, which loss.tail and loss.confidence need")
        posteriors = chosen * (1 - dropped[:, :, None])
    if settings.tail:
        others = probabilities[:, :, k:].sum(dim=2) * (1 - dropped) + dropped  # type: ignore[operator]
        chosen, tail = posteriors, others
    elif k < stored:
        chosen = _renormalise(chosen)
    if settings.temperature != 1:
        chosen = _renormalise(chosen ** (1 / settings.temperature))
    if weighs:
        confidence = _confidence(posteriors, settings)
        chosen, tail = chosen * confidence[:, :, None], None if tail is None else tail * confidence
    return SoftTargets(ids, chosen, tail)


def _renormalise(probabilities: Tensor) -> Tensor:
    """(B, T, K): each frame's sum to one; padding stays zero."""
    return probabilities / probabilities.sum(dim=2, keepdim=True).clamp(
        min=torch.finfo(probabilities.dtype).tiny
    )


def _confidence(posteriors: Tensor, settings: Loss) -> Tensor:
    """(B, T) the weight of each frame, from the teacher's posteriors (B, T, K), not renormalised."""
    highest = posteriors[:, :, 0]
    weights = {"none": torch.ones_like(highest), "highest": highest, "kept": posteriors.sum(dim=2)}
    return torch.where(highest >= settings.confidence_floor, weights[settings.confidence], 0)


def best_senones(ids: Tensor, probabilities: Tensor) -> Tensor:
    """(B, T) the senone that the teacher finds most probable, PADDING where there is no frame."""
    return ids[:, :, 0].masked_fill(probabilities[:, :, 0] == 0, PADDING)


def num_frame_errors(logits: Tensor, senones: Tensor) -> Tensor:
    """Valid frames in which another senone is better than the label. senones (B, T) or PADDING."""
    labels = senones.long().clamp(min=0)[:, :, None]
    right = logits.gather(2, labels)[:, :, 0] >= logits.amax(
        dim=2
    )  # argmax takes five times as long; NaN is wrong
    return (~right & (senones != PADDING)).sum()
