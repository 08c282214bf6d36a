"""Lattices: every path within a beam of an utterance's best one, and what can be read from them.

A lattice is kept in Kaldi's text format (`ark,t`), since it holds all there is, exactly, and is read by Kaldi's
lattice tools, by OpenFst (but for the pairs of weights) and by eye: after a line with the utterance, a line
`source target input output graph,acoustic` for every arc and `state graph,acoustic` for every final state, then an
empty line. The first line starts at the start state; states are in topological order. Input: senone + 1, or 0
for no frame, so that a state's frame is the number of inputs on the way to it; output: the word's number in
words.txt, or 0. Both costs are negative natural logarithms; the acoustic one is before the acoustic scale, the
graph one without the word penalty, so that readers apply what they like, as is Kaldi's habit.
"""
# T frames, N states, A arcs

import gzip
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacherstudent.decoding.openfst import Arcs

NO_WORD = 0
_Rows = list[
    tuple[int, int, int, int, float, float]
]  # source, target, input, word, graph cost, acoustic cost


@dataclass(frozen=True)
class WordPath:
    """One word sequence on its best way through a lattice: word ids, and costs (natural logarithms)."""

    words: tuple[int, ...]
    graph_cost: float
    acoustic_cost: float

    @property
    def cost(self) -> float:
        return self.graph_cost + self.acoustic_cost


