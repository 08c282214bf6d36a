"""Weighted automata as arrays: OpenFst's binary vector format read and written with numpy.

The wheels hand over one arc at a time, which takes minutes for a graph of millions; a file of theirs is read here
in seconds. Format: openfst/lib/vector-fst.h. A weight is one number (tropical) or two (Kaldi's lattice weight:
graph cost, acoustic cost); costs are negative natural logarithms, infinity is no way.
"""
# N states, A arcs, W numbers of a weight

import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacherstudent import wheels

_MAGIC = 2125659606
_VERSION = 2
_EXPANDED, _MUTABLE = 1, 2  # properties that are always known
_ARC_TYPES = {"standard": 1, "lattice4": 2}  # numbers of a weight

Integers = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Arcs:
    """One automaton. Arcs are sorted by their source.

    start: a state; final: (N, W) costs of ending there; source, target: (A,) states; inputs, outputs: (A,) labels,
    0 for none; weights: (A, W).
    """

    start: int
    final: Floats
    source: Integers
    target: Integers
    inputs: Integers
    outputs: Integers
    weights: Floats

    @property
    def num_states(self) -> int:
        return len(self.final)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Arcs":
        """Raises ValueError for data that are not a vector automaton with one of the two kinds of arcs."""
        magic, length = struct.unpack_from("<ii", data)
        kind = data[8 : 8 + length].decode()
        (arc_length,) = struct.unpack_from("<i", data, 8 + length)
        place = 12 + length + arc_length
        arc_type = data[12 + length : place].decode()
        _, _, _, start, num_states, _ = struct.unpack_from("<iiQqqq", data, place)
        if magic != _MAGIC or kind != "vector" or arc_type not in _ARC_TYPES:
            raise ValueError(f"got an automaton of type {kind!r} with arcs of type {arc_type!r}")
        return cls._from_body(np.frombuffer(data, "<i4", offset=place + 40), start, num_states, arc_type)

    @classmethod
    def _from_body(cls, body: Integers, start: int, num_states: int, arc_type: str) -> "Arcs":
        """Of every state: W numbers, the number of arcs (8 bytes), the arcs of 3 + W numbers."""
        width = _ARC_TYPES[arc_type]
        head, size = width + 2, width + 3
        counts, place = np.zeros(num_states, np.int64), 0
        words = memoryview(body.tobytes()).cast("i")
        for state in range(num_states):
            counts[state] = words[place + width]
            place += head + size * words[place + width]
        heads, firsts = _places(counts, head, size)
        arcs = body[firsts[:, None] + np.arange(size)]
        floats = body.view("<f4")
        return cls(
            start=int(start),
            final=floats[heads[:, None] + np.arange(width)],
            source=np.repeat(np.arange(num_states, dtype=np.int32), counts),
            target=arcs[:, -1],
            inputs=arcs[:, 0],
            outputs=arcs[:, 1],
            weights=np.ascontiguousarray(arcs[:, 2:-1]).view("<f4"),
        )

    def to_bytes(self) -> bytes:
        width = self.final.shape[1]
        arc_type = {width: name for name, width in _ARC_TYPES.items()}[width].encode()
        counts = np.bincount(self.source, minlength=self.num_states)
        heads, firsts = _places(counts, width + 2, width + 3)
        body = np.zeros((width + 2) * self.num_states + (width + 3) * len(self.source), "<i4")
        body[heads[:, None] + np.arange(width)] = np.ascontiguousarray(self.final, "<f4").view("<i4")
        body[heads + width] = counts
        fields = [
            self.inputs,
            self.outputs,
            *np.ascontiguousarray(self.weights, "<f4").view("<i4").T,
            self.target,
        ]
        for offset, values in enumerate(fields):
            body[firsts + offset] = values
        head = struct.pack("<ii", _MAGIC, 6) + b"vector" + struct.pack("<i", len(arc_type)) + arc_type
        numbers = (_VERSION, 0, _EXPANDED | _MUTABLE, self.start, self.num_states, len(self.source))
        return head + struct.pack("<iiQqqq", *numbers) + body.tobytes()

    @classmethod
    def of(cls, fst: Any) -> "Arcs":
        """From a kaldifst.StdVectorFst or kaldifst.Lattice."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "fst")
            fst.write(str(path))
            return cls.from_bytes(path.read_bytes())

    def load(self) -> Any:
        """The kaldifst.StdVectorFst, or kaldifst.Lattice where weights have two numbers."""
        kaldifst = wheels.load("kaldifst", "decode")
        kind = kaldifst.StdVectorFst if self.final.shape[1] == 1 else kaldifst.Lattice
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "fst")
            path.write_bytes(self.to_bytes())
            return kind.read(str(path))


def make_acceptor(start: int, final: Any, arcs: Any) -> Arcs:
    """A tropical automaton from rows (source, input, output, cost, target) in any order; final: (N,) costs."""
    rows = np.array(arcs, dtype=np.float64).reshape(-1, 5)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    source, inputs, outputs, target = (rows[:, column].astype(np.int32) for column in (0, 1, 2, 4))
    weights = rows[:, 3:4].astype(np.float32)
    return Arcs(start, np.array(final, np.float32)[:, None], source, target, inputs, outputs, weights)


def _places(counts: NDArray[np.int64], head: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where in the body every state (N,) and every arc (A,) begins."""
    before = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts
    heads = head * np.arange(len(counts)) + size * before
    arcs = np.repeat(heads + head - size * before, counts) + size * np.arange(int(counts.sum()))
    return heads, arcs
