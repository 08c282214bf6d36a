"""A decision tree over triphone states, grown by greedy likelihood gain.

One Gaussian with diagonal covariance stands for the frames of each event (a phone's state between its two
neighbours). The leaf whose best question gains most is split first; then leaves are merged whose merge loses less
than a split had to gain. Sources: Young, Odell & Woodland, "Tree-based state tying for high accuracy acoustic
modelling" (1994), equations 1-4; Kaldi's build-tree. The minimum count is ours.
"""
# E events, D feature dimensions, L leaves, Q questions, V = phones + 1 values of a context (0: no phone there)
# M = 1 + 2 D: count, sums and sums of squares of the frames of an event, side by side

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from teacherstudent.tying.events import Floats, Integers

Question = tuple[int, ...]  # phone ids, ascending: is the phone one of these?

POSITIONS = ("left", "centre", "right", "state")  # what a question may be about; columns of the events


def log_likelihood(moments: Floats, variance_floor: Floats) -> Floats:
    """Of all frames under the best Gaussian whose variances are not below the floor.

    moments: (…, M); variance_floor: (D,). Returns (…): 0 where there are no frames. Never decreases when a set
    of frames is split in two, because each part may keep the Gaussian of the whole.
    """
    dimensions = len(variance_floor)
    count = moments[..., 0]
    divisor = np.maximum(count, 1e-300)[..., None]
    mean = moments[..., 1 : 1 + dimensions] / divisor
    variance = np.maximum(moments[..., 1 + dimensions :] / divisor - mean**2, 0.0)
    floored = np.maximum(variance, variance_floor)
    exponent = (np.log(2 * np.pi * floored) + variance / floored).sum(axis=-1)
    return -0.5 * count * exponent


def merge_costs(one: Floats, others: Floats, variance_floor: Floats) -> Floats:
    """How much log-likelihood is lost when `one` (…, M) shares a Gaussian with each of `others` (…, M)."""
    apart = log_likelihood(one, variance_floor) + log_likelihood(others, variance_floor)
    return apart - log_likelihood(one + others, variance_floor)


def cluster(cells: Sequence[Floats], variance_floor: Floats) -> list[tuple[int, ...]]:
    """Clusters of a bottom-up clustering, in the order of merging; the last one, of all, is left out.

    cells: for each phone (states, M). Two clusters' distance is the log-likelihood that sharing Gaussians would lose,
    summed over the states. Returns indices into cells, ascending.
    """
    sums = np.array(cells, dtype=np.float64)
    size = len(sums)
    clusters: list[tuple[int, ...]] = [(index,) for index in range(size)]
    costs = np.full((size, size), np.inf)
    for index in range(size - 1):
        costs[index, index + 1 :] = merge_costs(sums[index], sums[index + 1 :], variance_floor).sum(axis=-1)
    found = []
    for _ in range(size - 2):
        keep, gone = (int(index) for index in np.unravel_index(np.argmin(costs), costs.shape))
        clusters[keep] = tuple(sorted(clusters[keep] + clusters[gone]))
        found.append(clusters[keep])
        sums[keep] += sums[gone]
        costs[gone, :] = costs[:, gone] = np.inf
        clusters[gone] = ()
        others = np.array([index for index in range(size) if index != keep and clusters[index]])
        lost = merge_costs(sums[keep], sums[others], variance_floor).sum(axis=-1)
        costs[np.minimum(others, keep), np.maximum(others, keep)] = lost
    return found


@dataclass(frozen=True)
class _Split:
    gain: float
    position: int
    question: int
    yes: Integers  # rows of the events
    no: Integers


@dataclass
class Tree:
    """Nodes in the order of the splits, so that a child comes after its parent.

    nodes: [position, question, yes, no]; roots and the last two refer to a node (≥ 0) or, as ~leaf, to a leaf.
    gains[i] is the log-likelihood that the split of node i brought.
    """

    roots: list[int]
    nodes: list[list[int]] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    leaf_rows: list[Integers] = field(default_factory=list)  # of the events
    leaf_root: list[int] = field(default_factory=list)  # index in roots


