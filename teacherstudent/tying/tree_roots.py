"""The roots of the tree: which phones' states grow from one root, and so may share senones."""
# P phones, M moments of a cell

import warnings
from collections.abc import Mapping

import numpy as np

from teacherstudent.tying.decision_tree import Question, merge_costs
from teacherstudent.tying.events import NUM_STATES, SILENCE_ID, Floats

Root = list[tuple[int, int]]  # (phone, state) pairs, ascending


def share_roots(
    cells: Floats, groups: Mapping[str, Question], variance_floor: Floats, min_count: float
) -> list[Root]:
    """A root for each group of phones and state, silence's apart; too rare ones share the root of others.

    cells: (P + 1, states, M); groups: phone ids by a name to tell of. A state that has not seen min_count frames shares
    with its group's other state first, then with the group that is nearest by likelihood: a warning names it. Raises
    ValueError where all speech together has fewer frames.
    """
    spoken = cells[SILENCE_ID + 1 :, :, 0].sum()
    if groups and spoken < min_count:
        raise ValueError(
            f"only {int(spoken)} frames of speech are aligned, fewer than senones.min_count = {min_count}: align more "
            "speech"
        )
    silence = _roots_of((SILENCE_ID,), cells, min_count)
    roots = {name: _roots_of(phones, cells, min_count) for name, phones in groups.items()}
    names = [[name] for name, several in roots.items() for _ in several]
    speech = [root for several in roots.values() for root in several]
    return silence + sorted(_join_rare(speech, names, cells, variance_floor, min_count))


def _roots_of(phones: Question, cells: Floats, min_count: float) -> list[Root]:
    """One for each state, or one for all where a state is too rare."""
    roots = [[(phone, state) for phone in phones] for state in range(NUM_STATES)]
    if cells[list(phones), :, 0].sum(axis=0).min() < min_count:
        return [sorted(pair for root in roots for pair in root)]
    return roots


def _join_rare(
    roots: list[Root], names: list[list[str]], cells: Floats, variance_floor: Floats, min_count: float
) -> list[Root]:
    """Join the rarest with its nearest, in place, until none is too rare. names: of the groups in each root."""
    sums = [np.sum([cells[pair] for pair in root], axis=0) for root in roots]
    shared: dict[str, str] = {}
    while len(roots) > 1:
        small = min(range(len(roots)), key=lambda index: sums[index][0])
        if sums[small][0] >= min_count:
            break
        others = [index for index in range(len(roots)) if index != small]
        costs = merge_costs(sums[small], np.stack([sums[index] for index in others]), variance_floor)
        near = min(zip(costs, others), key=lambda pair: (pair[0], -sums[pair[1]][0]))[1]
        shared |= dict.fromkeys(names[small], names[near][0])
        roots[near], names[near] = sorted(roots[near] + roots[small]), names[near] + names[small]
        sums[near] = sums[near] + sums[small]
        del roots[small], sums[small], names[small]
    if shared:
        pairs = ", ".join(f"{rare} with {near}" for rare, near in sorted(shared.items()))
        warnings.warn(
            f"phones with fewer than senones.min_count = {min_count} frames share senones: {pairs}",
            stacklevel=4,
        )
    return roots
