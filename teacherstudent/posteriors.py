"""The few highest posteriors of each frame, which are all that is kept of the teacher's opinion.

Parthasarathi & Strom, "Lessons from Building Acoustic Models with a Million Hours of Speech" (ICASSP 2019),
section 3: the k = 20 highest of about 3,000 senone posteriors, renormalised, train the student as well as all
of them do.
"""
# T frames, S senones, K kept

from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """The K highest posteriors of each frame, the highest first."""

    ids: Tensor  # (T, K) int64, senones
    log_posteriors: Tensor  # (T, K) float32, natural logarithm, not renormalised
    dropped: Tensor  # (T,) float32, the probability of all other senones together


def top_k(logits: Tensor, k: int) -> TopK:
    """The k highest posteriors of each frame, sorted by probability; of equals the lower senone comes first.

    `logits` (T, S) of any floating-point type, on any device, is taken to float32 first; two logits equal in
    float32 are a tie. A logit of -inf is a senone that cannot be (log-posterior -inf).

    Nothing is sorted but the k survivors: frames in which the k-th value has equals outside (rare, but the
    reason why plain topk gives other senones on other machines) get one more pass over the senones.

    Raises ValueError for k outside 1 … S, for NaN or +inf, and for a frame whose logits are all -inf.
    """
    if logits.ndim != 2:
        raise ValueError(f"got logits of shape {tuple(logits.shape)}: (frames, senones) is needed")
    num_senones = logits.shape[1]
    if not 1 <= k <= num_senones:
        raise ValueError(f"got k = {k} of {num_senones} senones: choose k between 1 and {num_senones}")
    logits = logits.detach().float()
    if not len(logits):
        nothing = logits.new_empty((0, k))
        return TopK(nothing.long(), nothing, logits.new_empty(0))
    top = logits.amax(dim=1, keepdim=True)  # NaN if any of them is
    _check_finite(top)
    ids = _highest_ids(logits, k)
    log_sum = (logits - top).exp().sum(dim=1, keepdim=True).log()
    log_posteriors = logits.gather(1, ids) - top - log_sum
    if k == num_senones:
        return TopK(ids, log_posteriors, torch.zeros_like(log_sum[:, 0]))
    dropped = 1 - log_posteriors.exp().sum(dim=1)
    return TopK(ids, log_posteriors, dropped.clamp(min=0))  # below 0 by rounding alone


def renormalise(log_posteriors: Tensor) -> Tensor:
    """Log-posteriors (…, K) shifted so that the probabilities of the K sum to one; in their own type."""
    return torch.log_softmax(log_posteriors, dim=-1)


def _highest_ids(logits: Tensor, k: int) -> Tensor:
    """(T, k) senones by falling logit, the lower senone first among equals."""
    more = min(k + 1, logits.shape[1])
    values, ids = logits.topk(more, dim=1)
    ids = ids[:, :k]
    if more > k:  # is the last of the chosen as high as the first of the others?
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        if len(tied):
            ids = ids.index_copy(0, tied, _lowest_of_equals(logits[tied], values[tied, k - 1, None], k))
    ids = ids.sort(dim=1).values
    by_value = logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, by_value)


def _lowest_of_equals(logits: Tensor, threshold: Tensor, k: int) -> Tensor:
    """(T, k) senones above the threshold (T, 1), then the lowest of those equal to it, by rising senone."""
    above = logits > threshold
    equal = logits == threshold
    free = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= free))
    return chosen.nonzero()[:, 1].view(-1, k)


def _check_finite(top: Tensor) -> None:
    bad = (~torch.isfinite(top[:, 0])).nonzero()[:, 0]
    if len(bad):
        frame = int(bad[0])
        raise ValueError(
            f"the highest logit of frame {frame} is {float(top[frame])}: a finite one is needed "
            f"({len(bad)} of {len(top)} frames are so). Is the model or its input NaN?"
        )
