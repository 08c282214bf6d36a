"""Senones: the states of every possible triphone, tied by a decision tree.

A triphone state is (left, centre, right, state), phones as ids: see events.py. All variants of a base phone, which
differ in stress or place in the word, grow from one root for each state, where the tree may ask which variant it is;
so a variant that is rare or unheard has the senones of its kin. Silence shares no senone with any other phone.
"""
# T frames, E events, P phones, S senones, M moments of an event

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from teacherstudent.config import Senones
from teacherstudent.files import write_text
from teacherstudent.tying import decision_tree
from teacherstudent.tying.decision_tree import Question
from teacherstudent.tying.events import (
    NUM_STATES,
    SILENCE_ID,
    Floats,
    Integers,
    Statistics,
    check_phones,
    frame_events,
)
from teacherstudent.tying.questions import find_questions, variants
from teacherstudent.tying.tree_roots import Root, share_roots

PRIOR_FLOOR = 0.01  # no senone's prior is below this share of the uniform one
_FORMAT, _VERSION = "teacherstudent senones", 1
_VARIANCE_FLOOR = 0.01  # share of the variance over all frames


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
        check_phones(events[:, 1], len(self.phones))
        check_phones(events[:, [0, 2]], len(self.phones), lowest=0)
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


def build(
    statistics: Statistics,
    phones: Sequence[str],
    settings: Senones,
    questions: Sequence[Question] | None = None,
) -> Inventory:
    """Grow the tree and merge its leaves. Priors are left uniform: see Inventory.with_priors.

    phones: names in the order of their ids, silence first; questions: found from the data where none are given. There
    are at most settings.target senones; every one has seen settings.min_count frames, silence excepted. Raises
    ValueError without frames, or for a target below the number of roots.
    """
    if len(phones) != statistics.num_phones or len(set(phones)) != len(phones):
        raise ValueError(f"got {len(phones)} phone names, need {statistics.num_phones}, all different")
    if not statistics.num_frames:
        raise ValueError("no aligned frames to grow a tree from: align the human-labelled part first")
    events, moments = statistics.events()
    floor = _variance_floor(moments, statistics.num_features)
    cells = _cell_moments(events, moments, len(phones))
    groups = variants(phones)
    if settings.shared_roots == "phone":
        groups = {name: (phone,) for phone, name in enumerate(phones, 1) if phone != SILENCE_ID}
    roots = share_roots(cells, groups, floor, settings.min_count)
    if settings.target < len(roots):
        raise ValueError(
            f"senones.target = {settings.target}: with {len(groups) + 1} phones of {NUM_STATES} states at least "
            f"{len(roots)} senones are needed"
        )
    if questions is None:
        questions = find_questions(cells, phones, groups.values(), floor)
    splitter = decision_tree.Splitter(events, moments, questions, floor, settings.min_count)
    tree = decision_tree.grow(splitter, _rows_of(roots, events), settings.target, settings.min_gain)
    num_split = len(tree.leaf_rows)
    # What a split had to gain: with enough senones as much as the last one gained (less what rounding may change).
    threshold = (
        min(tree.gains, default=0.0) * (1 - 1e-9) if num_split == settings.target else settings.min_gain
    )
    joined = decision_tree.merge_leaves(tree, moments, floor, threshold)
    provenance = {
        **{name: getattr(settings, name) for name in ("target", "min_count", "min_gain", "shared_roots")},
        "frames": statistics.num_frames,
        "events": len(events),
        "questions": len(questions),
        "roots": len(roots),
        "leaves_before_merging": num_split,
        "gain_per_frame": round(sum(tree.gains) / statistics.num_frames, 6),
    }
    return _inventory(phones, questions, roots, tree, joined, provenance)


def _rows_of(roots: Sequence[Root], events: Integers) -> list[Integers]:
    """Of the events that belong to each root."""
    index_of = {pair: index for index, root in enumerate(roots) for pair in root}
    belongs = np.array([index_of[centre, state] for centre, state in events[:, [1, 3]].tolist()])
    return [np.flatnonzero(belongs == index) for index in range(len(roots))]


def _variance_floor(moments: Floats, num_features: int) -> Floats:
    count, first, second = np.split(moments.sum(axis=0), [1, 1 + num_features])
    return np.maximum(_VARIANCE_FLOOR * (second / count - (first / count) ** 2), 1e-10)


def _cell_moments(events: Integers, moments: Floats, num_phones: int) -> Floats:
    """(P + 1, states, M): of each phone's states, whatever stands beside it."""
    cells = np.zeros((num_phones + 1, NUM_STATES, moments.shape[1]))
    np.add.at(cells, (events[:, 1], events[:, 3]), moments)
    return cells


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
