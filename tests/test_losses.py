"""A frame's loss is the cross-entropy against its label or its kept posteriors; padding has none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from teacherstudent.config import Loss
from teacherstudent.training.losses import (
    PADDING,
    best_senones,
    num_frame_errors,
    posterior_loss,
    senone_loss,
    soften_targets,
)

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


def test_a_frame_error_of_a_network_that_says_nan_is_an_error() -> None:
    assert int(num_frame_errors(torch.full((1, 2, 3), torch.nan), torch.zeros(1, 2))) == 2


@settings(max_examples=15, deadline=None)
@given(smoothing=st.floats(0, 0.9), seed=st.integers(0, 2**32))
def test_label_smoothing_shares_out_a_part_of_the_label_evenly_over_all_senones(
    smoothing: float, seed: int
) -> None:
    logits, senones = hard_labels(seed, num_senones=6)
    valid = senones != PADDING
    target = torch.nn.functional.one_hot(senones.clamp(min=0), 6).double() * (1 - smoothing) + smoothing / 6
    dense = -(target * torch.log_softmax(logits, dim=2))[valid].sum()
    (expected,) = torch.autograd.grad(dense, logits)
    loss = senone_loss(logits, senones, smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(dense.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


# -- the tail, the temperature, weights ----------------------------------------------------------------------


def dense_loss(
    logits: Tensor, ids: Tensor, probabilities: Tensor, tail: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """Frame by frame and senone by senone, with a class for the tail, in the logits' type."""
    total = logits.new_zeros(())
    for row, length in enumerate(LENGTHS):
        for frame in range(length):
            student = torch.log_softmax(logits[row, frame] / temperature, dim=0)
            total = total - (probabilities[row, frame] * student[ids[row, frame]]).sum()
            others = torch.ones(len(student), dtype=torch.bool)
            others[ids[row, frame]] = False
            if tail is not None and others.any():
                total = total - tail[row, frame] * student[others].logsumexp(0)
    return temperature**2 * total


def valid_frames() -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@settings(max_examples=40, deadline=None)
@given(
    num_senones=st.integers(1, 12),
    share=st.floats(0, 1),
    has_tail=st.booleans(),
    temperature=st.floats(0.3, 8),
    seed=st.integers(0, 2**32),
)
def test_tail_temperature_and_weights_are_those_of_a_dense_reference(
    num_senones: int, share: float, has_tail: bool, temperature: float, seed: int
) -> None:
    num_kept = max(1, round(share * num_senones))
    logits, drawn, kept = draw(num_senones, num_kept, seed)
    ids, probabilities = torch.from_numpy(drawn), torch.from_numpy(kept)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, 5, generator=generator, dtype=torch.float64) * valid_frames()
    mass = torch.rand(3, 5, generator=generator, dtype=torch.float64) if num_kept < num_senones else 1
    probabilities = probabilities * (weights * mass if has_tail else weights)[:, :, None]
    tail = weights * (1 - mass) if has_tail else None
    expected_loss = dense_loss(logits, ids, probabilities, tail, temperature)
    (expected,) = torch.autograd.grad(0.3 * expected_loss, logits)
    loss = posterior_loss(logits, ids, probabilities, tail, temperature)
    (gradient,) = torch.autograd.grad(0.3 * loss, logits)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-11, abs=1e-11)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert (gradient[~valid_frames()] == 0).all()


def test_the_gradient_with_a_tail_is_that_of_small_differences() -> None:
    logits, drawn, kept = draw(7, 3, seed=5)
    ids, probabilities = torch.from_numpy(drawn), 0.8 * torch.from_numpy(kept)
    tail = 0.2 * valid_frames().double()
    (gradient,) = torch.autograd.grad(posterior_loss(logits, ids, probabilities, tail, 2.0), logits)
    plain, step = logits.detach(), 1e-5
    for place in np.ndindex(*plain.shape):
        higher, lower = plain.clone(), plain.clone()
        higher[place] += step
        lower[place] -= step
        rise = posterior_loss(higher, ids, probabilities, tail, 2.0) - posterior_loss(
            lower, ids, probabilities, tail, 2.0
        )
        assert float(gradient[place]) == pytest.approx(float(rise) / (2 * step), abs=1e-8)


