"""A frame belongs to the phone that is spoken at its centre, 15 ms, 45 ms, 75 ms, … into the utterance."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem

from teacherstudent.align import _frame_phones, frame_labels

SIL, A, B = 1, 2, 3
PHONE_IDS = {"SIL": SIL, "A": A, "B": B}

Segment = tuple[int, int, int]  # start and end in milliseconds, phone


def label(segments: Sequence[Segment], num_frames: int) -> tuple[list[int], str]:
    """Phones, and the frames that open one as a string of 1 and 0."""
    starts, ends, phones = zip(*segments)
    phone, first = frame_labels(
        [start / 1000 for start in starts], [end / 1000 for end in ends], phones, num_frames
    )
    assert (phone.dtype, first.dtype) == (np.int16, np.bool_)
    return phone.tolist(), "".join("01"[opens] for opens in first.tolist())


@pytest.mark.parametrize(
    "why, segments, phones, first",
    [
        ("two phones", [(0, 60, A), (60, 120, B)], [A, A, B, B], "1010"),
        ("the centre decides", [(0, 44, A), (44, 120, B)], [A, B, B, B], "1100"),
        ("a phone starts at a centre", [(0, 45, A), (45, 120, B)], [A, B, B, B], "1100"),
        ("silence before and after", [(30, 60, A)], [SIL, A, SIL, SIL], "1110"),
        ("a gap is silence", [(0, 30, A), (60, 90, B)], [A, SIL, B], "111"),
        ("a gap between two of one phone", [(0, 30, A), (60, 90, A)], [A, SIL, A], "111"),
        ("a gap without a centre", [(0, 20, A), (40, 90, B)], [A, B, B], "110"),
        ("two of one phone in a row", [(0, 60, A), (60, 120, A)], [A, A, A, A], "1010"),
        ("a gap beside silence", [(0, 30, SIL), (60, 90, A)], [SIL, SIL, A], "101"),
        ("silence beside silence", [(0, 30, SIL), (30, 60, SIL), (60, 90, A)], [SIL, SIL, A], "101"),
        ("silence at both ends of a gap", [(0, 30, SIL), (60, 90, SIL)], [SIL, SIL, SIL], "100"),
        ("a phone too short for a centre", [(0, 20, A), (20, 40, B), (40, 90, A)], [A, A, A], "110"),
        ("two such at once", [(0, 16, A), (16, 20, B), (20, 30, A), (30, 60, B)], [A, B], "11"),
        ("silence around such a one", [(0, 20, SIL), (20, 40, B), (40, 60, SIL)], [SIL, SIL], "10"),
        ("a phone of no duration", [(0, 45, A), (45, 45, B), (45, 90, A)], [A, A, A], "110"),
        ("an alignment longer than the audio", [(0, 60, A), (60, 990, B)], [A, A, B], "101"),
        ("an alignment that starts after the audio", [(500, 600, A)], [SIL, SIL], "10"),
        ("no frame", [(0, 60, A)], [], ""),
    ],
)
def test_labels_are_as_known(why: str, segments: list[Segment], phones: list[int], first: str) -> None:
    assert label(segments, len(phones)) == (phones, first), why


@st.composite
def alignments(draw: st.DrawFn) -> tuple[list[Segment], int]:
    """Segments and gaps of whole milliseconds, often on the grid of the frames' centres."""
    lengths = st.integers(0, 90) | st.sampled_from([0, 15, 30, 45, 60])
    segments, now = [], 0
    for gap, duration, phone in draw(
        st.lists(
            st.tuples(lengths | st.just(0), lengths, st.sampled_from([SIL, A, B])), min_size=1, max_size=12
        )
    ):
        segments.append((now + gap, now + gap + duration, phone))
        now += gap + duration
    return segments, draw(st.integers(0, now // 30 + 3))


def label_slowly(segments: Sequence[Segment], num_frames: int) -> tuple[list[int], str]:
    """In whole milliseconds, frame by frame."""
    phones, first, before = [], "", None
    for centre in range(15, 30 * num_frames, 30):
        spoken = [index for index, (start, end, _) in enumerate(segments) if start <= centre < end]
        assert len(spoken) <= 1
        phone = segments[spoken[0]][2] if spoken else SIL
        now = ("silence", 0) if phone == SIL else ("phone", spoken[0])
        phones.append(phone)
        first += "01"[now != before]
        before = now
    return phones, first


@settings(max_examples=300, deadline=None)
@given(alignments())
def test_a_frame_opens_a_phone_exactly_where_another_segment_is_spoken_than_before(
    drawn: tuple[list[Segment], int],
) -> None:
    segments, num_frames = drawn
    assert label(segments, num_frames) == label_slowly(segments, num_frames)


def cut(*supervisions: list[tuple[str, float, float]] | None) -> MonoCut:
    return MonoCut(
        id="cut-7",
        start=0,
        duration=0.18,
        channel=0,
        supervisions=[
            SupervisionSegment(
                f"s{index}",
                "recording",
                start=0,
                duration=0.18,
                alignment=None if items is None else {"phone": [AlignmentItem(*item) for item in items]},
            )
            for index, items in enumerate(supervisions)
        ],
    )


def test_a_cut_is_labelled_by_its_phone_alignment() -> None:
    phone, first = _frame_phones(cut([("A", 0.03, 0.06), ("B", 0.09, 0.03)]), 5, PHONE_IDS)
    assert phone.tolist() == [SIL, A, A, B, SIL]
    assert first.tolist() == [True, True, False, True, True]


def test_the_order_of_items_and_supervisions_does_not_matter() -> None:
    in_order = _frame_phones(cut([("A", 0.0, 0.06), ("B", 0.06, 0.06), ("A", 0.12, 0.06)]), 6, PHONE_IDS)
    shuffled = _frame_phones(cut([("A", 0.12, 0.06)], [("B", 0.06, 0.06), ("A", 0.0, 0.06)]), 6, PHONE_IDS)
    for one, other in zip(in_order, shuffled):
        assert (one == other).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300).map(lambda n: 15 * n), min_size=2, max_size=40, unique=True))
def test_phones_that_follow_each_other_leave_no_gap_however_their_times_are_rounded(times: list[int]) -> None:
    times = sorted(times)
    items = [("A", now / 1000, then / 1000 - now / 1000) for now, then in itertools.pairwise(times)]
    phone, _ = _frame_phones(cut(items), times[-1] // 30 + 2, PHONE_IDS)
    centres = np.arange(len(phone)) * 30 + 15
    assert ((phone == A) == ((centres >= times[0]) & (centres < times[-1]))).all()


@pytest.mark.parametrize("supervisions", [(), (None,), ([],)])
def test_a_cut_without_phone_alignment_is_refused_by_name(supervisions: tuple) -> None:
    with pytest.raises(ValueError, match="cut-7 has no phone alignment"):
        _frame_phones(cut(*supervisions), 5, PHONE_IDS)


def test_a_phone_that_the_lexicon_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"cut-7: phones \['X', 'Y'\]"):
        _frame_phones(cut([("A", 0.0, 0.1), ("Y", 0.1, 0.1), ("X", 0.2, 0.1)]), 5, PHONE_IDS)