@dataclass(frozen=True, eq=False)
class Lattice:
    """arcs: states in topological order from 0, the start; inputs senone + 1, outputs word ids, weights
    (graph cost, acoustic cost) of which the sum counts.
    """

    arcs: Arcs

    @classmethod
    def of(cls, arcs: Arcs) -> "Lattice":
        """From an acyclic automaton. Raises ValueError for one with a circle."""
        order = _topological_order(arcs)
        place = np.empty(arcs.num_states, np.int32)
        place[order] = np.arange(arcs.num_states)
        by_source = np.argsort(place[arcs.source], kind="stable")
        return cls(
            Arcs(
                start=0,
                final=arcs.final[order],
                source=place[arcs.source][by_source],
                target=place[arcs.target][by_source],
                inputs=arcs.inputs[by_source],
                outputs=arcs.outputs[by_source],
                weights=arcs.weights[by_source],
            )
        )

    def reweighted(self, acoustic_scale: float, word_penalty: float) -> "Lattice":
        """Acoustic costs times the scale, then the penalty on every word."""
        penalties = word_penalty * (self.arcs.outputs != NO_WORD)
        weights = np.stack(
            [self.arcs.weights[:, 0] + penalties, acoustic_scale * self.arcs.weights[:, 1]], axis=1
        )
        final = self.arcs.final * np.array([1, acoustic_scale], np.float32)
        return Lattice(replace(self.arcs, weights=weights.astype(np.float32), final=final))

    # -- paths ---------------------------------------------------------------------------------------------

    def nbest(self, n: int) -> list[WordPath]:
        """The n word sequences with the lowest costs, each once, at its best pronunciation and times.

        Every state keeps the n best word sequences that lead to it. That is exact: whatever is behind n others
        there stays behind them on any way to the end.
        """
        parents, words = [-1], [NO_WORD]  # word sequences as a tree: each is another and one more word
        longer: dict[tuple[int, int], int] = {}
        found: list[dict[int, tuple[float, float]]] = [{} for _ in range(self.arcs.num_states)]
        found[0][0] = (0.0, 0.0)
        ends: dict[int, tuple[float, float]] = {}
        for state, leaving in enumerate(self._leaving):
            entries = heapq.nsmallest(n, found[state].items(), key=lambda item: (sum(item[1]), item[0]))
            found[state] = {}
            final = self._final[state]
            for sequence, (graph, acoustic) in entries:
                for target, word, more_graph, more_acoustic in leaving:
                    after = sequence
                    if word != NO_WORD:
                        after = longer.setdefault((sequence, word), len(words))
                        if after == len(words):
                            parents.append(sequence)
                            words.append(word)
                    _keep_best(found[target], after, graph + more_graph, acoustic + more_acoustic)
                if final[0] < math.inf:
                    _keep_best(ends, sequence, graph + final[0], acoustic + final[1])
        best = heapq.nsmallest(n, ends.items(), key=lambda item: (sum(item[1]), item[0]))
        return [WordPath(_spell(sequence, parents, words), *costs) for sequence, costs in best]

    # -- posteriors ----------------------------------------------------------------------------------------

    @cached_property
    def _leaving(self) -> list[list[tuple[int, int, float, float]]]:
        """Of every state: (target, word, graph cost, acoustic cost) of its arcs."""
        arcs = self.arcs
        rows: list[list[tuple[int, int, float, float]]] = [[] for _ in range(arcs.num_states)]
        columns = (arcs.source, arcs.target, arcs.outputs, *arcs.weights.astype(np.float64).T)
        for source, *row in zip(*(column.tolist() for column in columns)):
            rows[source].append(tuple(row))
        return rows

    @cached_property
    def _final(self) -> list[list[float]]:
        rows: list[list[float]] = self.arcs.final.astype(np.float64).tolist()
        return rows

    @cached_property
    def _shares(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of every arc (A,) and of ending in every state (N,): the probability once in its source."""
        arcs = self.arcs
        costs = arcs.weights.astype(np.float64).sum(axis=1)
        ends = arcs.final.astype(np.float64).sum(axis=1)
        ahead = (-ends).tolist()  # log of the summed probability of all ways from here
        first = np.searchsorted(arcs.source, np.arange(arcs.num_states + 1)).tolist()
        targets, scores = arcs.target.tolist(), (-costs).tolist()
        for state in reversed(range(arcs.num_states)):
            ways = [
                ahead[state],
                *(scores[a] + ahead[targets[a]] for a in range(first[state], first[state + 1])),
            ]
            ahead[state] = _log_sum(ways)
        logs = np.array(ahead)
        at = np.where(np.isfinite(logs), logs, 0.0)  # a state without a way to the end: its shares are 0
        return np.exp(logs[arcs.target] - costs - at[arcs.source]), np.exp(-ends - at)

    @cached_property
    def frames(self) -> NDArray[np.int32]:
        """(N,) how many frames lie before each state."""
        frames = [0] * self.arcs.num_states
        arcs = self.arcs
        for source, target, label in zip(arcs.source.tolist(), arcs.target.tolist(), arcs.inputs.tolist()):
            frames[target] = frames[source] + (label != 0)
        return np.array(frames, np.int32)

    def last_words(self) -> list[dict[int, float]]:
        """Of every frame, and after the last: the probability of each word to be the last one written so far.

        Before the first word it is NO_WORD. Each sums to 1.
        """
        arcs, (shares, ends), frames = self.arcs, self._shares, self.frames
        reached: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(arcs.num_states)]
        reached[0][NO_WORD] = 1.0
        found: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(int(frames.max()) + 1)]
        rows = zip(
            arcs.source.tolist(), arcs.target.tolist(), arcs.inputs.tolist(), arcs.outputs.tolist(), shares
        )
        for source, target, label, word, share in rows:
            here = found[frames[source]] if label else None
            for last, probability in reached[source].items():
                after, more = word or last, probability * share
                reached[target][after] += more
                if here is not None:
                    here[after] += more
        for state in np.flatnonzero(ends):
            for word, probability in reached[state].items():
                found[-1][word] += probability * ends[state]
        return [dict(row) for row in found]

    def confidences(self, words: Sequence[int]) -> list[float]:
        """The posterior of each word of a word sequence, in [0, 1]: where on its best path it is the last word
        written, the highest share of paths that agree (C_max of Wessel, Schlüter, Macherey & Ney 2001,
        "Confidence measures for large vocabulary continuous speech recognition"). A sequence that is not in the
        lattice gets zeros.
        """
        spans = self._spans(tuple(words))
        if spans is None:
            return [0.0] * len(words)
        posteriors = self.last_words()
        return [
            min(1.0, max(float(row.get(word, 0.0)) for row in posteriors[begin : end + 1]))
            for word, (begin, end) in zip(words, spans)
        ]

    def _spans(self, words: tuple[int, ...]) -> list[tuple[int, int]] | None:
        """Of each word: the first and the last frame at which it is the last one written, on the best path."""
        best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{} for _ in range(self.arcs.num_states)]
        best[0][0] = (0.0, ())  # number of words so far: cost, frame of each
        end: tuple[float, tuple[int, ...]] = (math.inf, ())
        for state, leaving in enumerate(self._leaving):
            frame = int(self.frames[state])
            for count, (cost, starts) in best[state].items():
                if count == len(words):
                    end = min(end, (cost + sum(self._final[state]), starts))
                for target, word, graph, acoustic in leaving:
                    if word != NO_WORD and (count == len(words) or words[count] != word):
                        continue
                    entry = (cost + graph + acoustic, (*starts, frame) if word != NO_WORD else starts)
                    after = count + (word != NO_WORD)
                    if after not in best[target] or entry < best[target][after]:
                        best[target][after] = entry
            best[state] = {}
        if end[0] == math.inf:
            return None
        stops = [max(start, following - 1) for start, following in zip(end[1], end[1][1:])]
        return list(zip(end[1], [*stops, int(self.frames.max())]))

    # -- files ---------------------------------------------------------------------------------------------

    def to_text(self, utterance_id: str) -> str:
        arcs = self.arcs
        columns = (arcs.source, arcs.target, arcs.inputs, arcs.outputs, *arcs.weights.T)
        first = np.searchsorted(arcs.source, np.arange(arcs.num_states + 1)).tolist()
        rows = ["{}\t{}\t{}\t{}\t{:.7g},{:.7g}".format(*row) for row in zip(*(c.tolist() for c in columns))]
        lines = [utterance_id]
        for state, final in enumerate(arcs.final.tolist()):
            lines += rows[first[state] : first[state + 1]]
            if final[0] < math.inf:
                lines.append("{}\t{:.7g},{:.7g}".format(state, *final))
        return "\n".join([*lines, "", ""])


def write_lattices(path: Path, texts: Iterable[str]) -> None:
    """Lattices as text, one after the other, compressed if the path ends in .gz; whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                packed.writelines(text.encode("utf-8") for text in texts)
        else:
            file.writelines(text.encode("utf-8") for text in texts)
    temporary.replace(path)


def read_lattices(path: Path) -> Iterator[tuple[str, Lattice]]:
    """(utterance id, lattice) of a file in Kaldi's text format, compressed or not.

    For users of what `evaluate` leaves in lattices/: reweight them, take other n-best lists, confidences. Word ids are
    those of words.txt beside them. Raises ValueError naming the utterance for a line that cannot be read.
    """
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        utterance, lines = "", list[str]()
        for line in file:
            if not line.strip() and utterance:
                yield utterance, _parse(utterance, lines)
                utterance, lines = "", []
            elif not utterance:
                utterance = line.strip()
            else:
                lines.append(line)
        if utterance:
            raise ValueError(
                f"{path}: utterance {utterance} ends without an empty line: the file is cut short"
            )


def _parse(utterance: str, lines: Sequence[str]) -> Lattice:
    rows: _Rows = []
    finals: dict[int, tuple[float, float]] = {}
    for line in lines:
        fields = line.split()
        try:
            if len(fields) <= 2:
                graph, acoustic = map(float, fields[1].split(",")) if len(fields) == 2 else (0.0, 0.0)
                finals[int(fields[0])] = (graph, acoustic)
            else:
                graph, acoustic = map(float, fields[4].split(","))
                rows.append((*map(int, fields[:4]), graph, acoustic))  # type: ignore[arg-type]
        except (ValueError, IndexError):
            raise ValueError(f"lattice of utterance {utterance}: cannot read {line.strip()!r}") from None
    num_states = 1 + max([*finals, *(row[0] for row in rows), *(row[1] for row in rows)], default=0)
    final = np.full((num_states, 2), np.inf, np.float32)
    for state, costs in finals.items():
        final[state] = costs
    table = np.array(sorted(rows, key=lambda row: row[0]), dtype=np.float64).reshape(-1, 6)
    source, target, inputs, outputs = table[:, :4].astype(np.int32).T
    start = rows[0][0] if rows else 0
    return Lattice.of(Arcs(start, final, source, target, inputs, outputs, table[:, 4:].astype(np.float32)))


def _topological_order(arcs: Arcs) -> list[int]:
    """Every state after all that lead to it, the start first."""
    missing = np.bincount(arcs.target, minlength=arcs.num_states).tolist()
    first = np.searchsorted(arcs.source, np.arange(arcs.num_states + 1)).tolist()
    targets = arcs.target.tolist()
    free = [state for state in range(arcs.num_states) if not missing[state] and state != arcs.start]
    order, free = [], [*free, arcs.start]
    while free:
        state = free.pop()
        order.append(state)
        for arc in range(first[state], first[state + 1]):
            missing[targets[arc]] -= 1
            if not missing[targets[arc]]:
                free.append(targets[arc])
    if len(order) < arcs.num_states or np.any(arcs.target == arcs.start):
        raise ValueError("the lattice has a circle")
    return order


def _keep_best(entries: dict[int, tuple[float, float]], key: int, graph: float, acoustic: float) -> None:
    known = entries.get(key)
    if known is None or graph + acoustic < known[0] + known[1]:
        entries[key] = (graph, acoustic)


def _spell(sequence: int, parents: Sequence[int], words: Sequence[int]) -> tuple[int, ...]:
    spelled: list[int] = []
    while sequence:
        spelled.append(words[sequence])
        sequence = parents[sequence]
    return tuple(reversed(spelled))


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in values))
