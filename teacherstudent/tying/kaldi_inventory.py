"""A Kaldi tree taken as it is: its pdfs become the senones, with the same numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.lexicon import SILENCE
from teacherstudent.files import hash_file, split_lines
from teacherstudent.tying.decision_tree import POSITIONS, Question
from teacherstudent.tying.event_map import PDF_CLASS, Constant, ContextDependency, EventMap, Split, Table
from teacherstudent.tying.events import NUM_STATES, SILENCE_ID
from teacherstudent.tying.kaldi_topology import Topology, first_and_later_frames, shortest_duration
from teacherstudent.tying.senones import Inventory

_LEFT, _CENTRE, _RIGHT, _STATE = range(len(POSITIONS))
_MILLISECONDS = round(1000 * FRAME_SHIFT_SECONDS)
_NO_PHONE = re.compile(r"<eps>|#\d+")  # of a phone table: no symbol, and disambiguation symbols


def read_kaldi_inventory(folder: Path) -> Inventory:
    """The inventory of a folder with tree, topo (or final.mdl, whose topology is read) and phones.txt.

    Phones get new ids, silence first, then in Kaldi's order; <eps> and #0, #1, … are no phones. Priors are left
    uniform. Raises ValueError naming the file for a tree over more than the two neighbours, a phone without pdfs, a
    table without SIL, and a topology whose phones do not have one pdf for the first frame and one for later frames.
    """
    tree_path, table_path = folder / "tree", folder / "phones.txt"
    topology_path = folder / "topo" if (folder / "topo").is_file() else folder / "final.mdl"
    for path in (tree_path, topology_path, table_path):
        if not path.is_file():
            raise ValueError(
                f"senones.kaldi_tree: {path} is missing. The folder needs `tree`, `phones.txt` and `topo` (or "
                "final.mdl): Kaldi leaves the first with the model and the others in its lang folder"
            )
    table = read_phone_table(table_path)
    _check_topology(Topology.read(topology_path), table, topology_path)
    inventory = inventory_of(ContextDependency.read(tree_path), table, str(tree_path))
    hashes = {path.name: hash_file(path) for path in (tree_path, topology_path, table_path)}
    inventory.provenance["kaldi"] = hashes
    return inventory


def read_phone_table(path: Path) -> dict[str, int]:
    """Kaldi's ids by name, silence first, then ascending. Raises ValueError naming file and line."""
    table: dict[str, int] = {}
    try:
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        name, *rest = line.split() or [""]
        if len(rest) != 1 or not rest[0].isdecimal():
            raise ValueError(f"{path}, line {number}: `name number` is needed, got {line!r}")
        if not _NO_PHONE.fullmatch(name):
            table[name] = int(rest[0])
    if SILENCE not in table:
        raise ValueError(
            f"{path} has no phone {SILENCE}: silence is called so here. Its first are {list(table)[:5]}"
        )
    if len(set(table.values())) < len(table) or 0 in table.values():
        raise ValueError(f"{path}: every phone needs a number of its own, from 1")
    return dict(sorted(table.items(), key=lambda item: (item[0] != SILENCE, item[1])))


def _check_topology(topology: Topology, table: Mapping[str, int], path: Path) -> None:
    for name, phone in table.items():
        states = topology.states(phone)
        if states is None:
            raise ValueError(
                f"{path} has no states for phone {name!r} ({phone}): are these files of one model?"
            )
        if first_and_later_frames(states):
            continue
        frames = shortest_duration(states)
        short = f"with a frame every {_MILLISECONDS} ms it would last {frames * _MILLISECONDS} ms at least"
        raise ValueError(
            f"{path}: phone {name!r} goes through {len(states) - 1} states"
            + (f", so {short}, longer than many phones" if frames > 1 else "")
            + ". Needed is one pdf class for its first frame and one for later frames, as in Kaldi's chain models "
            "(<ForwardPdfClass> 0 <SelfLoopPdfClass> 1). Leave senones.kaldi_tree empty and import the alignments of "
            'this model (align.source = "kaldi"): the tree is then grown anew'
        )


def inventory_of(tree: ContextDependency, table: Mapping[str, int], name: str) -> Inventory:
    """table: Kaldi's ids by phone, silence first; name: what errors call the tree."""
    centre = tree.centre
    if tree.width > 3 or centre > 1 or tree.width - centre > 2:
        raise ValueError(
            f"{name} looks at {tree.width} phones around number {centre}: one neighbour on either side is what can be "
            "used (--context-width=3 --central-position=1, or less)"
        )
    conversion = _Conversion(tree, table, name)
    roots = conversion.roots()
    inventory = Inventory(
        phones=tuple(table),
        questions=tuple(conversion.questions),
        nodes=tuple((position, question, yes, no) for position, question, yes, no in conversion.nodes),
        roots=roots,
        num_senones=tree.num_pdfs,
        priors=np.full(tree.num_pdfs, 1.0 / tree.num_pdfs),
    )
    _check_silence(inventory, name)
    return inventory


def _check_silence(inventory: Inventory, name: str) -> None:
    for state, place in enumerate(inventory.roots[SILENCE_ID - 1]):
        while place >= 0:
            position, question, yes, no = inventory.nodes[place]
            if position in (_LEFT, _RIGHT):
                raise ValueError(
                    f"{name} asks about the neighbours of {SILENCE}: silence must not depend on them. Build the tree "
                    f"with {SILENCE} as `not-shared not-split` in roots.txt"
                )
            value = SILENCE_ID if position == _CENTRE else state
            place = yes if value in inventory.questions[question] else no