class Splitter:
    """Finds the question that gains most for a set of events.

    events: (E, 4), columns as in POSITIONS; moments: (E, M); questions: phone ids each; variance_floor: (D,).
    Every answer must keep at least min_count frames.
    """

    def __init__(
        self,
        events: Integers,
        moments: Floats,
        questions: Sequence[Question],
        variance_floor: Floats,
        min_count: float,
    ) -> None:
        self.events, self.moments, self.floor, self.min_count = events, moments, variance_floor, min_count
        self.num_values = 1 + max(int(events.max(initial=0)), *(max(question) for question in questions))
        self.questions = [np.array(question) for question in questions]
        self.phones = np.concatenate(self.questions)  # of all questions, end to end, as reduceat takes them
        self.starts = np.cumsum([0, *(len(question) for question in questions[:-1])])

    def best(self, rows: Integers) -> _Split | None:
        """The best split of these events, the first of equals; None when no question leaves enough frames."""
        gains = np.stack([self._gains(rows, position) for position in range(len(POSITIONS))])
        best = gains.max()
        if best == -np.inf:
            return None
        # Questions that part the events alike differ in the last bits only: take the first of those.
        choice = int(np.argmax(gains >= best - 1e-9 * abs(best)))
        position, question = divmod(choice, gains.shape[1])
        says_yes = np.isin(self.events[rows, position], self.questions[question])
        return _Split(float(gains[position, question]), position, question, rows[says_yes], rows[~says_yes])

    def _gains(self, rows: Integers, position: int) -> Floats:
        """Of every question about one position: (Q,), -inf where it cannot be asked."""
        gains = np.full(len(self.questions), -np.inf)
        column = self.events[rows, position]
        order = np.argsort(column, kind="stable")
        values, starts = np.unique(column[order], return_index=True)
        if len(values) < 2:
            return gains
        by_value = np.zeros((self.num_values, self.moments.shape[1]))
        by_value[values] = np.add.reduceat(self.moments[rows[order]], starts, axis=0)
        total = by_value.sum(axis=0)
        yes = np.add.reduceat(by_value[self.phones], self.starts, axis=0)
        no = total - yes
        fewest = np.minimum(yes[:, 0], no[:, 0])
        enough = (fewest >= self.min_count) & (fewest > 0)
        whole = log_likelihood(total, self.floor)
        parts = log_likelihood(yes[enough], self.floor) + log_likelihood(no[enough], self.floor)
        gains[enough] = parts - whole
        return gains


def grow(splitter: Splitter, roots: Sequence[Integers], target: int, min_gain: float) -> Tree:
    """Split the leaf that gains most until there are `target` leaves or no split gains min_gain.

    roots: the rows of each root's events; a root without events stays a leaf.
    """
    tree = Tree(roots=[~index for index in range(len(roots))])
    tree.leaf_rows, tree.leaf_root = list(roots), list(range(len(roots)))
    places: list[tuple[int, int] | None] = [None] * len(
        roots
    )  # of each leaf: its parent node, and which child
    queue: list[tuple[float, int, _Split]] = []

    def consider(leaf: int) -> None:
        split = splitter.best(tree.leaf_rows[leaf]) if len(tree.leaf_rows[leaf]) > 1 else None
        if split is not None and split.gain >= min_gain:
            heapq.heappush(queue, (-split.gain, leaf, split))

    for leaf in range(len(roots)):
        consider(leaf)
    while queue and len(tree.leaf_rows) < target:
        _, leaf, split = heapq.heappop(queue)
        node, new_leaf, place = len(tree.nodes), len(tree.leaf_rows), places[leaf]
        if place is None:
            tree.roots[tree.leaf_root[leaf]] = node
        else:
            tree.nodes[place[0]][place[1]] = node
        tree.nodes.append([split.position, split.question, ~leaf, ~new_leaf])
        tree.gains.append(split.gain)
        tree.leaf_rows[leaf] = split.yes
        tree.leaf_rows.append(split.no)
        tree.leaf_root.append(tree.leaf_root[leaf])
        places[leaf] = (node, 2)
        places.append((node, 3))
        consider(leaf)
        consider(new_leaf)
    return tree


def merge_leaves(tree: Tree, moments: Floats, variance_floor: Floats, threshold: float) -> list[int]:
    """Merge leaves of one root, the cheapest pair first, while a merge loses less than the threshold.

    moments: (E, M). Returns for every leaf the leaf that it became part of.
    """
    joined = list(range(len(tree.leaf_rows)))
    leaves_of: dict[int, list[int]] = {}
    for leaf, root in enumerate(tree.leaf_root):
        leaves_of.setdefault(root, []).append(leaf)
    for leaves in leaves_of.values():
        sums = np.stack([moments[tree.leaf_rows[leaf]].sum(axis=0) for leaf in leaves])
        for keep, gone in _cheap_merges(sums, variance_floor, threshold):
            joined = [leaves[keep] if into == leaves[gone] else into for into in joined]
    return joined


def _cheap_merges(sums: Floats, variance_floor: Floats, threshold: float) -> list[tuple[int, int]]:
    """Of leaves with moments (L, M): the merges (kept, gone), in order."""
    size = len(sums)
    costs = np.full((size, size), np.inf)
    for index in range(size - 1):
        costs[index, index + 1 :] = merge_costs(sums[index], sums[index + 1 :], variance_floor)
    merges = []
    while size > 1 and costs.min() < threshold:
        keep, gone = (int(index) for index in np.unravel_index(np.argmin(costs), costs.shape))
        merges.append((keep, gone))
        sums[keep] += sums[gone]
        open_row, open_column = np.isfinite(costs[keep, :]), np.isfinite(costs[:, keep])
        costs[keep, open_row] = merge_costs(sums[keep], sums[open_row], variance_floor)
        costs[open_column, keep] = merge_costs(sums[keep], sums[open_column], variance_floor)
        costs[gone, :] = costs[:, gone] = np.inf
    return merges
