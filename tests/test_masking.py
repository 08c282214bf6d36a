"""Masks hide what their settings say, in every utterance other places, and never more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacherstudent.training.masking import mask_features
from teacherstudent.training_settings import Masking

torch.set_num_threads(1)

MELS, STACKED = 8, 3
MEAN = torch.arange(MELS * STACKED) / 7


def draw(lengths: list[int], masking: Masking, seed: int = 0) -> Tensor:
    """(B, T, 24) bool: which of the features were hidden."""
    features = torch.full((len(lengths), max(lengths), MELS * STACKED), 50.0)
    noise = torch.Generator().manual_seed(seed)
    masked = mask_features(features, torch.tensor(lengths), MEAN, masking, noise)
    hidden = masked != features
    assert torch.equal(masked[hidden], MEAN.expand_as(masked)[hidden])
    assert (features == 50).all()  # the batch itself is left alone
    return hidden


def runs(marks: Tensor) -> list[int]:
    """Lengths of the stretches of True."""
    edges = torch.diff(marks.int(), prepend=torch.tensor([0]), append=torch.tensor([0]))
    return ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5).map(lambda found: sorted(found)[::-1]),
    masks=st.integers(0, 3),
    widest=st.integers(1, MELS),
    seed=st.integers(0, 2**40),
)
def test_frequency_masks_cover_the_same_few_bands_in_all_stacked_frames_of_an_utterance(
    lengths: list[int], masks: int, widest: int, seed: int
) -> None:
    hidden = draw(lengths, Masking(frequency_masks=masks, frequency_mask_mels=widest), seed)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))  # in all frames
    bands = hidden[:, 0].view(len(lengths), STACKED, MELS)
    assert torch.equal(bands, bands[:, :1].expand_as(bands))
    for row in bands[:, 0]:
        assert len(runs(row)) <= masks
        assert int(row.sum()) <= masks * widest


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5).map(lambda found: sorted(found)[::-1]),
    masks=st.integers(0, 3),
    widest=st.integers(1, 70),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_time_masks_cover_whole_frames_within_the_utterance_and_its_share(
    lengths: list[int], masks: int, widest: int, share: float, seed: int
) -> None:
    masking = Masking(time_masks=masks, time_mask_frames=widest, time_mask_share=share)
    hidden = draw(lengths, masking, seed)
    frames = hidden[:, :, 0]
    assert torch.equal(hidden, frames[:, :, None].expand_as(hidden))
    for row, length in zip(frames, lengths):
        assert not row[length:].any()
        assert len(runs(row)) <= masks
        assert int(row.sum()) <= masks * min(widest, share * length)


def test_widths_are_drawn_evenly_from_none_to_the_greatest() -> None:
    frequency = Masking(frequency_masks=1, frequency_mask_mels=4)
    time = Masking(time_masks=1, time_mask_frames=4, time_mask_share=1.0)
    bands = draw([9] * 4000, frequency)[:, 0, :MELS]
    frames = draw([9] * 4000, time)[:, :, 0]
    for marks in (bands, frames):
        counts = torch.bincount(marks.sum(dim=1), minlength=5)
        assert len(counts) == 5
        assert ((counts - 800).abs() < 130).all()  # 5 standard deviations of 4,000 draws from 5


def test_masks_lie_anywhere_each_utterance_its_own() -> None:
    hidden = draw([30] * 400, Masking(frequency_masks=1, time_masks=1, frequency_mask_mels=2))
    assert hidden.any(dim=0).all()
    assert len({tuple(row.flatten().tolist()) for row in hidden}) > 300


def test_masks_are_of_the_generator_alone() -> None:
    masking = Masking(frequency_masks=2, time_masks=2, frequency_mask_mels=3)
    first = draw([40, 30], masking, seed=1)
    torch.manual_seed(5)
    assert torch.equal(draw([40, 30], masking, seed=1), first)
    assert not torch.equal(draw([40, 30], masking, seed=2), first)


def test_masks_wider_than_the_features_are_refused() -> None:
    with pytest.raises(ValueError, match="frequency_mask_mels = 12: it must be 8, the number of mel bands"):
        draw([5], Masking(frequency_masks=1))
