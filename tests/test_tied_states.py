"""Tied states: what Kaldi reads is what was grown, and every state in any context has a pdf."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from teacherstudent.alignment.tied_states import (
    SILENCE_ID,
    TiedStates,
    find_bases,
    frame_events,
    list_states,
    num_states,
    sum_events,
    tie,
)
from teacherstudent.tying.event_map import find_answer

PHONES = ("SIL", "A0_B", "A1_E", "B_B", "B_S", "C_I")
BASES = find_bases(PHONES)
NUM_BASES, STATES, D = 4, 2, 3
FLOOR = np.full(D, 1e-3)


def make_events(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames of which those of A differ before B from elsewhere, and those of B after C; nothing else matters."""
    rng = np.random.default_rng(seed)
    rows = [(0, SILENCE_ID, 0, state) for state in range(num_states(SILENCE_ID, STATES))]
    rows += list(
        itertools.product(range(NUM_BASES + 1), range(2, NUM_BASES + 1), range(NUM_BASES + 1), range(STATES))
    )
    moments = []
    for left, centre, right, state in rows:
        mean = np.array([centre, state, 0.0])
        mean[2] += 5 * ((centre == 2 and right == 3) or (centre == 3 and left == 4))
        frames = mean + 0.1 * rng.standard_normal((40, D))
        moments.append(np.concatenate([[40.0], frames.sum(axis=0), (frames**2).sum(axis=0)]))
    return np.array(rows), np.array(moments)


def test_variants_of_a_phone_have_one_base() -> None:
    assert BASES.tolist() == [1, 2, 2, 3, 3, 4]


def test_a_known_tying_is_found() -> None:
    tied, sums = tie(*make_events(), NUM_BASES, STATES, leaves=100, variance_floor=FLOOR)
    unsplit = len(list_states(NUM_BASES, STATES))
    assert tied.num_pdfs == len(sums) == unsplit + 4  # A and B, each of their two states
    tree = tied.to_kaldi(BASES)

    def pdf(left: int, centre: int, right: int, state: int) -> int | None:
        return find_answer(tree.tree, {0: left, 1: centre, 2: right, -1: state})

    for state, right in itertools.product(range(STATES), range(7)):
        moments = sums[pdf(0, 2, right, state)]
        assert moments[3] / moments[0] == pytest.approx(5.0 if right in (4, 5) else 0.0, abs=0.1)
    for state, left, right in itertools.product(range(STATES), range(7), range(7)):
        same = (right in (4, 5)) == (5 in (4, 5))  # B is phones 4 and 5
        assert (pdf(left, 2, right, state) == pdf(0, 2, 5, state)) == same
        assert (pdf(left, 4, right, state) == pdf(6, 4, 0, state)) == (left == 6)
        assert pdf(left, 6, right, state) == pdf(0, 6, 0, state)
        assert pdf(left, 2, right, state) == pdf(left, 3, right, state)  # variants share all


def test_every_state_in_every_context_has_a_pdf_and_all_pdfs_are_used() -> None:
    for tied in (
        TiedStates.monophone(NUM_BASES, STATES),
        tie(*make_events(), NUM_BASES, STATES, 100, FLOOR)[0],
    ):
        tree = tied.to_kaldi(BASES)
        found = set()
        for left, centre, right in itertools.product(range(7), range(1, 7), range(7)):
            phones = [centre] if tree.width == 1 else [left, centre, right]
            for state in range(num_states(int(BASES[centre - 1]), STATES)):
                found.add(find_answer(tree.tree, {**dict(enumerate(phones)), -1: state}))
        assert found == set(range(tied.num_pdfs))


def test_no_leaves_to_spare_leave_the_states_as_they_are() -> None:
    tied, sums = tie(*make_events(), NUM_BASES, STATES, leaves=1, variance_floor=FLOOR)
    assert (tied, len(sums)) == (TiedStates.monophone(NUM_BASES, STATES), 10)


def test_moments_of_the_pdfs_add_up_to_those_of_the_events() -> None:
    events, moments = make_events()
    _, sums = tie(events, moments, NUM_BASES, STATES, 100, FLOOR)
    np.testing.assert_allclose(sums.sum(axis=0), moments.sum(axis=0))


def test_a_phone_that_was_never_heard_has_pdfs_of_its_own_all_the_same() -> None:
    events, moments = make_events()
    heard = (events[:, :3] != 4).all(axis=1)
    tied, sums = tie(events[heard], moments[heard], NUM_BASES, STATES, 100, FLOOR)
    pdfs = [~place for place in tied.roots[3]]
    assert (sums[pdfs] == 0).all()


def test_events_of_frames_are_known() -> None:
    events = frame_events(np.array([1, 2, 3]), np.array([0, 2, 3]), np.array([0, 1, 0, 0, 1]))
    assert events.tolist() == [[0, 1, 0, 0], [0, 1, 0, 1], [1, 2, 3, 0], [2, 3, 0, 0], [2, 3, 0, 1]]


def test_equal_events_are_added_up() -> None:
    events, moments = sum_events(np.array([[2, 1], [1, 1], [2, 1]]), np.array([[1.0], [2.0], [4.0]]))
    assert (events.tolist(), moments.tolist()) == ([[1, 1], [2, 1]], [[2.0], [5.0]])


@pytest.mark.parametrize("leaves", [0, 100])
def test_a_file_holds_all_of_it(leaves: int, tmp_path: Path) -> None:
    tied, _ = tie(*make_events(), NUM_BASES, STATES, leaves, FLOOR)
    tied.save(tmp_path / "tied.json")
    assert TiedStates.load(tmp_path / "tied.json") == tied