@pytest.mark.parametrize(
    "gap", [0.0, 21.0, 60.0, 2e4]
)  # the kept have all but e^-gap * S of the student's mass
@pytest.mark.parametrize("tail_mass", [0.0, 1e-9, 0.3, 1.0])
def test_the_tail_in_float32_is_exact_however_sure_the_student_is(gap: float, tail_mass: float) -> None:
    num_senones, num_kept = 3000, 20
    random = np.random.default_rng(1)
    exact = torch.from_numpy(random.normal(0, 1, (1, 1, num_senones)).astype(np.float32)).double()
    exact[..., :num_kept] += gap / 2
    exact[..., num_kept:] -= gap / 2
    exact = exact.float().double().requires_grad_()
    ids = torch.arange(num_kept)[None, None]
    probabilities = torch.full((1, 1, num_kept), (1 - tail_mass) / num_kept, dtype=torch.float64)
    tail = torch.full((1, 1), tail_mass, dtype=torch.float64)
    student = torch.log_softmax(exact[0, 0], dim=0)
    expected_loss = -(probabilities[0, 0] * student[:num_kept]).sum() - tail_mass * student[
        num_kept:
    ].logsumexp(0)
    (expected,) = torch.autograd.grad(expected_loss, exact)
    logits = exact.detach().float().requires_grad_()
    loss = posterior_loss(logits, ids, probabilities.float(), tail.float())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("num_kept", [1, 2, 3])
def test_the_extremes_of_float32_stay_finite(num_kept: int) -> None:
    logits = torch.tensor([[[1e4, -1e4, -1e4], [-1e4, -1e4, 1e4], [0, 0, 0]]], requires_grad=True)
    ids = torch.arange(num_kept).expand(1, 3, num_kept)
    probabilities = torch.full((1, 3, num_kept), 0.9 / num_kept)
    tail = torch.full((1, 3), 0.1 if num_kept < 3 else 0.0)
    for temperature in (0.1, 1.0, 100.0):
        loss = posterior_loss(logits, ids, probabilities, tail, temperature)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


class Large(TorchDispatchMode):
    """Counts the tensors of at least so many elements that come into being."""

    def __init__(self, num_elements: int, known: Tensor) -> None:
        super().__init__()
        self.num_elements, self.places = num_elements, {known.untyped_storage().data_ptr()}
        self.made: list[Tensor] = []  # held, or another would be made in its place

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, Tensor) and made.numel() >= self.num_elements:
            place = made.untyped_storage().data_ptr()
            if place not in self.places:
                self.places.add(place)
                self.made.append(made)
        return made


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_take_one_tensor_of_the_logits_size_in_all(temperature: float) -> None:
    logits, ids, kept = draw(50, 3, seed=6)
    targets = torch.from_numpy(ids), torch.from_numpy(kept)
    with Large(logits.numel(), logits) as large:
        loss = posterior_loss(logits, *targets, torch.zeros(3, 5).double(), temperature)
        torch.autograd.grad(loss, logits, retain_graph=True)
    assert len(large.made) == 1
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


# -- from what is stored to what is trained on ---------------------------------------------------------------


def stored_targets(seed: int = 7, num_kept: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """ids and renormalised probabilities (B, T, K), dropped mass (B, T)."""
    _, ids, kept = draw(9, num_kept, seed)
    dropped = np.random.default_rng(seed).uniform(0, 0.4, ids.shape[:2]) * valid_frames().numpy()
    return torch.from_numpy(ids), torch.from_numpy(kept), torch.from_numpy(dropped)


def test_without_options_the_stored_targets_are_trained_on_as_they_are() -> None:
    ids, probabilities, dropped = stored_targets()
    found = soften_targets(ids, probabilities, dropped, Loss())
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.probabilities, probabilities)
    assert found.tail is None


