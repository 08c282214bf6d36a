"""Senones: the states of every possible triphone, tied by a decision tree.

A phone lasts one frame or more. Its first frame is state 0, all later ones are state 1. A triphone state is
(left, centre, right, state), phones as ids: 0 outside of the utterance, then the phones in order from 1, silence
first. Silence does not depend on its neighbours and shares no senone with any other phone.
"""
# T frames, D tree features, E events, P phones, S senones, M moments of an event (1 + 2 D)

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from teacherstudent import decision_tree
from teacherstudent.config import Senones
from teacherstudent.decision_tree import Floats, Integers, Question
from teacherstudent.files import write_text

NUM_STATES = 2  # first frame of a phone, later frames
SILENCE_ID = 1
PRIOR_FLOOR = 0.01  # no senone's prior is below this share of the uniform one
_FORMAT, _VERSION = "teacherstudent senones", 1
_NUM_CEPSTRA = 13
NUM_TREE_FEATURES = 2 * _NUM_CEPSTRA
_VARIANCE_FLOOR = 0.01  # share of the variance over all frames


def tree_features(stacked: ArrayLike, stacked_frames: int = 3) -> Floats:
    """A small decorrelated view of stacked log-mel frames, for Gaussians with diagonal covariance.

    stacked: (T, stacked_frames * mels). Returns (T, 26): 13 cepstra of the frames' mean, then of their slope.
    """
    frames = np.asarray(stacked, dtype=np.float64)
    frames = frames.reshape(len(frames), stacked_frames, frames.shape[1] // stacked_frames)
    time = np.arange(stacked_frames) - (stacked_frames - 1) / 2
    slope = time / max(float(np.linalg.norm(time)), 1.0)
    mean = np.full(stacked_frames, stacked_frames**-0.5)
    mels = frames.shape[2]
    waves = np.cos(np.pi / mels * np.outer(np.arange(mels) + 0.5, np.arange(_NUM_CEPSTRA))) * np.sqrt(
        2 / mels
    )
    waves[:, 0] *= np.sqrt(0.5)  # the DCT-II, orthonormal
    return np.concatenate([np.tensordot(frames, part, axes=(1, 0)) @ waves for part in (mean, slope)], axis=1)


def frame_events(phone: ArrayLike, first: ArrayLike) -> Integers:
    """The triphone state of every frame of an utterance.

    phone: (T,) phone ids; first: (T,) bool, whether the frame opens a phone. Returns (T, 4): left, centre,
    right, state. Silence's neighbours are given as 0. A cut may begin within a phone (first[0] False).
    Raises ValueError when the phone changes at a frame that is not marked as first.
    """
    phones, opens = np.asarray(phone, dtype=np.int64), np.asarray(first, dtype=bool)
    if phones.shape != opens.shape or phones.ndim != 1:
        raise ValueError(f"got phone {phones.shape} and first {opens.shape}: both must be (frames,)")
    if not len(phones):
        return np.zeros((0, 4), dtype=np.int64)
    changed = np.flatnonzero((phones[1:] != phones[:-1]) & ~opens[1:]) + 1
    if len(changed):
        raise ValueError(f"the phone changes at frame {changed[0]}, which is not marked as a phone's first")
    starts = opens.copy()
    starts[0] = True
    segment = np.cumsum(starts) - 1
    sequence = np.pad(phones[starts], 1)  # 0 outside of the utterance
    events = np.stack([sequence[segment], phones, sequence[segment + 2], np.where(opens, 0, 1)], axis=1)
    events[phones == SILENCE_ID, 0] = events[phones == SILENCE_ID, 2] = 0
    return events


class Statistics:
    """Count, sums and sums of squares of the tree features of every event, in float64."""

    def __init__(self, num_phones: int, num_features: int = NUM_TREE_FEATURES) -> None:
        self.num_phones, self.num_features = num_phones, num_features
        self._rows: dict[int, int] = {}
        self._moments = np.zeros((1024, 1 + 2 * num_features))

    def accumulate(self, features: ArrayLike, phone: ArrayLike, first: ArrayLike) -> None:
        """Add an utterance: features (T, D), phone (T,) ids, first (T,) bool."""
        values = np.asarray(features, dtype=np.float64)
        events = frame_events(phone, first)
        if values.shape != (len(events), self.num_features):
            raise ValueError(
                f"got features {values.shape}, need ({len(events)}, {self.num_features}) for {len(events)} phones"
            )
        if not len(events):
            return
        _check_phones(events[:, 1], self.num_phones)
        shape = (self.num_phones + 1,) * 3 + (NUM_STATES,)
        keys, inverse = np.unique(np.ravel_multi_index(tuple(events.T), shape), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(len(keys)))
        moments = np.concatenate([np.ones((len(values), 1)), values, values**2], axis=1)
        sums = np.add.reduceat(moments[order], starts, axis=0)
        rows = [self._rows.setdefault(int(key), len(self._rows)) for key in keys]
        if len(self._rows) > len(self._moments):
            self._moments = np.pad(self._moments, ((0, len(self._moments) + len(keys)), (0, 0)))
        self._moments[rows] += sums

    @property
    def num_frames(self) -> int:
        return int(self._moments[:, 0].sum())

    def events(self) -> tuple[Integers, Floats]:
        """Events (E, 4) in ascending order, and their moments (E, M)."""
        keys = np.array(sorted(self._rows), dtype=np.int64)
        shape = (self.num_phones + 1,) * 3 + (NUM_STATES,)
        events = np.stack(np.unravel_index(keys, shape), axis=1)
        return events, self._moments[[self._rows[int(key)] for key in keys]]


@dataclass(frozen=True, eq=False)
class Inventory:
    """Every triphone state's senone: a tree for each phone and state, whose leaves are senones.

    phones: names, id = index + 1; questions: sets of ids; nodes: (position, question, yes, no) with position an
    index into decision_tree.POSITIONS; roots: for every phone, for each of its states. A reference ≥ 0 is a
    node, a later one than the node that refers to it; otherwise it is ~senone. priors: (S,).
    """

    phones: tuple[str, ...]
    questions: tuple[Question, ...]
    nodes: tuple[tuple[int, int, int, int], ...]
    roots: tuple[tuple[int, int], ...]
    num_senones: int
    priors: NDArray[np.float64]
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.bool_], Integers, Integers]:
        members = np.zeros((len(self.questions) + 1, max(len(self.phones) + 1, NUM_STATES)), dtype=bool)
        for index, question in enumerate(self.questions):
            members[index, list(question)] = True
        nodes = np.array(self.nodes, dtype=np.int64).reshape(-1, 4)
        return members, nodes, np.array(self.roots, dtype=np.int64)

    def senones(self, events: ArrayLike) -> NDArray[np.int32]:
        """events: (N, 4) left, centre, right, state. Returns (N,); seen in training or not, all have one."""
        events = np.asarray(events, dtype=np.int64).reshape(-1, 4)
        _check_phones(events[:, 1], len(self.phones))
        _check_phones(events[:, [0, 2]], len(self.phones), lowest=0)
        if not np.isin(events[:, 3], range(NUM_STATES)).all():
            raise ValueError(f"got states {sorted(set(events[:, 3].tolist()))}: a phone has states 0 and 1")
        members, nodes, roots = self._arrays
        place = roots[events[:, 1] - 1, events[:, 3]]
        rows = np.flatnonzero(place >= 0)
        while len(rows):
            position, question, yes, no = nodes[place[rows]].T
            place[rows] = np.where(members[question, events[rows, position]], yes, no)
            rows = rows[place[rows] >= 0]
        return (~place).astype(np.int32)

    def senone(self, left: int, centre: int, right: int, state: int) -> int:
        """The senone of one triphone state."""
        return int(self.senones([(left, centre, right, state)])[0])

    def label(self, phone: ArrayLike, first: ArrayLike) -> NDArray[np.int32]:
        """phone: (T,) ids; first: (T,) bool, the frame opens a phone. Returns (T,) senones."""
        return self.senones(frame_events(phone, first))

    def with_priors(self, counts: ArrayLike) -> "Inventory":
        """With priors from how many frames carry each senone: (S,) ≥ 0.

        A prior is the senone's share of the frames, but at least PRIOR_FLOOR / S, and then all are divided by
        their sum: dividing by the prior of a hardly seen senone would make it win everywhere.
        """
        frames = np.asarray(counts, dtype=np.float64)
        if frames.shape != (self.num_senones,) or frames.min() < 0 or frames.sum() <= 0:
            raise ValueError(
                f"got counts of shape {frames.shape} with sum {frames.sum()}: need a count of frames for each of "
                f"the {self.num_senones} senones, none negative, not all 0"
            )
        shares = np.maximum(frames / frames.sum(), PRIOR_FLOOR / self.num_senones)
        return dataclasses.replace(self, priors=shares / shares.sum())

    @property
    def log_priors(self) -> NDArray[np.float32]:
        """(S,) natural logarithms."""
        return np.log(self.priors).astype(np.float32)

    # -- as text -------------------------------------------------------------------------------------------

    def _contents(self) -> str:
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "phones": self.phones,
            "num_senones": self.num_senones,
            "roots": self.roots,
            "questions": self.questions,
            "nodes": self.nodes,
            "priors": self.priors.tolist(),
            "provenance": self.provenance,
        }
        rows = (f'"{key}": {json.dumps(value, sort_keys=True)}' for key, value in values.items())
        return "{\n" + ",\n".join(rows)

    @cached_property
    def sha256(self) -> str:
        """Of everything that the inventory holds."""
        return hashlib.sha256(self._contents().encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write as JSON text that depends on the contents alone."""
        write_text(Path(path), f'{self._contents()},\n"sha256": "{self.sha256}"\n}}\n')

    @classmethod
    def load(cls, path: Path | str) -> "Inventory":
        """Raises ValueError, naming the file, when it is missing, no inventory, damaged, or too new."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"no senone inventory at {path}: the `senones` step writes one") from None
        except ValueError as error:
            raise ValueError(f"{path} is not a senone inventory: {error}") from None
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a senone inventory: it does not say format = {_FORMAT!r}")
        if values.get("version") != _VERSION:
            raise ValueError(f"{path} has version {values.get('version')!r}: this program reads {_VERSION}")
        try:
            inventory = cls(
                phones=tuple(values["phones"]),
                questions=tuple(map(tuple, values["questions"])),
                nodes=tuple(map(tuple, values["nodes"])),
                roots=tuple(map(tuple, values["roots"])),
                num_senones=values["num_senones"],
                priors=np.array(values["priors"], dtype=np.float64),
                provenance=values["provenance"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from None
        if values.get("sha256") != inventory.sha256:
            raise ValueError(f"{path} is damaged: its contents have another sha256 than it says")
        return inventory


def _check_phones(phones: Integers, num_phones: int, lowest: int = SILENCE_ID) -> None:
    if phones.size and (phones.min() < lowest or phones.max() > num_phones):
        wrong = int(phones.min() if phones.min() < lowest else phones.max())
        raise ValueError(f"got phone id {wrong}: ids here go from {lowest} to {num_phones}")


def build(statistics: Statistics, phones: Sequence[str], settings: Senones) -> Inventory:
    """Grow the tree and merge its leaves. Priors are left uniform: see Inventory.with_priors.

    phones: names in the order of their ids, silence first. There are at most settings.target senones; every one
    has seen settings.min_count frames, silence excepted. Raises ValueError without frames, or for a target
    below the number of roots.
    """
    if len(phones) != statistics.num_phones or len(set(phones)) != len(phones):
        raise ValueError(f"got {len(phones)} phone names, need {statistics.num_phones}, all different")
    if not statistics.num_frames:
        raise ValueError("no aligned frames to grow a tree from: align the human-labelled part first")
    events, moments = statistics.events()
    floor = _variance_floor(moments, statistics.num_features)
    cells = _cell_moments(events, moments, len(phones))
    roots = _share_roots(cells, phones, floor, settings.min_count)
    if settings.target < len(roots):
        raise ValueError(
            f"senones.target = {settings.target}: with {len(phones)} phones of {NUM_STATES} states at least "
            f"{len(roots)} senones are needed"
        )
    questions = [(0,), (0, SILENCE_ID), *decision_tree.cluster_phones(cells, floor)]
    splitter = decision_tree.Splitter(events, moments, questions, floor, settings.min_count)
    cell_of = events[:, 1] * NUM_STATES + events[:, 3]
    rows = [
        np.flatnonzero(np.isin(cell_of, [phone * NUM_STATES + state for phone, state in root]))
        for root in roots
    ]
    tree = decision_tree.grow(splitter, rows, settings.target, settings.min_gain)
    num_split = len(tree.leaf_rows)
    threshold = min(tree.gains, default=0.0) * (1 - 1e-9)  # rounding must not merge what was split last
    joined = decision_tree.merge_leaves(tree, moments, floor, threshold)
    provenance = {
        "settings": dataclasses.asdict(settings),
        "frames": statistics.num_frames,
        "events": len(events),
        "roots": len(roots),
        "leaves_before_merging": num_split,
        "gain_per_frame": round(sum(tree.gains) / statistics.num_frames, 6),
    }
    return _inventory(phones, questions, roots, tree, joined, provenance)


def _variance_floor(moments: Floats, num_features: int) -> Floats:
    count, first, second = np.split(moments.sum(axis=0), [1, 1 + num_features])
    return np.maximum(_VARIANCE_FLOOR * (second / count - (first / count) ** 2), 1e-10)


def _cell_moments(events: Integers, moments: Floats, num_phones: int) -> Floats:
    """(P + 1, states, M): of each phone's states, whatever stands beside it."""
    cells = np.zeros((num_phones + 1, NUM_STATES, moments.shape[1]))
    np.add.at(cells, (events[:, 1], events[:, 3]), moments)
    return cells


Root = list[tuple[int, int]]  # (phone, state) pairs that grow one tree together


def _share_roots(cells: Floats, phones: Sequence[str], floor: Floats, min_count: int) -> list[Root]:
    """A root for each phone and state; those that have not seen min_count frames share the root of others.

    A state shares with its phone's other state first, then with the phone that is nearest by likelihood.
    """
    if len(phones) > SILENCE_ID and cells[SILENCE_ID + 1 :, :, 0].sum() < min_count:
        raise ValueError(
            f"only {int(cells[SILENCE_ID + 1 :, :, 0].sum())} frames of speech are aligned, fewer than "
            f"senones.min_count = {min_count}: align more speech"
        )
    silence: list[Root] = [[(SILENCE_ID, state)] for state in range(NUM_STATES)]
    if cells[SILENCE_ID, :, 0].min() < min_count:
        silence = [[(SILENCE_ID, state) for state in range(NUM_STATES)]]
    roots: list[Root] = []
    for phone in range(SILENCE_ID + 1, len(phones) + 1):
        alone: list[Root] = [[(phone, state)] for state in range(NUM_STATES)]
        roots += (
            alone if cells[phone, :, 0].min() >= min_count else [[pair for root in alone for pair in root]]
        )
    sums = [np.sum([cells[pair] for pair in root], axis=0) for root in roots]
    shared: dict[str, str] = {}
    while len(roots) > 1:
        small = min(range(len(roots)), key=lambda index: sums[index][0])
        if sums[small][0] >= min_count:
            break
        others = [index for index in range(len(roots)) if index != small]
        costs = decision_tree.merge_costs(sums[small], np.stack([sums[index] for index in others]), floor)
        near = min(zip(costs, others), key=lambda pair: (pair[0], -sums[pair[1]][0]))[1]
        shared |= {phones[phone - 1]: phones[roots[near][0][0] - 1] for phone, _ in roots[small]}
        roots[near], sums[near] = sorted(roots[near] + roots[small]), sums[near] + sums[small]
        del roots[small], sums[small]
    if shared:
        pairs = ", ".join(f"{rare} with {near}" for rare, near in sorted(shared.items()))
        warnings.warn(
            f"phones with fewer than senones.min_count = {min_count} frames share senones: {pairs}",
            stacklevel=3,
        )
    return silence + sorted(roots)


def _inventory(
    phones: Sequence[str],
    questions: Sequence[Question],
    roots: Sequence[Root],
    tree: decision_tree.Tree,
    joined: Sequence[int],
    provenance: Mapping[str, Any],
) -> Inventory:
    """Senones are numbered as they are met, root by root, yes before no; unused questions are left out."""
    numbers: dict[int, int] = {}
    stack = list(reversed(tree.roots))
    while stack:
        place = stack.pop()
        if place >= 0:
            stack += [tree.nodes[place][3], tree.nodes[place][2]]
        else:
            numbers.setdefault(joined[~place], len(numbers))

    def refer(place: int) -> int:
        return place if place >= 0 else ~numbers[joined[~place]]

    used = sorted({question for _, question, _, _ in tree.nodes})
    root_of = {pair: refer(tree.roots[index]) for index, root in enumerate(roots) for pair in root}
    return Inventory(
        phones=tuple(phones),
        questions=tuple(questions[index] for index in used),
        nodes=tuple((pos, used.index(query), refer(yes), refer(no)) for pos, query, yes, no in tree.nodes),
        roots=tuple((root_of[phone, 0], root_of[phone, 1]) for phone in range(1, len(phones) + 1)),
        num_senones=len(numbers),
        priors=np.full(len(numbers), 1.0 / len(numbers)),
        provenance=dict(provenance),
    )