@dataclass(frozen=True)
class _Reach:
    """Which events come to a place of the tree, in Kaldi's ids: (phone, state), and the neighbours of these."""

    cells: frozenset[tuple[int, int]]
    left: frozenset[int]
    right: frozenset[int]

    def values(self, position: int) -> frozenset[int]:
        if position in (_LEFT, _RIGHT):
            return self.left if position == _LEFT else self.right
        return frozenset(cell[position == _STATE] for cell in self.cells)

    def where(self, position: int, values: frozenset[int]) -> "_Reach":
        """Only those events whose phone, neighbour or state is one of these."""
        if position == _LEFT:
            return replace(self, left=values)
        if position == _RIGHT:
            return replace(self, right=values)
        return replace(self, cells=frozenset(c for c in self.cells if c[position == _STATE] in values))


class _Conversion:
    """Nodes and questions of an inventory, from Kaldi's. What no event of the phones can reach is left out."""

    def __init__(self, tree: ContextDependency, table: Mapping[str, int], name: str) -> None:
        self.questions: dict[Question, int] = {}
        self.nodes: list[list[int]] = []
        self._tree, self._name, self._names = tree.tree, name, {phone: word for word, phone in table.items()}
        self._positions = {PDF_CLASS: _STATE} | {key: key - tree.centre + 1 for key in range(tree.width)}
        self._ids = {0: 0} | {phone: index for index, phone in enumerate(table.values(), 1)}

    def roots(self) -> tuple[tuple[int, int], ...]:
        """Of every phone and state; the phones that come to the same place of the tree share it."""
        starts: dict[int, EventMap] = {}
        cells: dict[int, list[tuple[int, int]]] = {}
        for phone in self._names:
            for state in range(NUM_STATES):
                start = self._find_root(phone, state)
                starts[id(start)] = start
                cells.setdefault(id(start), []).append((phone, state))
        around = frozenset(self._ids)
        places = {
            cell: place
            for start, members in cells.items()
            for place in [self._convert(starts[start], _Reach(frozenset(members), around, around))]
            for cell in members
        }
        return tuple((places[phone, 0], places[phone, 1]) for phone in self._names)

    def _find_root(self, phone: int, state: int) -> EventMap:
        """Below the table of the phone's states; without one, where the tree asks about a neighbour, or the leaf."""
        place: EventMap | None = self._tree
        while isinstance(place, Split | Table) and self._position(place.key) in (_CENTRE, _STATE):
            value = phone if self._position(place.key) == _CENTRE else state
            if isinstance(place, Split):
                place = place.yes if value in place.members else place.no
                continue
            of_states = place.key == PDF_CLASS
            place = place.entries[value] if value < len(place.entries) else None
            if of_states:
                break
        if place is None:
            raise self._no_pdf(phone, state)
        return place

    def _convert(self, root: EventMap, reach: _Reach) -> int:
        """Returns the place of the root: a node, or ~pdf."""
        found = [0]
        waiting: list[tuple[EventMap, _Reach, list[int], int]] = [(root, reach, found, 0)]
        while waiting:
            place, reach, row, column = waiting.pop()
            while not isinstance(place, Constant):
                if isinstance(place, Table):
                    place = self._as_splits(place, reach)
                    continue
                position = self._position(place.key)
                values = reach.values(position)
                yes = values.intersection(place.members)
                if 0 < len(yes) < len(values):
                    break
                place = place.yes if yes else place.no
            if isinstance(place, Constant):
                row[column] = ~place.answer
                continue
            question = self.questions.setdefault(self._translate(place), len(self.questions))
            row[column] = len(self.nodes)
            self.nodes.append(node := [position, question, 0, 0])
            waiting.append((place.no, reach.where(position, values - yes), node, 3))
            waiting.append((place.yes, reach.where(position, yes), node, 2))
        return found[0]

    def _translate(self, split: Split) -> Question:
        """In our ids, without those of no phone."""
        if split.key == PDF_CLASS:
            return tuple(state for state in sorted(split.members) if state < NUM_STATES)
        return tuple(sorted(self._ids[value] for value in split.members if value in self._ids))

    def _as_splits(self, table: Table, reach: _Reach) -> EventMap:
        """The same answers for the events that come here, by one question after the other."""
        values_of: dict[int | Constant, list[int]] = {}
        entries: dict[int | Constant, EventMap] = {}
        position = self._position(table.key)
        for value in sorted(reach.values(position)):
            entry = table.entries[value] if value < len(table.entries) else None
            if entry is None:
                raise self._no_pdf(*min(reach.where(position, frozenset([value])).cells))
            which = entry if isinstance(entry, Constant) else id(entry)
            entries[which] = entry
            values_of.setdefault(which, []).append(value)
        *firsts, last = entries
        place = entries[last]
        for which in reversed(firsts):
            place = Split(table.key, tuple(values_of[which]), entries[which], place)
        return place

    def _position(self, key: int) -> int:
        if key not in self._positions:
            raise ValueError(
                f"{self._name} asks about key {key}: its window has keys {sorted(self._positions)}"
            )
        return self._positions[key]

    def _no_pdf(self, phone: int, state: int) -> ValueError:
        return ValueError(
            f"{self._name} has no pdf for a triphone of {self._names[phone]!r} ({phone}), pdf class {state}: are tree, "
            "topology and phones.txt of one model?"
        )