@settings(max_examples=40, deadline=None)
@given(
    kept=st.integers(0, 4),
    confidence=st.sampled_from(["none", "highest", "kept"]),
    floor=st.sampled_from([0.0, 0.4, 0.6]),
    temperature=st.sampled_from([None, 1.0, 0.5, 3.0]),  # none: the tail instead
    seed=st.integers(0, 99),
)
def test_every_option_does_to_a_frame_what_it_says(
    kept: int, confidence: str, floor: float, temperature: float | None, seed: int
) -> None:
    ids, probabilities, dropped = stored_targets(seed)
    options = Loss(
        kept=kept,
        tail=temperature is None,
        temperature=temperature or 1.0,
        confidence=confidence,
        confidence_floor=floor,
    )
    found = soften_targets(ids, probabilities, dropped, options)
    k = kept or 4
    for row, length in enumerate(LENGTHS):
        for frame in range(length):
            teacher = probabilities[row, frame].numpy() * (1 - float(dropped[row, frame]))
            weight = {"none": 1.0, "highest": teacher[0], "kept": teacher[:k].sum()}[confidence]
            weight *= teacher[0] >= floor
            if temperature is None:
                expected = teacher[:k]
                assert found.tail is not None
                assert float(found.tail[row, frame]) == pytest.approx(weight * (1 - expected.sum()))
            else:
                raised = teacher[:k] ** (1 / temperature)
                expected = raised / raised.sum()
            np.testing.assert_allclose(found.probabilities[row, frame], weight * expected, rtol=1e-12)
            assert torch.equal(found.ids[row, frame], ids[row, frame, :k])
    assert (found.probabilities[~valid_frames()] == 0).all()
    assert found.tail is None or (found.tail[~valid_frames()] == 0).all()


def test_a_mass_of_almost_nothing_is_no_negative_tail() -> None:
    probabilities = torch.tensor([[[1 - 1e-9, 1e-9]]], dtype=torch.float32)
    found = soften_targets(torch.tensor([[[0, 1]]]), probabilities, torch.tensor([[1e-9]]), Loss(tail=True))
    assert found.tail is not None
    assert float(found.tail) == pytest.approx(1e-9)


def test_a_student_that_agrees_with_the_teacher_has_no_gradient_under_the_tail() -> None:
    teacher = torch.randn(1, 1, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    posteriors, ids = teacher.softmax(2).sort(descending=True)
    own = teacher.clone().requires_grad_()
    mass = posteriors[..., :4].sum(2)
    stored = ids[..., :4], posteriors[..., :4] / mass[..., None], 1 - mass
    for kept in (0, 1, 3):
        targets = soften_targets(*stored, Loss(tail=True, kept=kept))
        (gradient,) = torch.autograd.grad(posterior_loss(own, *targets), own)
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("options", "with_dropped", "message"),
    [
        (Loss(kept=5), True, "loss.kept = 5: it must be at most the 4"),
        (Loss(tail=True), False, "no dropped mass"),
        (Loss(confidence="highest"), False, "no dropped mass"),
    ],
)
def test_targets_that_lack_what_a_loss_needs_are_refused(
    options: Loss, with_dropped: bool, message: str
) -> None:
    ids, probabilities, dropped = stored_targets()
    with pytest.raises(ValueError, match=message):
        soften_targets(ids, probabilities, dropped if with_dropped else None, options)


def test_the_best_senone_of_a_machine_label_is_its_first_and_padding_has_none() -> None:
    ids, probabilities, _ = stored_targets()
    best = best_senones(ids, probabilities)
    assert torch.equal(best[valid_frames()], ids[..., 0][valid_frames()])
    assert (best[~valid_frames()] == PADDING).all()
