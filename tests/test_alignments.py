"""A frame belongs to the phone that is spoken at its centre, 15 ms, 45 ms, 75 ms, … into the utterance."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem
from tiny_alignments import make_cut

from teacherstudent.alignment.align_sources import cut_segments
from teacherstudent.alignment.alignment_index import AlignmentIndex, write_index
from teacherstudent.alignment.alignments import (
    AlignmentError,
    PhoneNames,
    PhoneSegments,
    Shifts,
    boundary_shifts,
    frame_labels,
    frame_values,
    grid_shifts,
)

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


def label_cut(cut: MonoCut, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    segments = cut_segments(cut)
    ids = [PHONE_IDS[phone] for phone in segments.phones]
    return frame_labels(segments.starts, segments.ends, ids, num_frames)


def cut(*supervisions: list[tuple[str, float, float]] | None, duration: float = 0.18) -> MonoCut:
    return MonoCut(
        id="cut-7",
        start=0,
        duration=duration,
        channel=0,
        supervisions=[
            SupervisionSegment(
                f"s{index}",
                "recording",
                start=0,
                duration=duration,
                alignment=None if items is None else {"phone": [AlignmentItem(*item) for item in items]},
            )
            for index, items in enumerate(supervisions)
        ],
    )


def test_a_cut_is_labelled_by_its_phone_alignment() -> None:
    phone, first = label_cut(cut([("A", 0.03, 0.06), ("B", 0.09, 0.03)]), 5)
    assert phone.tolist() == [SIL, A, A, B, SIL]
    assert first.tolist() == [True, True, False, True, True]


def test_the_order_of_items_and_supervisions_does_not_matter() -> None:
    in_order = label_cut(cut([("A", 0.0, 0.06), ("B", 0.06, 0.06), ("A", 0.12, 0.06)]), 6)
    shuffled = label_cut(cut([("A", 0.12, 0.06)], [("B", 0.06, 0.06), ("A", 0.0, 0.06)]), 6)
    for one, other in zip(in_order, shuffled):
        assert (one == other).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300).map(lambda n: 15 * n), min_size=2, max_size=40, unique=True))
def test_phones_that_follow_each_other_leave_no_gap_however_their_times_are_rounded(times: list[int]) -> None:
    times = sorted(times)
    items = [("A", now / 1000, then / 1000 - now / 1000) for now, then in itertools.pairwise(times)]
    phone, _ = label_cut(cut(items, duration=times[-1] / 1000 + 0.1), times[-1] // 30 + 2)
    centres = np.arange(len(phone)) * 30 + 15
    assert ((phone == A) == ((centres >= times[0]) & (centres < times[-1]))).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10), st.integers(0, 9), st.integers(1, 300), st.data())
def test_a_truncated_cut_has_the_frames_of_what_is_left_of_its_phones(
    num_frames: int, skipped: int, kept_ms: int, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=num_frames, max_size=num_frames))
    edges = [0, *itertools.accumulate(lengths)]
    start, end = min(30 * skipped, edges[-1] - 1), min(30 * skipped + kept_ms, edges[-1])
    if end <= start:
        return
    symbols = data.draw(st.lists(st.sampled_from("AB"), min_size=num_frames, max_size=num_frames))
    items = [
        (symbol, begin / 1000, stop / 1000)
        for symbol, (begin, stop) in zip(symbols, itertools.pairwise(edges))
    ]
    whole = make_cut("whole", 16 * edges[-1], items)
    part = whole.truncate(offset=start / 1000, duration=(end - start) / 1000, preserve_id=True)
    total = (end - start) // 30 + 1
    phone, _ = label_cut(part, total)
    said = [
        next(
            (
                PHONE_IDS[symbol]
                for symbol, (begin, stop) in zip(symbols, itertools.pairwise(edges))
                if begin <= at < stop
            ),
            SIL,
        )
        if at < end
        else SIL
        for at in range(start + 15, start + 15 + 30 * total, 30)
    ]
    assert phone.tolist() == said


@pytest.mark.parametrize("supervisions", [(), (None,), ([],)])
def test_a_cut_without_phone_alignment_has_none(supervisions: tuple) -> None:
    with pytest.raises(AlignmentError, match="no phone alignment in the cut"):
        cut_segments(cut(*supervisions))


def test_segments_that_overlap_by_rounding_alone_are_taken() -> None:
    PhoneSegments.of([(0.0, 0.11, "A"), (0.1, 0.2, "B")])
    with pytest.raises(AlignmentError, match=r"A ends at 0\.13 s, B starts at 0\.1 s"):
        PhoneSegments.of([(0.0, 0.13, "A"), (0.1, 0.2, "B")])
    with pytest.raises(AlignmentError, match="overlap"):  # the third with the first, over a short second
        PhoneSegments.of([(0.0, 0.3, "A"), (0.1, 0.105, "B"), (0.2, 0.4, "A")])
    with pytest.raises(AlignmentError, match="not finite"):
        PhoneSegments.of([(0.0, float("nan"), "A")])


def test_segments_move_stretch_and_are_cut_off() -> None:
    segments = PhoneSegments.of(
        [(0.0, 0.2, "A"), (0.2, 0.5, "B"), (0.5, 0.9, "A")], [(0.0, 0.5, "x"), (0.5, 0.8, "y")]
    )
    inner = segments.within(0.3, 0.4)
    assert (inner.starts.tolist(), inner.ends.tolist(), inner.phones) == ([0.0, 0.2], [0.2, 0.4], ("B", "A"))
    x, y = (0.0, pytest.approx(0.2), ""), (pytest.approx(0.2), 0.4, "y")  # x is mostly cut off
    assert inner.words == (x, y)
    assert segments.within(-0.1, 2.0).starts.tolist() == [0.1, 0.3, 0.6]
    assert segments.at_speed(1.25).ends.tolist() == [0.16, 0.4, 0.72]
    later = segments.later(0.0075, 0.92)
    assert later.starts.tolist() == [0.0, 0.2075, 0.5075]
    assert later.ends.tolist() == [0.2075, 0.5075, 0.92]
    halves = PhoneSegments.join([segments.within(-1.0, 2.0), segments])
    assert halves.phones == ("A", "B", "A") * 2


def rename(phones: str, known: str, words=None, word_positions: bool = True) -> str:
    symbols = phones.split(",")
    segments = PhoneSegments.of([(0.1 * n, 0.1 * n + 0.1, symbol) for n, symbol in enumerate(symbols)], words)
    return ",".join(PhoneNames(frozenset(known.split()), word_positions).rename(segments).phones)


@pytest.mark.parametrize("silence", ["sil", "SIL", "sp", "", "<eps>", "SIL_B", "SIL_S"])
def test_a_source_s_silence_is_silence(silence: str) -> None:
    assert rename(f"{silence},A,{silence}", "A B", word_positions=False) == "SIL,A,SIL"


def test_spoken_noise_is_a_phone_where_the_lexicon_has_it() -> None:
    assert rename("spn,A", "A spn", word_positions=False) == "spn,A"
    with pytest.raises(AlignmentError, match="not in the lexicon: spn"):
        rename("spn,A", "A", word_positions=False)


def test_marked_phones_are_left_and_unmarked_ones_marked_by_their_words() -> None:
    known = "A_B A_I A_E A_S B_B B_I B_E B_S"
    assert rename("A_B,B_E", known) == "A_B,B_E"
    assert rename("A,B,A,sil,B", known, [(0.0, 0.3, "x"), (0.4, 0.5, "y")]) == "A_B,B_I,A_E,SIL,B_S"
    assert rename("A,B", known, [(0.0, 0.1, "x"), (0.1, 0.2, "x")]) == "A_S,B_S"
    with pytest.raises(AlignmentError, match=r"phones in no word: B at 0\.1 s"):
        rename("A,B", known, [(0.0, 0.1, "x")])
    with pytest.raises(AlignmentError, match="without their place in the word"):
        rename("A,B", known)
    with pytest.raises(AlignmentError, match="not in the lexicon: A_B"):  # the lexicon is unmarked
        rename("A_B,B_E", "A B", word_positions=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-500, 500), max_size=30), st.lists(st.integers(-500, 500), max_size=30))
def test_medians_of_merged_shifts_are_those_of_all_of_them(one: list[int], other: list[int]) -> None:
    shifts, more = Shifts(), Shifts()
    shifts.add(np.array(one) / 10_000)
    more.add(np.array(other) / 10_000)
    shifts.merge(Shifts.from_dict(more.as_dict()))
    values = np.array(one + other) / 10
    found = shifts.summary()
    assert (found["utterances"], found["boundaries"]) == (2, len(values))
    if len(values):
        assert found["median_ms"] == pytest.approx(np.median(values), abs=0.006)
        assert found["median_absolute_ms"] == pytest.approx(np.median(abs(values)), abs=0.006)
    else:
        assert found["median_ms"] is None


def test_shifts_say_how_much_later() -> None:
    segments = PhoneSegments.of([(0.0, 0.1, "SIL"), (0.1, 0.2, "A"), (0.2, 0.3, "B")])
    phone, first = frame_labels(segments.starts, segments.ends, [SIL, A, B], 10)
    assert grid_shifts(segments, phone, first).tolist() == pytest.approx([-0.01, 0.01])
    early = PhoneSegments.of([(0.08, 0.19, "A"), (0.19, 0.3, "B")])
    shifts = boundary_shifts(segments, early)
    assert shifts is not None
    assert shifts.tolist() == pytest.approx([0.02, 0.01])
    assert boundary_shifts(segments, PhoneSegments.of([(0.0, 0.3, "A")])) is None


def test_values_hold_until_the_next() -> None:
    starts, ends, values = (
        np.array([0.0, 0.045, 0.09]),
        np.array([0.045, 0.09, 0.15]),
        np.array([7, 8, 9], np.int32),
    )
    assert frame_values(starts, ends, values, 5).tolist() == [7, 8, 8, 9, 9]
    assert frame_values(starts + 0.05, ends + 0.04, values, 7).tolist() == [
        7,
        7,
        7,
        8,
        8,
        9,
        9,
    ]  # rounded, no more


@pytest.mark.parametrize(
    "starts, ends", [([0.0, 0.2], [0.1, 0.3]), ([0.1, 0.2], [0.2, 0.3]), ([0.0], [0.2]), ([], [])]
)
def test_a_gap_between_values_is_refused(starts: list[float], ends: list[float]) -> None:
    with pytest.raises(AlignmentError, match="a gap in an alignment of pdfs: from"):
        frame_values(np.array(starts), np.array(ends), np.arange(len(starts), dtype=np.int32), 10)


def test_an_index_finds_joins_and_refuses_what_occurs_twice(tmp_path) -> None:
    records = [("b", "1\n"), ("a", "2\n"), ("b", "3\n")]
    write_index(tmp_path / "joi%ned?#1", records, join=True)
    joined = AlignmentIndex(tmp_path / "joi%ned?#1")
    assert (joined["b"], joined["a"], joined["c"], len(joined)) == ("1\n3\n", "2\n", None, 2)
    assert joined.first_ids(1) == ["a"]
    write_index(tmp_path / "single", [(key, value.encode()) for key, value in records])
    single = AlignmentIndex(tmp_path / "single")
    assert single["a"] == b"2\n"
    with pytest.raises(AlignmentError, match="more than one"):
        single["b"]


def test_an_index_of_records_that_break_off_is_not_there(tmp_path) -> None:
    def broken():
        yield "a", b"1"
        raise ValueError("the file ends")

    with pytest.raises(ValueError, match="the file ends"):
        write_index(tmp_path / "index", broken())
    assert list(tmp_path.iterdir()) == []


def test_a_short_last_phone_that_is_stretched_to_the_end_stays_in_its_word() -> None:
    segments = PhoneSegments.of([(0.0, 0.1, "AH"), (0.1, 0.13, "T")], [(0.0, 0.13, "at")])
    names = PhoneNames(frozenset(["AH_B", "T_E"]), True)
    assert names.rename(segments.later(0.0, 0.18)).phones == names.rename(segments).phones == ("AH_B", "T_E")
