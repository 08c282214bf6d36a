import re

import numpy as np
import pytest

from teacherstudent.tying.senones import Inventory
from teacherstudent.tying.tree_view import describe, show

PHONES = ("SIL", "AE0_B", "AE1_B", "K_B", "K_E", "M_B", "N_B", "T_I")
QUESTIONS = ((6, 7), (3,), (0, 1), (2, 3, 4, 6, 7), (0,), (4, 5), (1,), (4, 6))
NODES = (
    (1, 1, 1, 2),  # AE, first frame: stress is primary?
    (0, 0, ~2, 6),  # left neighbour M or N?
    (2, 2, ~2, ~4),  # right neighbour silence or edge?
    (0, 3, 4, ~6),  # K: left neighbour first of its word?
    (2, 5, 5, ~7),  # right neighbour K?
    (3, 4, ~8, ~9),  # first frame?
    (0, 7, ~3, ~11),  # AE after neither M nor N: after one of K_B and M?
)
ROOTS = ((~0, ~1), (0, ~5), (0, ~5), (3, 3), (3, 3), (~10, ~10), (~10, ~10), (~10, ~10))


@pytest.fixture(scope="module")
def inventory():
    return Inventory(PHONES, QUESTIONS, NODES, ROOTS, 12, np.arange(1, 13) / 78)


def test_a_base_phones_tree_is_drawn_with_its_questions_in_words(inventory):
    assert show(inventory, "AE") == (
        "AE0_B AE1_B, first frame\n"
        "stress is primary?\n"
        "├─ yes: left neighbour is one of: M N (nasals)?\n"
        "│  ├─ yes: senone 2, prior 3.85 %\n"
        "│  └─ no: left neighbour is K_B?\n"  # or M, which it cannot be any more
        "│     ├─ yes: senone 3, prior 5.13 %\n"
        "│     └─ no: senone 11, prior 15.4 %\n"
        "└─ no: right neighbour is silence or the utterance's edge?\n"
        "   ├─ yes: senone 2, prior 3.85 %\n"
        "   └─ no: senone 4, prior 6.41 %\n"
        "\n"
        "AE0_B AE1_B, later frames\n"
        "senone 5, prior 7.69 %\n"
    )


def test_what_is_known_of_one_variant_is_not_asked(inventory):
    assert show(inventory, "AE0_B") == (
        "AE0_B, first frame\n"
        "right neighbour is silence or the utterance's edge?\n"
        "├─ yes: senone 2, prior 3.85 %\n"
        "└─ no: senone 4, prior 6.41 %\n"
        "\n"
        "AE0_B, later frames\n"
        "senone 5, prior 7.69 %\n"
    )


def test_states_that_share_a_root_are_drawn_together(inventory):
    drawn = show(inventory, "K_B")
    assert drawn.startswith(
        "K_B, first frame and later frames\nleft neighbour is the first phone of its word?\n"
    )
    assert "right neighbour is K?" in drawn
    assert "first frame of its phone?" in drawn
    assert drawn.count("\n\n") == 0


def test_the_senones_that_are_drawn_are_those_that_the_phone_can_have(inventory):
    contexts = np.arange(len(PHONES) + 1)
    grid = np.stack(np.meshgrid(contexts, contexts, [0, 1], indexing="ij"), axis=-1).reshape(-1, 3)
    for phone, name in enumerate(PHONES, 1):
        events = np.stack([grid[:, 0], np.full(len(grid), phone), grid[:, 1], grid[:, 2]], axis=1)
        drawn = {int(number) for number in re.findall(r"senone (\d+)", show(inventory, name))}
        assert drawn == set(inventory.senones(events).tolist())


def test_an_unknown_phone_is_an_error_that_names_the_nearest(inventory):
    with pytest.raises(
        ValueError, match=r"no phone 'ae1_b': the nearest is 'AE1_B'. Its phones are SIL AE K M N T"
    ):
        show(inventory, "ae1_b")
    with pytest.raises(ValueError, match="nearest is 'K'"):
        show(inventory, "k")


EVERYTHING = list(range(len(PHONES) + 1))


@pytest.mark.parametrize(
    ("position", "members", "among", "words"),
    [
        (0, [0], EVERYTHING, "left neighbour is the utterance's edge"),
        (2, [1], EVERYTHING, "right neighbour is silence"),
        (2, [3], EVERYTHING, "right neighbour's stress is primary"),
        (0, [5], EVERYTHING, "left neighbour is the last phone of its word"),
        (0, [4, 5], EVERYTHING, "left neighbour is K"),
        (0, [4, 7], EVERYTHING, "left neighbour is one of: K_B N"),
        (0, [0, 8], EVERYTHING, "left neighbour is one of: the utterance's edge T (stops)"),
        (0, [4, 5, 8], EVERYTHING, "left neighbour is one of: K T (stops)"),
        (1, [3], [2, 3], "stress is primary"),
        (1, [4], [4, 5], "first phone of its word"),
        (1, [2, 3], [2, 3, 6, 7], "phone is AE"),
        (3, [0], [0, 1], "first frame of its phone"),
        (3, [1], [0, 1], "later frame of its phone"),
    ],
)  # fmt: skip
def test_a_question_is_said_in_words(position, members, among, words):
    assert describe(PHONES, position, members, among) == words
