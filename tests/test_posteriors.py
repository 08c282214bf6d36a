"""Laws of the top-k posteriors; the oracle is a full stable sort in float64."""
# T frames, S senones, K kept

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from teacherstudent.posteriors import renormalise, top_k

torch.set_num_threads(1)

# few distinct values: ties everywhere, also at the k-th place; -inf is a senone that cannot be
TIED = st.sampled_from([-np.inf, -30.0, -1.0, -0.0, 0.0, 0.5, 2.0, 40.0])
ANY = st.floats(-50, 50, width=32)


def logits_and_k(values):
    shapes = st.tuples(st.integers(0, 4), st.integers(1, 12))
    matrices = shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=values))
    possible = matrices.filter(lambda x: bool(np.isfinite(x.max(axis=1)).all()))
    return possible.flatmap(lambda x: st.tuples(st.just(x), st.integers(1, x.shape[1])))


def oracle(logits, k):
    """By rising id, then by falling value: numpy's stable sort of everything."""
    wide = logits.astype(np.float64)
    ids = np.argsort(-wide, axis=1, kind="stable")[:, :k]
    shifted = wide - wide.max(axis=1, keepdims=True, initial=-np.inf)
    log_posteriors = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    kept = np.take_along_axis(log_posteriors, ids, axis=1)
    return ids, kept, 1 - np.exp(kept).sum(axis=1)


@given(st.one_of(logits_and_k(TIED), logits_and_k(ANY)))
@settings(max_examples=200, deadline=None)
def test_top_k_is_the_head_of_a_stable_full_sort(case):
    logits, k = case
    got = top_k(torch.from_numpy(logits), k)
    ids, log_posteriors, dropped = oracle(logits, k)
    np.testing.assert_array_equal(got.ids.numpy(), ids)
    np.testing.assert_allclose(got.log_posteriors.numpy(), log_posteriors, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.dropped.numpy(), dropped, atol=1e-5)
    assert got.ids.dtype == torch.int64 and got.log_posteriors.dtype == torch.float32
    assert (got.dropped >= 0).all()


def test_ties_across_the_last_place_go_to_the_lower_senones_in_a_wide_row():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (50, 3000), generator=generator).float()
    ids, _, _ = oracle(logits.numpy(), 20)
    np.testing.assert_array_equal(top_k(logits, 20).ids.numpy(), ids)


def test_a_frame_gets_the_same_bits_alone_and_among_others():
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(1)) * 4
    together = top_k(logits, 20)
    for frame in (0, 17, 39):
        alone = top_k(logits[frame : frame + 1], 20)
        assert all(torch.equal(a[0], b[frame]) for a, b in zip(alone, together, strict=True))


def test_a_constant_added_to_all_logits_changes_nothing_much():
    logits = torch.randn(10, 100, generator=torch.Generator().manual_seed(2))
    moved, still = top_k(logits + 1024.0, 5), top_k((logits + 1024.0) - 1024.0, 5)
    assert torch.equal(moved.ids, still.ids)
    torch.testing.assert_close(moved.log_posteriors, still.log_posteriors, rtol=0, atol=1e-6)


def test_all_senones_kept_drop_exactly_nothing():
    assert (top_k(torch.randn(7, 9), 9).dropped == 0).all()


def test_half_precision_logits_are_summed_in_float32():
    best = top_k(torch.zeros(1, 3000, dtype=torch.float16), 1)
    assert best.log_posteriors.item() == pytest.approx(-np.log(3000), abs=1e-5)
    assert best.dropped.item() == pytest.approx(2999 / 3000, abs=1e-6)


@given(logits_and_k(ANY))
@settings(max_examples=50, deadline=None)
def test_renormalised_posteriors_sum_to_one_and_keep_their_ratios(case):
    logits, k = case
    kept = top_k(torch.from_numpy(logits), k).log_posteriors
    whole = renormalise(kept)
    np.testing.assert_allclose(whole.exp().sum(dim=1), 1, atol=1e-5)
    np.testing.assert_allclose(whole - whole[:, :1], kept - kept[:, :1], atol=1e-5)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_outside_of_the_senones_is_refused_with_the_range(k):
    with pytest.raises(ValueError, match=f"k = {k} of 5 senones: choose k between 1 and 5"):
        top_k(torch.zeros(2, 5), k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_refused_with_the_frame(bad):
    logits = torch.zeros(4, 5)
    logits[2, 1] = bad
    with pytest.raises(ValueError, match="frame 2"):
        top_k(logits, 3)


def test_a_frame_without_any_possible_senone_is_refused():
    with pytest.raises(ValueError, match="frame 0 is -inf"):
        top_k(torch.full((1, 5), -torch.inf), 2)


def test_logits_of_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"\(frames, senones\) is needed"):
        top_k(torch.zeros(2, 3, 4), 1)
