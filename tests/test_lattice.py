"""What is read from a lattice is what listing all of its paths gives."""

import gzip
import itertools
import math
import random

import kaldifst
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.decoding.lattice import Lattice, read_lattices, write_lattices
from teacherstudent.decoding.openfst import Arcs

NUM_WORDS = 3


def random_lattice(seed, num_frames=4, width=3):
    """Every state has a frame; states of a frame may also be joined by arcs that read none."""
    draw = random.Random(seed)
    levels = [[0], *([draw.random() for _ in range(draw.randint(1, width))] for _ in range(num_frames))]
    numbers = itertools.count()
    states = [[next(numbers) for _ in level] for level in levels]
    rows = []

    def join(source, target, label):
        word = draw.choice([0, 0, *range(1, NUM_WORDS + 1)])
        rows.append((source, target, label, word, draw.uniform(0, 2), draw.uniform(-1, 2)))

    for here, there in itertools.pairwise(states):
        for target in there:
            for source in {draw.choice(here), draw.choice(here)}:
                join(source, target, draw.randint(1, 5))
                if draw.random() < 0.3:
                    join(source, target, draw.randint(1, 5))
        for source, target in itertools.pairwise(there):
            if draw.random() < 0.4:
                join(source, target, 0)
    final = np.full((next(numbers), 2), np.inf, np.float32)
    final[states[-1]] = [[draw.uniform(0, 1), 0.0] for _ in states[-1]]
    order = list(range(len(final)))
    draw.shuffle(order)  # states are not in topological order
    table = np.array(sorted((order[a], order[b], *rest) for a, b, *rest in rows))
    shuffled = np.full_like(final, np.inf)
    shuffled[order] = final
    labels = table[:, :4].astype(np.int32).T
    return Lattice.of(Arcs(order[0], shuffled, *labels, table[:, 4:].astype(np.float32)))


def list_paths(lattice):
    """(arcs, cost) of every path."""
    arcs, found = lattice.arcs, []
    leaving = {state: np.flatnonzero(arcs.source == state).tolist() for state in range(arcs.num_states)}

    def follow(state, path, cost):
        if np.isfinite(arcs.final[state, 0]):
            found.append((path, cost + float(arcs.final[state].sum(dtype=np.float64))))
        for arc in leaving[state]:
            follow(int(arcs.target[arc]), [*path, arc], cost + float(arcs.weights[arc].sum(dtype=np.float64)))

    follow(0, [], 0.0)
    return found


def words_of(lattice, path):
    return tuple(int(word) for arc in path if (word := lattice.arcs.outputs[arc]))


seeds = st.integers(0, 10**6)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_states_are_in_topological_order(seed):
    arcs = random_lattice(seed).arcs
    assert arcs.start == 0
    assert (arcs.source < arcs.target).all()
    assert (np.diff(arcs.source) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 12))
