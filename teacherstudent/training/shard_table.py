"""What a source holds, shard by shard: how many utterances of which lengths, and not one of them by name.

A million hours are 360 million utterances in 100,000 shards; their ids and lengths alone would fill a machine. A row of
the table counts a shard's utterances in geometric bins of length: 50 megabytes for a million hours, mapped from a file
that all processes of a machine share. Into how many micro-batches some shards are dealt together follows from the sum
of their rows, so that any micro-batch of any epoch is found without opening a shard that does not hold it.

# N shards, L bins of length, W windows: groups of shards that are dealt together
"""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE = 16
_VERSION = 1  # of the file and of the rule of the bins
_LONGEST_FRAMES = 2**31  # two years of speech in one utterance
_BOUNDS = np.unique(np.exp2(np.arange(31 * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE).astype(np.int64))


class ShardTable:
    """(1 + N, 1 + L) uint32: a row a shard, of its frames and of its utterances by bin. Row 0 is about all shards: the
    version, and the longest utterance of each bin.

    May be pickled: one that was loaded is loaded again from its file.
    """

    def __init__(
        self,
        cells: NDArray[np.uint32],
        path: Path | None = None,
        changed: Mapping[int, NDArray[np.uint32]] | None = None,
    ) -> None:
        """changed: rows that differ from those at `path`, by shard; they are written into `cells`."""
        self._cells, self._path, self._changed = cells, path, dict(changed or {})
        for shard, row in self._changed.items():
            cells[1 + shard] = row
        self.num_utterances = self._counts.sum(axis=1, dtype=np.int64)  # (N,)
        self.total_frames = int(cells[1:, 0].sum(dtype=np.int64))

    def __reduce__(self) -> tuple[object, ...]:
        if self._path is None:
            return type(self), (self._cells,)
        return self.load, (self._path, self._changed)

    @property
    def _counts(self) -> NDArray[np.uint32]:
        return self._cells[1:, 1:]

    @property
    def num_shards(self) -> int:
        return len(self._cells) - 1

    @property
    def origin(self) -> str:
        """For messages: where it lies."""
        return str(self._path or "in memory")

    @classmethod
    def make(cls, shards: Iterable[NDArray[np.integer]]) -> Self:
        """Of the lengths in frames of each shard's utterances.

        Raises ValueError for a shard that is too large to be counted.
        """
        rows, longest = [], np.zeros(len(_BOUNDS), np.uint32)
        for number, lengths in enumerate(shards):
            if len(lengths) and int(np.sum(lengths, dtype=np.int64)) > _LONGEST_FRAMES:
                raise ValueError(
                    f"shard {number} has {int(np.sum(lengths, dtype=np.int64))} frames, a table counts up to "
                    f"{_LONGEST_FRAMES}: make more shards of the data"
                )
            rows.append(_make_row(lengths))
            np.maximum.at(longest, _find_bins(lengths), np.asarray(lengths, np.uint32))
        cells = np.zeros((1 + len(rows), max(map(len, rows), default=1)), np.uint32)
        cells[0, 0], cells[0, 1:] = _VERSION, longest[: cells.shape[1] - 1]
        for place, row in enumerate(rows, 1):
            cells[place, : len(row)] = row
        return cls(cells)

    @classmethod
    def load(cls, path: Path, changed: Mapping[int, NDArray[np.uint32]] | None = None) -> Self:
        """Raises ValueError for a file that is no table, or one of another version."""
        try:
            cells = np.asarray(np.load(path, mmap_mode="c"))  # what is changed is changed in memory alone
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}. Remove it, it is made anew") from None
        if cells.dtype != np.uint32 or cells.ndim != 2 or not cells.size or cells[0, 0] != _VERSION:
            raise ValueError(
                f"{path} is no table of shards of version {_VERSION}: remove it, it is made anew"
            )
        return cls(cells, path, changed)

    def save(self, path: Path) -> None:
        """Under another name first: a reader sees all of it or nothing."""
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with partial.open("wb") as file:
            np.save(file, self._cells)
        partial.replace(path)

    def replace(self, lengths: Mapping[int, NDArray[np.integer]], num_shards: int | None = None) -> Self:
        """A table in which some shards have utterances of other lengths, no longer than before; of the first
        `num_shards` if given.
        """
        width = self._cells.shape[1]
        changed = {shard: _make_row(new, width) for shard, new in lengths.items()}
        if num_shards is None and self._path is not None:
            return self.load(self._path, self._changed | changed)
        cells = np.array(self._cells if num_shards is None else self._cells[: 1 + num_shards])
        return type(self)(cells, changed=changed)

    def describes(self, shard: int, lengths: NDArray[np.integer]) -> bool:
        """Whether a shard's utterances are of these lengths, as far as can be told."""
        row = _make_row(lengths)
        known = self._cells[1 + shard]
        return len(row) <= len(known) and bool(
            (known[: len(row)] == row).all() and not known[len(row) :].any()
        )

    def batch_sizes(self, batch_frames: int) -> NDArray[np.int64]:
        """(L,) utterances in a micro-batch whose longest is in a bin: as many of its longest as fit, one at least.

        The bin's longest and not the utterance itself: this is what lets the table alone tell how many there are.
        """
        longest = np.maximum(1, self._cells[0, 1:].astype(np.int64))
        return np.maximum(1, batch_frames // longest)

    def find_sizes(self, lengths: NDArray[np.integer], batch_frames: int) -> NDArray[np.int64]:
        """The same for utterances of given lengths."""
        sizes: NDArray[np.int64] = self.batch_sizes(batch_frames)[_find_bins(lengths)]
        return sizes

    def count_batches(
        self, order: NDArray[np.integer], window_shards: int, batch_frames: int
    ) -> NDArray[np.int64]:
        """(W,) micro-batches of every `window_shards` successive shards of `order`, dealt longest utterance first.

        From bin to bin, for all windows at once: what the last micro-batch has room for goes there, the rest opens new
        ones, whose size is that of the bin.
        """
        sums = np.zeros((-(-len(order) // window_shards), self._cells.shape[1] - 1), np.int64)
        for place in range(window_shards):
            shards = order[place::window_shards]
            sums[: len(shards)] += self._counts[shards]
        batches, room = np.zeros(len(sums), np.int64), np.zeros(len(sums), np.int64)
        for count, size in zip(sums.T[::-1], self.batch_sizes(batch_frames)[::-1].tolist()):
            rest = np.maximum(count - room, 0)
            batches += -(-rest // size)
            room = np.where(rest > 0, -rest % size, room - count)
        return batches


def _find_bins(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """(N,) of utterances: the first bin whose bound is no shorter; one of no frames is counted with those of one."""
    return np.searchsorted(_BOUNDS, np.asarray(lengths, np.int64))


def _make_row(lengths: NDArray[np.integer], width: int = 1) -> NDArray[np.uint32]:
    """(1 + bins up to the longest,), of `width` at least: frames, then utterances by bin."""
    counts = np.bincount(_find_bins(lengths), minlength=width - 1)
    return np.concatenate([[np.sum(lengths, dtype=np.int64)], counts]).astype(np.uint32)
