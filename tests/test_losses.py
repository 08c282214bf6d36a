"""A frame's loss is the cross-entropy against its label or its kept posteriors; padding has none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacherstudent.training.losses import PADDING, num_frame_errors, posterior_loss, senone_loss

torch.set_num_threads(1)

LENGTHS = (5, 3, 1)  # of the utterances of a batch, B = 3, T = 5


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def draw(num_senones: int, num_kept: int, seed: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Logits (B, T, S), kept ids and renormalised probabilities (B, T, K), of zero in padding."""
    random = np.random.default_rng(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    logits = torch.from_numpy(random.normal(0, 3, (*shape, num_senones))).requires_grad_()
    teacher = softmax(random.normal(0, 3, (*shape, num_senones)))
    ids = np.argsort(-teacher, axis=-1)[..., :num_kept]
    kept = np.take_along_axis(teacher, ids, axis=-1)
    kept /= kept.sum(axis=-1, keepdims=True)
    for row, length in enumerate(LENGTHS):
        ids[row, length:], kept[row, length:] = 0, 0
    return logits, ids, kept


def dense_reference(logits: np.ndarray, ids: np.ndarray, kept: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss, and gradient (B, T, S), from a dense target: sum of -target log softmax(logits)."""
    loss, gradient = 0.0, np.zeros_like(logits)
    for row, length in enumerate(LENGTHS):
        for frame in range(length):
            target = np.zeros(logits.shape[-1])
            target[ids[row, frame]] = kept[row, frame]
            student = softmax(logits[row, frame])
            loss -= (target * np.log(student)).sum()
            gradient[row, frame] = student - target
    return loss, gradient


@settings(max_examples=25, deadline=None)
@given(num_senones=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_the_posterior_loss_and_its_gradient_are_those_of_a_dense_target(
    num_senones: int, share: float, seed: int
) -> None:
    num_kept = max(1, round(share * num_senones))
    logits, ids, kept = draw(num_senones, num_kept, seed)
    loss = posterior_loss(logits, torch.from_numpy(ids), torch.from_numpy(kept))
    (gradient,) = torch.autograd.grad(loss, logits)
    expected_loss, expected_gradient = dense_reference(logits.detach().numpy(), ids, kept)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-10, abs=1e-10)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=0, atol=1e-12)


def test_with_every_senone_kept_the_loss_is_smallest_at_the_teachers_own_logits() -> None:
    _, ids, kept = draw(6, 6, seed=1)
    own = np.zeros((*kept.shape[:2], 6))
    np.put_along_axis(own, ids, np.log(np.maximum(kept, 1e-300)), axis=-1)
    logits = torch.from_numpy(own).requires_grad_()
    loss = posterior_loss(logits, torch.from_numpy(ids), torch.from_numpy(kept))
    (gradient,) = torch.autograd.grad(loss, logits)
    entropy = -(kept * np.log(np.maximum(kept, 1e-300))).sum()
    assert loss.item() == pytest.approx(entropy)
    assert gradient.abs().max() < 1e-12


def test_one_kept_senone_is_a_hard_label() -> None:
    logits, ids, kept = draw(9, 1, seed=2)
    senones = torch.tensor(ids[..., 0])
    for row, length in enumerate(LENGTHS):
        senones[row, length:] = PADDING
    soft = posterior_loss(logits, torch.from_numpy(ids), torch.from_numpy(kept))
    torch.testing.assert_close(soft, senone_loss(logits, senones))


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4]]])
    loss = posterior_loss(logits, torch.tensor([[[1]]]), torch.tensor([[[1.0]]]))
    assert loss.item() == 1e4


def hard_labels(seed: int, num_senones: int) -> tuple[Tensor, Tensor]:
    logits, _, _ = draw(num_senones, 1, seed)
    senones = np.random.default_rng(seed).integers(0, num_senones, logits.shape[:2])
    for row, length in enumerate(LENGTHS):
        senones[row, length:] = PADDING
    return logits, torch.from_numpy(senones)


def test_the_senone_loss_is_the_negative_log_probability_of_the_labels_summed() -> None:
    logits, senones = hard_labels(seed=3, num_senones=8)
    probabilities = softmax(logits.detach().numpy())
    expected = -sum(
        np.log(probabilities[row, frame, senones[row, frame]])
        for row, length in enumerate(LENGTHS)
        for frame in range(length)
    )
    assert senone_loss(logits, senones.int()).item() == pytest.approx(expected)  # labels of any whole type


def test_padding_has_no_loss_no_gradient_and_no_errors_whatever_its_logits() -> None:
    plain, senones = hard_labels(seed=4, num_senones=8)
    _, ids, kept = draw(8, 3, seed=4)
    targets = torch.from_numpy(ids), torch.from_numpy(kept)
    wild = plain.detach().clone()
    for row, length in enumerate(LENGTHS):
        wild[row, length:] = 1e6
    wild.requires_grad_()
    assert torch.equal(senone_loss(plain, senones), senone_loss(wild, senones))
    assert torch.equal(posterior_loss(plain, *targets), posterior_loss(wild, *targets))
    assert torch.equal(num_frame_errors(plain, senones), num_frame_errors(wild, senones))
    (senone_loss(wild, senones) + posterior_loss(wild, *targets)).backward()
    assert wild.grad is not None
    for row, length in enumerate(LENGTHS):
        assert (wild.grad[row, length:] == 0).all()
        assert (wild.grad[row, :length] != 0).any(dim=1).all()


def test_frame_errors_are_valid_frames_whose_best_senone_is_another() -> None:
    best = torch.tensor([[0, 1, 2], [2, 2, 0]])
    senones = torch.tensor([[0, 2, 2], [1, PADDING, PADDING]])
    logits = torch.nn.functional.one_hot(best, 3).double()
    assert int(num_frame_errors(logits, senones)) == 2
