"""Which states of phones in context share a Gaussian mixture ("pdf"): a decision tree says so, empty for monophones.

Variants of a base phone, which differ in stress or place in the word, are one here: a rare variant has the pdfs of
its kin. Silence does not depend on its neighbours. The Gaussian models only serve to find where phones begin and end;
the senones of the networks have a tree of their own (senones.py).
"""
# B base phones (silence is 1, 0 stands beyond the utterance), P pdfs, D features, E events, M = 1 + 2 D moments

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacherstudent.data.lexicon import base_phones
from teacherstudent.files import write_json
from teacherstudent.tying.decision_tree import Question, Splitter, cluster, grow
from teacherstudent.tying.event_map import PDF_CLASS, Constant, ContextDependency, EventMap, Split, Table

SILENCE_ID = 1
_MIN_COUNT, _MIN_GAIN = 200, 100.0  # of 10 ms frames in a leaf; log-likelihood that a split must bring
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def find_bases(phones: Sequence[str]) -> Integers:
    """The base phone, from 1, of every phone: (P,), in the order in which they are met."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(base, len(numbers) + 1) for base in base_phones(phones)])


def num_states(base: int, states: int) -> int:
    """Silence has twice as many: with fewer, the closures of stops were often taken for pauses."""
    return 2 * states if base == SILENCE_ID else states


def list_states(num_bases: int, states: int) -> Integers:
    """(N, 2) base phone and state of every state of every base phone, in order."""
    return np.array([(b, state) for b in _bases(num_bases) for state in range(num_states(b, states))])


def _bases(num_bases: int) -> range:
    return range(1, num_bases + 1)


@dataclass(frozen=True)
class TiedStates:
    """A tree for each base phone and state. References: ≥ 0 a node, otherwise ~pdf.

    nodes: (position, question, yes, no), position as in decision_tree.POSITIONS, children after their parent;
    questions: base phones; roots: for every base phone, from 1, for each of its states.
    """

    roots: tuple[tuple[int, ...], ...]
    nodes: tuple[tuple[int, int, int, int], ...] = ()
    questions: tuple[Question, ...] = ()

    @classmethod
    def monophone(cls, num_bases: int, states: int) -> "TiedStates":
        """Every state by itself: pdfs in the order of list_states."""
        places = iter(range(len(list_states(num_bases, states))))
        return cls(
            tuple(tuple(~next(places) for _ in range(num_states(b, states))) for b in _bases(num_bases))
        )

    @property
    def num_pdfs(self) -> int:
        return sum(map(len, self.roots)) + len(self.nodes)  # every node adds one leaf

    def to_kaldi(self, bases: Integers) -> ContextDependency:
        """Kaldi's tree over phones 1 … len(bases), of which the base phones are given."""
        width, central = (3, 1) if self.nodes else (1, 0)
        maps: dict[int, EventMap] = {~pdf: Constant(pdf) for pdf in range(self.num_pdfs)}
        for index in reversed(range(len(self.nodes))):
            position, question, yes, no = self.nodes[index]
            members = [0] if 0 in self.questions[question] else []
            members += (np.flatnonzero(np.isin(bases, self.questions[question])) + 1).tolist()
            maps[index] = Split(position, tuple(members), maps[yes], maps[no])
        states = [Table(PDF_CLASS, tuple(maps[place] for place in self.roots[base - 1])) for base in bases]
        return ContextDependency(width, central, Table(central, (None, *states)))

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "TiedStates":
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: tuple(map(tuple, rows)) for name, rows in values.items()})


def frame_events(bases: Integers, starts: Integers, states: Integers) -> Integers:
    """(T, 4) left, centre, right, state of every frame.

    bases: (N,) of an utterance's phones; starts: (N,) their first frames; states: (T,).
    """
    phone = np.searchsorted(starts, np.arange(len(states)), side="right") - 1
    padded = np.pad(bases, 1)
    events = np.stack([padded[phone], bases[phone], padded[phone + 2], states], axis=1)
    silent = events[:, 1] == SILENCE_ID
    events[silent, 0] = events[silent, 2] = 0
    return events


def sum_events(events: Integers, moments: Floats) -> tuple[Integers, Floats]:
    """Rows of the same event added up: events (N, 4), moments (N, M) -> (E, 4) ascending, (E, M)."""
    found, place = np.unique(events, axis=0, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(found)))
    return found, np.add.reduceat(moments[order], starts, axis=0)


def tie(
    events: Integers, moments: Floats, num_bases: int, states: int, leaves: int, variance_floor: Floats
) -> tuple[TiedStates, Floats]:
    """Grow the tree; returns it with the moments (P, M) of its pdfs. events: (E, 4); moments: (E, M).

    Questions about the neighbours are the clusters of a bottom-up clustering of the base phones, and each by itself.
    """
    cells = np.zeros((num_bases + 1, num_states(SILENCE_ID, states), moments.shape[1]))
    np.add.at(cells, (events[:, 1], events[:, 3]), moments)
    heard = np.flatnonzero(cells[:, :, 0].sum(axis=1))
    clusters = cluster([cells[base] for base in heard], variance_floor)
    questions: list[Question] = [(0,), (0, SILENCE_ID), *((base,) for base in _bases(num_bases))]
    questions += [tuple(int(heard[index]) for index in members) for members in clusters]
    splitter = Splitter(events, moments, questions, variance_floor, min_count=_MIN_COUNT)
    rows = [
        np.flatnonzero((events[:, [1, 3]] == pair).all(axis=1)) for pair in list_states(num_bases, states)
    ]
    tree = grow(splitter, rows, max(leaves, len(rows)), _MIN_GAIN)
    places = iter(tree.roots)
    roots = [tuple(next(places) for _ in range(num_states(base, states))) for base in _bases(num_bases)]
    used = sorted({question for _, question, _, _ in tree.nodes})
    nodes = [(position, used.index(question), yes, no) for position, question, yes, no in tree.nodes]
    sums = np.stack([moments[rows].sum(axis=0) for rows in tree.leaf_rows])
    return TiedStates(tuple(roots), tuple(nodes), tuple(questions[index] for index in used)), sums
