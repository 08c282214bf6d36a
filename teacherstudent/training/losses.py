"""Frame losses. Every loss is a sum over the valid frames; the train loop divides by their number.

# B batch, T frames, S senones, K kept
"""

import torch
from torch import Tensor
from torch.nn import functional

PADDING = -1  # senone of a frame that is none


def senone_loss(logits: Tensor, senones: Tensor) -> Tensor:
    """Cross-entropy against hard labels, in nats, summed. logits (B, T, S), senones (B, T) or PADDING."""
    return functional.cross_entropy(
        logits.flatten(0, 1), senones.flatten().long(), ignore_index=PADDING, reduction="sum"
    )


def posterior_loss(logits: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """Cross-entropy against the K kept posteriors, in nats, summed, without a dense target.

    logits (B, T, S); ids (B, T, K) int64; probabilities (B, T, K) sum to one in a valid frame and are all zero in
    padding. A frame's loss is logsumexp(z) - sum_k p_k z_k, the cross-entropy against the renormalised kept
    posteriors and the student's full softmax (Parthasarathi & Strom 2019, section 3).
    """
    kept = (probabilities * logits.gather(2, ids)).sum()
    valid = probabilities.sum(dim=2) > 0
    return torch.logsumexp(logits, dim=2)[valid].sum() - kept


def num_frame_errors(logits: Tensor, senones: Tensor) -> Tensor:
    """Valid frames whose best senone is another than the label. senones (B, T) or PADDING."""
    return ((logits.argmax(dim=2) != senones) & (senones != PADDING)).sum()


def best_senones(ids: Tensor, probabilities: Tensor) -> Tensor:
    """Of kept posteriors, padded with zeros: the likeliest of each frame. (B, T, K) twice -> (B, T), or PADDING."""
    highest, place = probabilities.max(dim=2)
    return ids.gather(2, place[..., None])[..., 0].masked_fill(highest == 0, PADDING)