def test_the_nbest_list_is_that_of_all_paths(seed, n):
    lattice = random_lattice(seed)
    best = {}
    for path, cost in list_paths(lattice):
        words = words_of(lattice, path)
        best[words] = min(cost, best.get(words, math.inf))
    found = lattice.nbest(n)
    assert [each.cost for each in found] == pytest.approx(sorted(best.values())[:n], abs=1e-5)
    assert len({each.words for each in found}) == len(found)
    for each in found:
        assert best[each.words] == pytest.approx(each.cost, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_a_confidence_is_the_highest_share_of_paths_on_the_same_word(seed):
    lattice = random_lattice(seed)
    paths = list_paths(lattice)
    total = sum(math.exp(-cost) for _, cost in paths)

    def last_words(path):
        """Of every frame, and after the last."""
        words, last = [], 0
        for arc in path:
            last = int(lattice.arcs.outputs[arc]) or last
            if lattice.arcs.inputs[arc]:
                words.append(last)
        return [*words, last]

    shares = [{} for _ in last_words(paths[0][0])]
    for path, cost in paths:
        for share, word in zip(shares, last_words(path)):
            share[word] = share.get(word, 0) + math.exp(-cost) / total
    found = lattice.last_words()
    assert [sum(row.values()) for row in found] == pytest.approx([1] * len(found))
    for share, row in zip(shares, found, strict=True):
        assert {word: value for word, value in row.items() if value > 1e-9} == pytest.approx(
            {word: value for word, value in share.items() if value > 1e-9}, abs=1e-6
        )
    best, _ = min(paths, key=lambda each: each[1])
    words = words_of(lattice, best)
    begins, frame = [], 0
    for arc in best:
        begins += [frame] if lattice.arcs.outputs[arc] else []
        frame += bool(lattice.arcs.inputs[arc])
    ends = [max(begin, after - 1) for begin, after in itertools.pairwise(begins)] + [frame] * bool(begins)
    expected = [
        max(shares[at].get(word, 0) for at in range(begin, end + 1))
        for word, begin, end in zip(words, begins, ends)
    ]
    assert lattice.confidences(words) == pytest.approx(expected, abs=1e-6)


def test_words_that_are_not_in_the_lattice_have_no_confidence():
    assert random_lattice(0).confidences([9, 9]) == [0.0, 0.0]


def test_reweighting_scales_the_acoustics_and_charges_every_word():
    lattice = random_lattice(3)
    for path in lattice.reweighted(0.5, 2.0).nbest(50):
        same = next(each for each in lattice_costs(lattice) if each[0] == path.words)
        assert path.cost == pytest.approx(same[1], abs=1e-4)


def lattice_costs(lattice):
    """(words, cost at scale 0.5 and penalty 2) of the best way of each word sequence."""
    arcs, best = lattice.arcs, {}
    for path, _ in list_paths(lattice):
        words = words_of(lattice, path)
        graph, acoustic = (arcs.weights[path].sum(axis=0) + arcs.final[arcs.target[path[-1]]]).tolist()
        cost = graph + 0.5 * acoustic + 2.0 * len(words)
        best[words] = min(cost, best.get(words, math.inf))
    return list(best.items())


@pytest.mark.parametrize("name", ["lattices.txt", "lattices.gz"])
def test_lattices_survive_their_file_which_has_the_same_bytes_each_time(tmp_path, name):
    lattices = {f"u{seed}": random_lattice(seed) for seed in range(5)}
    for _ in range(2):
        write_lattices(tmp_path / name, (lattice.to_text(key) for key, lattice in lattices.items()))
        write_lattices(
            tmp_path / f"again-{name}", (lattice.to_text(key) for key, lattice in lattices.items())
        )
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    found = dict(read_lattices(tmp_path / name))
    assert list(found) == list(lattices)
    for key, lattice in lattices.items():
        assert [each.words for each in found[key].nbest(9)] == [each.words for each in lattice.nbest(9)]
        assert found[key].to_text(key) == lattice.to_text(key)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file stays


def test_openfst_reads_the_text_and_finds_the_same_best_path():
    for seed in range(10):
        lattice = random_lattice(seed)
        lines = []
        for line in lattice.to_text("u").splitlines()[1:-1]:
            *labels, weights = line.split("\t")
            lines.append("\t".join([*labels, str(sum(map(float, weights.split(","))))]))
        best = kaldifst.shortest_path(kaldifst.compile("\n".join(lines), acceptor=False))
        _, _, words, weight = kaldifst.get_linear_symbol_sequence(best)
        assert tuple(words) == lattice.nbest(1)[0].words
        assert weight.value == pytest.approx(lattice.nbest(1)[0].cost, abs=1e-4)


def test_a_damaged_file_of_lattices_is_an_error_naming_the_utterance(tmp_path):
    text = random_lattice(0).to_text("u7")
    (tmp_path / "cut.txt").write_text(text[:-1])
    with pytest.raises(ValueError, match="u7 ends without an empty line"):
        list(read_lattices(tmp_path / "cut.txt"))
    (tmp_path / "bad.gz").write_bytes(gzip.compress(text.replace(",", ";", 1).encode()))
    with pytest.raises(ValueError, match="utterance u7: cannot read"):
        list(read_lattices(tmp_path / "bad.gz"))


def test_a_circle_is_no_lattice():
    labels = np.array([[0, 1], [1, 0], [1, 1], [0, 0]], np.int32)
    arcs = Arcs(0, np.zeros((2, 2), np.float32), *labels, np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="circle"):
        Lattice.of(arcs)
