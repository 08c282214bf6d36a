"""Alignments are compared phone by phone, without what is convention."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.alignment.alignment_comparison import compare, match, phone_class
from teacherstudent.alignment.alignments import PhoneSegments


def segments(text: str, starts: list[float]) -> PhoneSegments:
    return PhoneSegments(np.array(starts), np.array([*starts[1:], starts[-1] + 0.1]), tuple(text.split()))


def test_a_constant_shift_of_a_class_of_phones_is_removed_and_reported() -> None:
    theirs = segments("SIL T AE T IH SIL", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    ours = segments("SIL T AE T IH SIL", [0.0, 0.13, 0.19, 0.33, 0.39, 0.5])
    found = compare([(ours, theirs)])
    assert (found.boundaries, found.coverage) == (5, 1.0)
    assert found.median == pytest.approx(0.0, abs=1e-12)
    assert found.shifts == pytest.approx({"stop": 0.03, "vowel": -0.01, "silence": 0.0})


def test_shares_and_median_are_as_counted_by_hand() -> None:
    theirs = segments("SIL AE IH UW EH AA", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    ours = segments("SIL AE IH UW EH AA", [0.0, 0.1, 0.2, 0.3, 0.43, 0.57])  # apart by 0 0 0 30 70 ms
    found = compare([(ours, theirs)])
    assert (found.median, found.within_20_ms, found.within_50_ms) == (0.0, 0.6, 0.8)


def test_where_phones_differ_only_equal_ones_are_compared() -> None:
    theirs = segments("SIL DH AX K AE T", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    ours = segments("SIL DH IY SIL K AE T", [0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5])
    found = compare([(ours, theirs)])
    assert (found.boundaries, found.coverage, found.within_20_ms) == (4, 0.8, 1.0)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 1 boundaries"):
        compare([(segments("SIL A", [0.0, 0.1]), segments("B C", [0.0, 0.1]))])


def test_marks_of_stress_and_place_do_not_change_a_phones_class() -> None:
    assert [phone_class(phone) for phone in ("AE1_B", "T_E", "NG", "SIL", "CH_S", "EL")] == [
        "vowel", "stop", "nasal", "silence", "fricative", "liquid",
    ]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from("ABC"), max_size=8), st.lists(st.sampled_from("ABC"), max_size=8))
def test_matched_phones_are_equal_ascend_and_are_as_many_as_can_be(
    ours: list[str], theirs: list[str]
) -> None:
    pairs = match(tuple(ours), tuple(theirs))
    assert all(ours[here] == theirs[there] for here, there in pairs)
    assert all(one[0] < two[0] and one[1] < two[1] for one, two in pairwise(pairs))
    longest = np.zeros((len(ours) + 1, len(theirs) + 1), int)  # common subsequence
    for here, phone in enumerate(ours, 1):
        for there, other in enumerate(theirs, 1):
            best = max(longest[here - 1, there], longest[here, there - 1])
            longest[here, there] = max(best, longest[here - 1, there - 1] + (phone == other))
    assert len(pairs) == longest[-1, -1]
