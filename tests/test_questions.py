import numpy as np
import pytest

from teacherstudent.tying.questions import (
    find_questions,
    named_classes,
    place_in_word,
    read_questions,
    stress,
    variants,
)

PHONES = ("SIL", "AE0_B", "AE1_B", "AE1_E", "K_B", "K_E", "T_S", "M_I", "N_I")


def cells_of(means, counts):
    """One-dimensional Gaussians of variance 1: (P + 1, states, M)."""
    count, mean = np.array([0, *counts], float), np.array([0, *means], float)
    return np.stack([count, count * mean, count * (mean**2 + 1)], axis=-1)[:, None].repeat(2, axis=1)


MEANS, COUNTS = [-90, 1, 2, 3, 50, 51, 54, 120, 121], [9, 5, 5, 0, 5, 5, 5, 5, 5]


def questions(groups):
    return find_questions(cells_of(MEANS, COUNTS), PHONES, groups, np.full(1, 1e-9))


def test_stress_and_place_are_read_from_a_phones_name():
    assert [stress(name) for name in ("AE1_B", "AE0", "K_B", "K", "AE2_S")] == ["1", "0", "", "", "2"]
    assert [place_in_word(name) for name in ("AE1_B", "AE0", "K_S", "K")] == ["B", "", "S", ""]
    assert variants(PHONES) == {"AE": (2, 3, 4), "K": (5, 6), "T": (7,), "M": (8,), "N": (9,)}


def test_classes_are_named_in_words_and_empty_ones_are_left_out():
    assert named_classes(PHONES) == {
        "stress is none": (2,),
        "stress is primary": (3, 4),
        "first phone of its word": (2, 3, 5, 7),
        "last phone of its word": (4, 6, 7),
        "inside its word": (8, 9),
        "alone in its word": (7,),
    }
    assert named_classes(("SIL", "AE", "K")) == {}
    assert named_classes(("SIL", "t", "t_S")) == {}
    assert variants(("SIL", "t", "t_S")) == {"t": (2,), "t_S": (3,)}


def test_questions_are_classes_then_clusters_of_base_phones_then_base_phones_then_single_ones():
    found = questions(variants(PHONES).values())
    assert found[:3] == [(0,), (0, 1), (1,)]
    assert found[3:9] == list(named_classes(PHONES).values())
    # nearest first: M N, then K T; each cluster has all variants of its base phones
    assert found[9:] == [(5, 6, 7), (2, 3, 4, 5, 6, 7), (2, 3, 4), (5, 6), (8,), (9,), (3,), (5,), (6,)]
    assert (8, 9) in found  # all that is inside a word is the cluster M N: asked once
    assert (4,) not in found  # a phone without frames
    assert len(set(found)) == len(found)


def test_without_base_phones_single_phones_are_clustered():
    found = questions([(phone,) for phone in range(2, 10)])
    assert (2, 3) in found
    assert (5, 6) in found
    assert (2, 3, 4) not in found


def read(tmp_path, text):
    path = tmp_path / "sets.txt"
    path.write_text(text)
    return read_questions(path, PHONES)


def test_a_file_has_a_set_a_line_and_a_base_phones_name_means_all_its_variants(tmp_path):
    found = read(tmp_path, "AE\nK_B T_S\n\n  N_I M_I K\nK_B T_S\n")
    assert found == [(0,), (0, 1), (1,), (2, 3, 4), (5, 7), (5, 6, 8, 9)]


def test_a_phone_in_no_set_of_the_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"sets.txt: 2 phones are in no set of the file: K_E, T_S"):
        read(tmp_path, "AE\nK_B\nM_I N_I\n")


def test_a_name_in_the_file_that_is_no_phone_is_refused_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"sets.txt, line 2: 'XX' is no phone of the lexicon"):
        read(tmp_path, "AE K T\nM_I XX N_I\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"senones.questions = .*none.txt.* cannot be read"):
        read_questions(tmp_path / "none.txt", PHONES)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read_questions(tmp_path / "bytes.txt", PHONES)
