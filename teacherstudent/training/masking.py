"""Masks over the features in training: SpecAugment (Park et al. 2019, section 2) without its time warping.

# B batch, T frames, F features of a stacked frame (3 M), M mel bands, N masks
"""

import torch
from torch import Tensor

from teacherstudent.data.features import STACKED_FRAMES
from teacherstudent.training_settings import Masking


def mask_features(
    features: Tensor, lengths: Tensor, mean: Tensor, masking: Masking, noise: torch.Generator
) -> Tensor:
    """(B, T, F), (B,) lengths, (F,) mean of the features -> (B, T, F) with the mean wherever a mask lies.

    A mask is as wide as a number drawn evenly from 0 … its greatest width, and lies anywhere in its utterance. One in
    frequency covers the same mel bands in all stacked frames. What is drawn depends on the generator and on the
    batch's size alone. Raises ValueError for masks that are wider than the features.
    """
    num_mels = features.shape[2] // STACKED_FRAMES
    if masking.frequency_masks and masking.frequency_mask_mels > num_mels:
        raise ValueError(
            f"masking.frequency_mask_mels = {masking.frequency_mask_mels}: it must be {num_mels}, "
            "the number of mel bands, or less"
        )
    lengths = lengths.to(noise.device)
    mels = torch.full_like(lengths, num_mels)
    widest = (masking.time_mask_share * lengths).long().clamp(max=masking.time_mask_frames)
    bands = _draw(mels, torch.full_like(lengths, masking.frequency_mask_mels), masking.frequency_masks, noise)
    times = _draw(lengths, widest, masking.time_masks, noise)
    times = torch.nn.functional.pad(times, (0, features.shape[1] - times.shape[1]))
    masked = bands.repeat(1, STACKED_FRAMES)[:, None, :] | times[:, :, None]
    return torch.where(masked, mean.to(features.dtype), features)


def _draw(room: Tensor, widest: Tensor, num_masks: int, noise: torch.Generator) -> Tensor:
    """(B,) places there are, (B,) of them at most in one mask -> (B, max(room)): whether a mask lies there."""
    shape = (2, len(room), num_masks)
    widths, starts = torch.rand(shape, generator=noise, device=noise.device, dtype=torch.float64)
    widths = (widths * (widest[:, None] + 1)).floor()
    starts = (starts * (room[:, None] - widths + 1)).floor()
    places = torch.arange(int(room.max()), device=noise.device)[:, None, None]
    return ((starts <= places) & (places < starts + widths)).any(dim=2).t()
