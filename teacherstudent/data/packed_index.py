"""All of a packed shard but its frames: header, utterance ids, frame counts and checksums.

Used by packed.py alone. Each size is known to be right before anything of that size is read.
"""
# N utterances

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

FORMAT = "teacherstudent packed arrays"
VERSION = 1
_HEADER_BYTES = 1 << 20  # no header is longer


@dataclass(frozen=True)
class Layout:
    """What one frame of an array is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def frame_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Index:
    header: dict[str, Any]  # of the writer's user
    layouts: dict[str, Layout]  # by array, sorted by name
    block_frames: int
    ids: tuple[str, ...]
    num_frames: NDArray[np.uint32]  # (N,)
    checksums: dict[str, NDArray[np.uint32]]  # by array, one per block

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(N + 1,) the first frame of each utterance, and the number of all frames."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.num_frames, dtype=np.int64)])

    @cached_property
    def positions(self) -> dict[str, int]:
        return {utterance_id: position for position, utterance_id in enumerate(self.ids)}

    def describe_block(self, block: int) -> str:
        """The utterances that have frames in a block."""
        start = block * self.block_frames
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, start + self.block_frames, side="left")) - 1
        last = min(last, len(self.ids) - 1)
        if first == last:
            return f"utterance {self.ids[first]!r}"
        return f"utterances {self.ids[first]!r} … {self.ids[last]!r}"


def write_index(file: h5py.File, index: Index) -> None:
    """Close a shard whose frames are written."""
    ids = "\n".join(index.ids).encode()
    header = {
        "format": FORMAT,
        "version": VERSION,
        "block_frames": index.block_frames,
        "num_utterances": len(index.ids),
        "num_frames": int(index.offsets[-1]),
        "num_id_bytes": len(ids),
        "arrays": {name: [layout.dtype.str, list(layout.shape)] for name, layout in index.layouts.items()},
        "header": index.header,
    }
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    if len(text) > _HEADER_BYTES:
        raise ValueError(f"{file.filename}: got a header of {len(text)} bytes, at most {_HEADER_BYTES} fit")
    datasets = {
        "header": np.frombuffer(text, dtype="u1"),
        "ids": np.frombuffer(ids, dtype="u1"),
        "num_frames": index.num_frames,
        **{f"checksums/{name}": values for name, values in index.checksums.items()},
        "seal": _seal(text, ids, index.num_frames, index.checksums),
    }
    for name, values in datasets.items():
        file.create_dataset(name, data=values, track_times=False)


def read_index(file: h5py.File, path: Path) -> Index:
    """Read and check; raises ValueError naming the file and what in it is damaged."""
    with naming(path):
        header, text, seal = _read_header(file, path)
        layouts = {
            name: Layout(np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in header["arrays"].items()
        }
        ids = _read_all(file, path, "ids", "|u1", header["num_id_bytes"]).tobytes()
        counts = _read_all(file, path, "num_frames", "<u4", header["num_utterances"])
        num_blocks = -(-header["num_frames"] // header["block_frames"])
        checksums = {name: _read_all(file, path, f"checksums/{name}", "<u4", num_blocks) for name in layouts}
        same = bool((_seal(text, ids, counts, checksums) == seal).all())
        _need(path, "index", same, "the checksum of ids, frame counts and block checksums differs")
        for name, layout in layouts.items():
            _check_dataset(file, path, f"arrays/{name}", layout, header["num_frames"])
    names = tuple(ids.decode().split("\n")) if counts.size else ()
    index = Index(header["header"], layouts, header["block_frames"], names, counts, checksums)
    _need(path, "index", len(index.positions) == len(counts), "ids and frame counts differ in number")
    _need(path, "index", int(index.offsets[-1]) == header["num_frames"], "the frame counts do not add up")
    return index


def block_checksums(values: NDArray[Any], block_frames: int) -> list[int]:
    """The CRC-32 of each block of frames; `values` begins with a block."""
    data = values.data
    return [zlib.crc32(data[start : start + block_frames]) for start in range(0, len(values), block_frames)]


_WRITERS = {"features": "prepare", "phones": "align", "labels": "senones", "targets": "label"}


def writer_of(name: str) -> str:
    """The command that writes shards of this name."""
    step = _WRITERS.get(name.split(".")[0])
    return f"`teacherstudent {step} CONF`" if step else "the step that writes it"


def remedy(path: Path) -> str:
    return f"Delete the file and run {writer_of(path.name)}: it makes what is missing"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what h5py raises about a damaged file into a ValueError that names it; not so that there is none."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or not a shard: {error}. {remedy(path)}") from error


def _read_header(file: h5py.File, path: Path) -> tuple[dict[str, Any], bytes, NDArray[Any]]:
    num_bytes = file["header"].size
    _need(path, "header", 2 <= num_bytes <= _HEADER_BYTES, f"it has {num_bytes} bytes")
    seal = _read_all(file, path, "seal", "<u4", 2)
    text = _read_all(file, path, "header", "|u1", num_bytes).tobytes()
    _need(path, "header", zlib.crc32(text) == seal[0], "its checksum differs")
    header = json.loads(text)
    if header["format"] != FORMAT or header["version"] != VERSION:
        got = f"{header['format']!r} version {header['version']!r}"
        raise ValueError(f"{path}: got {got}, this reader knows {FORMAT!r} version {VERSION}")
    return header, text, seal


def _read_all(file: h5py.File, path: Path, name: str, dtype: str, size: int) -> NDArray[Any]:
    """A whole one-dimensional dataset, of the type and size it must have and no larger than the file."""
    _check_dataset(file, path, name, Layout(np.dtype(dtype), ()), size)
    values: NDArray[Any] = file[name][()]
    return values


def _check_dataset(file: h5py.File, path: Path, name: str, layout: Layout, size: int) -> None:
    dataset = file[name]
    _need(path, name, isinstance(dataset, h5py.Dataset), "it is not a dataset")
    got, needed = (dataset.dtype, dataset.shape), (layout.dtype, (size, *layout.shape))
    _need(path, name, got == needed, f"got type and shape {got}, need {needed}")
    fits = size * layout.frame_bytes <= file.id.get_filesize()
    _need(path, name, fits, "it would be larger than the file")


def _need(path: Path, name: str, right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{path}: {name!r} is damaged: {what}. {remedy(path)}")


def _seal(
    text: bytes, ids: bytes, counts: NDArray[Any], checksums: Mapping[str, NDArray[Any]]
) -> NDArray[np.uint32]:
    """(2,) the checksum of the header, and that of ids, frame counts and block checksums, end to end."""
    rest = zlib.crc32(counts.tobytes(), zlib.crc32(ids))
    for name in sorted(checksums):
        rest = zlib.crc32(checksums[name].tobytes(), rest)
    return np.array([zlib.crc32(text), rest], dtype="<u4")
