"""Per-frame arrays of many utterances, end to end in one HDF5 file per shard.

Features, labels and targets are all kept in this way; docs/store.md describes the file byte for byte. There
is never a dataset per utterance: that makes look-ups slow and memory grow with the number of utterances. A
file is written under a temporary name, renamed when complete, and never changed afterwards.
"""
# N utterances, T frames

import json
import os
import re
import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from teacherstudent.data import packed_index
from teacherstudent.data.packed_index import Index, Layout, block_checksums, naming, read_index, write_index
from teacherstudent.files import hash_file, write_text
from teacherstudent.locks import create_locked, remove_abandoned

BLOCK_FRAMES = 256  # frames under one checksum, and in one HDF5 chunk
_BUFFER_BLOCKS = 16  # written, or read in order, at a time

_OPEN_FILES = 128  # at a time and thread, however many shards there are
_opened = threading.local()

Arrays = dict[str, NDArray[Any]]
Hold = Callable[[Path], AbstractContextManager[None]]


def shard_path(folder: Path | str, stem: str, number: int) -> Path:
    """folder/stem.000003.h5"""
    return Path(folder) / f"{stem}.{number:06d}.h5"


def shard_number(path: Path | str) -> int | None:
    """The number in a name such as targets.000003.h5; None when there is none."""
    match = re.search(r"\.(\d{6,})\.h5$", Path(path).name)
    return int(match[1]) if match else None


def hash_path(path: Path) -> Path:
    """Where the SHA-256 of a whole shard lies, in a line that `sha256sum --check` reads."""
    return path.with_name(f"{path.name}.sha256")


def hash_line(path: Path, digest: str) -> str:
    return f"{digest}  {path.name}\n"


def count_shards(names: Iterable[str], folder: Path | str, stem: str) -> int:
    """How many shards stem.000000.h5, … are among the names of a folder's files. ValueError if one is missing."""
    numbers = (shard_number(name) for name in names if name.startswith(f"{stem}."))
    found = {number for number in numbers if number is not None}
    inside = Path(folder, stem)
    if not found and inside.is_dir():
        raise ValueError(f"{folder} holds no {stem}.*.h5; did you mean {inside}?")
    missing = sorted(set(range(max(found, default=0) + 1)) - found)
    if missing:
        what = f"shard {shard_path(folder, stem, missing[0]).name} is missing ({len(missing)} missing in all)"
        raise ValueError(
            f"{folder}: {what}. Run {packed_index.writer_of(stem)} again: it makes what is missing"
        )
    return len(found)


def open_shards(folder: Path | str, stem: str) -> list["PackedShard"]:
    """The shards of a folder, in order. Raises ValueError when there are none, or when a number is missing."""
    names = [path.name for path in Path(folder).glob(f"{stem}.*.h5")]
    return [
        PackedShard(shard_path(folder, stem, number)) for number in range(count_shards(names, folder, stem))
    ]


