"""GTC's passes over memory in plain torch, for any device and dtype: see kernels.py."""
# n elements of a bucket, K elements that send, r residual, τ threshold

from collections.abc import Sequence

import torch
from torch import Tensor

from teacherstudent.distributed.codec import Quanta
from teacherstudent.distributed.kernels import Part, spans


def fire(
    residual: Tensor, parts: Sequence[Part], threshold: float, share: float, most: int, commit: bool
) -> tuple[Tensor, Tensor]:
    indices = [residual.new_empty(0, dtype=torch.int64)]
    counts = [residual.new_empty(0, dtype=torch.int64)]
    for part in parts:
        held = residual[part.start : part.stop]
        if part.gradient is not None and share:
            held = _accumulate(held, part.gradient, part.rate * share, commit)
        elif not commit:
            held = held.clone()
        places, taken = _take(held, threshold, most)
        indices.append(places + part.start)
        counts.append(taken)
        if not commit:
            assert part.gradient is not None
            part.gradient.copy_(held.view_as(part.gradient))
    return torch.cat(indices), torch.cat(counts)


def _accumulate(residual: Tensor, gradient: Tensor, scale: float, commit: bool) -> Tensor:
    """fl(r + fl(scale·g)), in the residual's place or in a new one."""
    update = gradient.reshape(-1).to(residual.dtype) * scale
    return residual.add_(update) if commit else update.add_(residual)


def _take(held: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor]:
    """Indices (K) and counts (K) of the quanta taken out of `held` (n)."""
    indices = torch.nonzero(held.abs() >= threshold).view(-1)
    values = held[indices]
    whole = (values.abs() / _scalar(threshold, held)).floor().clamp_(max=most).copysign_(values)
    held[indices] = values - whole * threshold
    return indices, whole.to(torch.int64)


def apply(
    parts: Sequence[Part], received: Sequence[Quanta], threshold: float, num_ranks: int, dtype: torch.dtype
) -> None:
    ranges = [spans(parts, quanta.indices) for quanta in received]
    for number, part in enumerate(parts):
        assert part.gradient is not None
        in_place = part.gradient.dtype == dtype and part.gradient.is_contiguous()
        sums = (
            (part.gradient if in_place else torch.empty_like(part.gradient, dtype=dtype)).reshape(-1).zero_()
        )
        places = [torch.empty(0, dtype=torch.int64, device=sums.device)]
        for quanta, found in zip(received, ranges):
            within = slice(*found[number])
            places.append((quanta.indices[within] - part.start).to(sums.device))
            sums.index_add_(0, places[-1], quanta.counts[within].to(sums.device, dtype))
        union = torch.cat(places)  # what several ranks sent is written several times, with one value
        values = sums[union].mul_(threshold)
        sums[union] = values.div_(_scalar(num_ranks, sums)).div_(_scalar(part.rate, sums))
        if not in_place:
            part.gradient.copy_(sums.view_as(part.gradient))


def _scalar(value: float, like: Tensor) -> Tensor:
    """On the tensor's own device: by a number of the host CUDA divides through its reciprocal, rounding twice."""
    return torch.full((), value, dtype=like.dtype, device=like.device)
