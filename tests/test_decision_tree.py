import itertools

import numpy as np
import pytest
from scipy.stats import norm

from teacherstudent.tying import decision_tree


def frames_log_likelihood(frames):
    """Under their own best Gaussian, frame by frame."""
    frames = np.array(frames)
    return norm.logpdf(frames, frames.mean(axis=0), frames.std(axis=0)).sum()


def test_the_log_likelihood_is_that_of_the_frames_one_by_one():
    frames = np.random.default_rng(0).normal(size=(50, 3)) * [1, 2, 5]
    moments = np.concatenate([[50], frames.sum(0), (frames**2).sum(0)])
    found = decision_tree.log_likelihood(moments, np.full(3, 1e-9))
    assert found == pytest.approx(frames_log_likelihood(frames))


def test_the_variance_floor_is_a_limit_on_the_gaussian_and_never_makes_a_split_lose():
    generator = np.random.default_rng(1)
    frames = generator.normal(size=(40, 2)) * 0.1
    half = [
        np.concatenate([[len(part)], part.sum(0), (part**2).sum(0)]) for part in (frames[:15], frames[15:])
    ]
    floor = np.full(2, 0.5)
    expected = norm.logpdf(frames, frames.mean(axis=0), np.sqrt(0.5)).sum()
    assert decision_tree.log_likelihood(half[0] + half[1], floor) == pytest.approx(expected)
    assert decision_tree.merge_costs(half[0], half[1], floor) >= 0


def grown(seed, target, min_count):
    """A tree over one root, with the frames behind its events and the questions that were asked."""
    generator = np.random.default_rng(seed)
    events = np.array(list(itertools.product(range(5), range(1, 5), range(5), (0, 1))))[
        generator.permutation(200)[:60]
    ]
    frames = [generator.normal(size=(generator.integers(2, 9), 2)) + generator.normal(size=2) for _ in events]
    moments = np.array([np.concatenate([[len(f)], f.sum(0), (f**2).sum(0)]) for f in frames])
    questions = [(0,), (1,), (2,), (3,), (4,), (1, 2), (3, 4), (0, 1)]
    splitter = decision_tree.Splitter(events, moments, questions, np.full(2, 1e-9), min_count)
    tree = decision_tree.grow(splitter, [np.arange(len(events))], target, min_gain=0.5)
    return tree, events, frames, moments, questions


def test_the_gain_of_every_split_is_the_brute_force_difference_and_the_largest_there_is():
    tree, events, frames, _, questions = grown(0, target=12, min_count=10)
    assert len(tree.nodes) == 11
    leaves = {0: list(range(len(events)))}  # leaf -> events, replayed split by split

    def likelihood(rows):
        return frames_log_likelihood(np.concatenate([frames[row] for row in rows]))

    def gains(rows):
        for position, question in itertools.product(range(4), questions):
            yes = [row for row in rows if events[row, position] in question]
            no = [row for row in rows if events[row, position] not in question]
            if min(sum(len(frames[row]) for row in part) for part in (yes, no)) >= 10:
                yield likelihood(yes) + likelihood(no) - likelihood(rows), yes, no

    for gain in tree.gains:
        best, leaf, yes, no = max(
            (found[0], -leaf, *found[1:]) for leaf, rows in leaves.items() for found in gains(rows)
        )
        assert gain == pytest.approx(best, rel=1e-9)
        leaves[-leaf], leaves[len(leaves)] = yes, no
    assert sorted(map(sorted, leaves.values())) == sorted(sorted(rows.tolist()) for rows in tree.leaf_rows)


def test_merging_stops_when_no_two_leaves_of_a_root_are_closer_than_the_threshold():
    tree, _, frames, moments, _ = grown(1, target=15, min_count=5)
    threshold = 2 * tree.gains[-1]
    joined = decision_tree.merge_leaves(tree, moments, np.full(2, 1e-9), threshold)
    groups = {}
    for leaf, into in enumerate(joined):
        groups.setdefault(into, []).extend(tree.leaf_rows[leaf])
    assert 1 < len(groups) < 15
    pools = [np.concatenate([frames[row] for row in rows]) for rows in groups.values()]
    for one, other in itertools.combinations(pools, 2):
        apart = frames_log_likelihood(one) + frames_log_likelihood(other)
        assert apart - frames_log_likelihood(np.concatenate([one, other])) >= threshold


def test_leaves_of_different_roots_are_never_merged():
    moments = np.tile([10.0, 0.0, 10.0], (4, 1))
    tree = decision_tree.Tree([~0, ~1], leaf_rows=[np.array([0, 1]), np.array([2, 3])], leaf_root=[0, 1])
    assert decision_tree.merge_leaves(tree, moments, np.full(1, 1e-9), threshold=1e9) == [0, 1]


def test_clustering_joins_the_nearest_first():
    means = np.array([0.0, 0.1, 5.0, 5.3, 20.0])
    cells = np.stack([np.full(5, 10.0), 10 * means, 10 * (means**2 + 1)], axis=1)[:, None].repeat(2, axis=1)
    assert decision_tree.cluster(cells, np.array([1e-9])) == [(0, 1), (2, 3), (0, 1, 2, 3)]


def test_every_cluster_is_the_cheapest_merge_of_the_ones_before():
    generator = np.random.default_rng(6)
    frames = [
        [generator.normal(size=(20 + p, 2)) * 2 + generator.normal(size=2) for _ in (0, 1)] for p in range(9)
    ]
    cells = np.zeros((9, 2, 5))
    for phone, state in itertools.product(range(9), (0, 1)):
        values = frames[phone][state]
        cells[phone, state] = [len(values), *values.sum(0), *(values**2).sum(0)]

    def likelihood(cluster, state):
        return frames_log_likelihood(np.concatenate([frames[phone][state] for phone in cluster]))

    def cost(one, other):
        return sum(likelihood(one, s) + likelihood(other, s) - likelihood(one + other, s) for s in (0, 1))

    clusters, expected = [(phone,) for phone in range(9)], []
    while len(clusters) > 2:
        one, other = min(itertools.combinations(clusters, 2), key=lambda pair: cost(*pair))
        expected.append(tuple(sorted(one + other)))
        clusters = [c for c in clusters if c not in (one, other)] + [expected[-1]]
    assert decision_tree.cluster(cells, np.full(2, 1e-9)) == expected


def test_one_or_no_phone_has_no_clusters():
    assert decision_tree.cluster([], np.ones(1)) == []
    assert decision_tree.cluster([np.ones((2, 3))], np.ones(1)) == []