class PackedWriter:
    """Writes one shard; a context manager. The file appears, complete, when the block ends without error.

    `header` is anything JSON can hold; `arrays` gives each array's type and the shape of one frame:
    `PackedWriter(path, {"sampling_rate": 16000}, {"values": ("float16", (192,))})`.
    The bytes depend on what is written alone. `hashed` writes the file's SHA-256 beside it.
    """

    def __init__(
        self,
        path: Path | str,
        header: Mapping[str, Any],
        arrays: Mapping[str, tuple[DTypeLike, tuple[int, ...]]],
        block_frames: int = BLOCK_FRAMES,
        hashed: bool = False,
    ) -> None:
        if not arrays or block_frames < 1:
            raise ValueError(
                f"{path}: got {len(arrays)} arrays, {block_frames} frames a block; need 1 or more"
            )
        self.path = Path(path)
        self.num_frames = 0
        self._header = json.loads(json.dumps(dict(header), allow_nan=False))  # refuses what JSON cannot hold
        self._layouts = {
            name: Layout(np.dtype(dtype).newbyteorder("<"), tuple(shape))
            for name, (dtype, shape) in sorted(arrays.items())
        }
        self._block_frames = block_frames
        self._hashed = hashed
        self._frames_of: dict[str, int] = {}
        self._pending: dict[str, list[NDArray[Any]]] = {name: [] for name in self._layouts}
        self._num_written = 0
        self._checksums: dict[str, list[int]] = {name: [] for name in self._layouts}
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.partial")
        self._file: h5py.File | None = None
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.path.parent, f".{self.path.name}.*.partial")
        # The version's metadata carries checksums; the lock is our own, and lasts until the file has its name.
        self._lock = create_locked(self._partial)
        self._file = h5py.File(self._partial, "w", libver="v110", locking=False)
        for name, layout in self._layouts.items():
            self._file.create_dataset(
                f"arrays/{name}",
                shape=(0, *layout.shape),
                maxshape=(None, *layout.shape),
                chunks=(self._block_frames, *layout.shape),
                dtype=layout.dtype,
                track_times=False,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        assert self._lock is not None
        try:
            if error is None:
                self._flush(everything=True)
                write_index(self._file, self._make_index())
            self._file.close()
            if error is None:
                _synchronise(self._partial)
                if self._hashed:  # first: a shard that is there is not written again
                    write_text(hash_path(self.path), hash_line(self.path, hash_file(self._partial)))
                os.replace(self._partial, self.path)
        finally:
            self._file.close()
            self._file = None
            self._partial.unlink(missing_ok=True)
            self._lock.close()

    def write(self, utterance_id: str, **arrays: ArrayLike) -> None:
        """Append an utterance: every array (T, …), all of the same T ≥ 0.

        Raises ValueError, naming the utterance, for an id that is empty, repeated or holds a line break, for
        arrays missing or unknown, of another shape, or of a type that the declared one cannot hold.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: write inside of the writer's `with` block")
        where = f"{self.path}: utterance {utterance_id!r}"
        if not utterance_id or "\n" in utterance_id:
            raise ValueError(f"{where}: an id must not be empty nor hold a line break")
        if utterance_id in self._frames_of:
            raise ValueError(f"{where} was written already: ids must be unique")
        if set(arrays) != set(self._layouts):
            raise ValueError(f"{where}: got arrays {sorted(arrays)}, need {sorted(self._layouts)}")
        checked = {name: self._as_declared(name, value, where) for name, value in arrays.items()}
        lengths = {name: len(value) for name, value in checked.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{where}: got {lengths} frames: all arrays must have the same number")
        length = next(iter(lengths.values()))
        for name, value in checked.items():
            self._pending[name].append(value)
        self._frames_of[utterance_id] = length
        self.num_frames += length
        if self.num_frames - self._num_written >= _BUFFER_BLOCKS * self._block_frames:
            self._flush()

    def _as_declared(self, name: str, value: ArrayLike, where: str) -> NDArray[Any]:
        layout = self._layouts[name]
        got = np.asarray(value)
        if got.ndim == 0 or got.shape[1:] != layout.shape:
            needed = ", ".join(["frames", *map(str, layout.shape)])
            raise ValueError(f"{where}: {name!r} has shape {got.shape}, need ({needed})")
        if not np.can_cast(got.dtype, layout.dtype, "safe"):
            raise ValueError(
                f"{where}: {name!r} is {got.dtype}, which {layout.dtype} cannot hold: convert it"
            )
        return np.array(got, dtype=layout.dtype, order="C")  # a copy: the caller may reuse its own

    def _flush(self, everything: bool = False) -> None:
        """Write the pending whole blocks, and the last, partial one when that is everything."""
        assert self._file is not None
        stop = self.num_frames
        if not everything:
            stop -= stop % self._block_frames
        size = stop - self._num_written
        for name, pending in self._pending.items():
            if not size:
                break
            values = pending[0] if len(pending) == 1 else np.concatenate(pending)
            dataset = self._file[f"arrays/{name}"]
            dataset.resize(stop, axis=0)
            dataset[self._num_written : stop] = values[:size]
            self._checksums[name] += block_checksums(values[:size], self._block_frames)
            self._pending[name] = [values[size:].copy()]
        self._num_written = stop

    def _make_index(self) -> Index:
        counts = np.array(list(self._frames_of.values()), dtype="<u4")
        checksums = {name: np.array(values, dtype="<u4") for name, values in self._checksums.items()}
        ids = tuple(self._frames_of)
        return Index(self._header, self._layouts, self._block_frames, ids, counts, checksums)


class PackedShard:
    """Reads one shard, by utterance or in order; every byte is checked before it is handed out.

    Opened when first used, and again after a fork; may be pickled (it is reopened by path). Everything raised
    about the file is a ValueError that names it, and the utterance where there is one. `hold`, if given, is called
    with the path to open the file: it brings it there, and keeps it for as long as its context lasts.
    """

    def __init__(self, path: Path | str, hold: Hold | None = None) -> None:
        self.path = Path(path)
        self._hold = hold
        self._file: h5py.File | None = None
        self._datasets: dict[str, h5py.Dataset] = {}
        self._process_id = -1
        self._loaded: Index | None = None

    def __reduce__(self) -> tuple[type["PackedShard"], tuple[Path, Hold | None]]:
        return type(self), (self.path, self._hold)

    def __repr__(self) -> str:
        return f"PackedShard({str(self.path)!r})"

    def close(self) -> None:
        """Close the file and forget its ids; the next use opens it again."""
        self._close_file()
        self._loaded = None

    def _close_file(self) -> None:
        if self._file is not None and self._process_id == os.getpid():
            self._file.close()
        self._datasets.clear()
        self._file = None

    @property
    def header(self) -> dict[str, Any]:
        """What the writer was given."""
        return self._index.header

    @property
    def ids(self) -> tuple[str, ...]:
        """Utterance ids, in the order in which they were written."""
        return self._index.ids

    @property
    def num_frames(self) -> NDArray[np.uint32]:
        """(N,) frames of each utterance."""
        return self._index.num_frames

    @property
    def arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type, and shape of one frame, by name."""
        return {name: (layout.dtype, layout.shape) for name, layout in self._index.layouts.items()}

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, utterance_id: object) -> bool:
        return utterance_id in self._index.positions

    def __getitem__(self, utterance_id: str) -> Arrays:
        """The arrays of one utterance, by name, each (T, …)."""
        position = self._index.positions.get(utterance_id)
        if position is None:
            raise KeyError(f"{self.path} has no utterance {utterance_id!r}")
        return self._read(position, position + 1)

    def __iter__(self) -> Iterator[tuple[str, Arrays]]:
        """Utterance ids with their arrays, in order; many blocks are read at a time.

        The arrays of neighbouring utterances are parts of one larger one: copy what is kept for long.
        """
        for ids, offsets, arrays in self.iter_batches():
            for utterance_id, start, stop in zip(ids, offsets[:-1].tolist(), offsets[1:].tolist()):
                yield utterance_id, {name: values[start:stop] for name, values in arrays.items()}

    def iter_batches(
        self, num_blocks: int = _BUFFER_BLOCKS
    ) -> Iterator[tuple[tuple[str, ...], NDArray[np.int64], Arrays]]:
        """Of many neighbouring utterances at a time, in order: ids (n), offsets (n + 1), arrays end to end."""
        index = self._index
        first = 0
        while first < len(index.ids):
            limit = int(index.offsets[first]) + num_blocks * index.block_frames
            last = max(int(np.searchsorted(index.offsets, limit, side="right")) - 1, first + 1)
            offsets = index.offsets[first : last + 1] - index.offsets[first]
            yield index.ids[first:last], offsets, self._read(first, last)
            first = last

    def verify(self) -> None:
        """Read everything; raises one ValueError that lists every damaged block and its utterances."""
        index = self._index
        total = int(index.offsets[-1])
        damages: list[str] = []
        for start in range(0, total, index.block_frames):
            for name in index.layouts:
                try:
                    self._read_blocks(name, start, min(start + index.block_frames, total))
                except ValueError as error:
                    damages.append(str(error))
        if damages:
            raise ValueError("\n".join(damages))

    @property
    def _index(self) -> Index:
        if self._loaded is None:
            self._loaded = read_index(self._open(), self.path)
        return self._loaded

    def _open(self) -> h5py.File:
        if self._file is None or self._process_id != os.getpid():
            self._datasets.clear()
            self._file = self._open_file()
            self._process_id = os.getpid()
        self._close_the_oldest()
        return self._file

    def _open_file(self) -> h5py.File:
        try:
            with self._hold(self.path) if self._hold else nullcontext(), naming(self.path):
                return h5py.File(self.path, "r", rdcc_nbytes=0)  # whole blocks are read: no use keeping them
        except FileNotFoundError as error:
            what = f"no such shard. Run {packed_index.writer_of(self.path.name)}"
            raise ValueError(f"{self.path}: {what}") from error

    def _close_the_oldest(self) -> None:
        """Of this thread's shards, where there are too many; it is opened again when it is used again.

        So neither files nor ids of a whole corpus are held.
        """
        if not hasattr(_opened, "shards"):
            _opened.shards = OrderedDict()
        _opened.shards[id(self)] = weakref.ref(self)  # one that nobody uses any more closes by itself
        _opened.shards.move_to_end(id(self))
        while len(_opened.shards) > _OPEN_FILES:
            oldest = _opened.shards.popitem(last=False)[1]()
            if oldest is not None:
                oldest.close()

    def _dataset(self, name: str) -> h5py.Dataset:
        file = self._open()
        if name not in self._datasets:
            self._datasets[name] = file[f"arrays/{name}"]
        return self._datasets[name]

    def _read(self, first: int, last: int) -> Arrays:
        """The frames of utterances first … last - 1."""
        index = self._index
        start, stop = int(index.offsets[first]), int(index.offsets[last])
        aligned = start - start % index.block_frames
        end = min(-(-stop // index.block_frames) * index.block_frames, int(index.offsets[-1]))
        return {
            name: self._read_blocks(name, aligned, end)[start - aligned : stop - aligned]
            for name in index.layouts
        }

    def _read_blocks(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Frames start … stop - 1, where start opens a block and stop closes one; checked."""
        index = self._index
        with naming(self.path):
            values: NDArray[Any] = self._dataset(name)[start:stop]
        got = block_checksums(values, index.block_frames)
        first = start // index.block_frames
        needed = index.checksums[name][first : first + len(got)].tolist()
        for block, (checksum, right) in enumerate(zip(got, needed, strict=True), first):
            if checksum != right:
                where = f"{self.path}: {index.describe_block(block)}"
                raise ValueError(
                    f"{where}: block {block} of {name!r} is damaged. {packed_index.remedy(self.path)}"
                )
        return values


def _synchronise(path: Path) -> None:
    """Make sure that the bytes are on the disk before the name says that they are."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
