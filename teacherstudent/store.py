"""The target store: the teacher's highest posteriors of every frame, shard by shard.

Shard i of the unlabelled cuts gives targets.00000i.h5, in the same order: training reads the two side by side
and looks nothing up. docs/store.md describes the file.
"""
# T frames, S senones, K kept

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacherstudent.data.features import FRAME_RULE, FRAME_SHIFT_SECONDS
from teacherstudent.data.packed import PackedShard, PackedWriter, shard_number
from teacherstudent.posteriors import TopK, top_k
from teacherstudent.targets.catalogue import build_catalogue, find_shards
from teacherstudent.targets.codings import CODINGS
from teacherstudent.targets.shard_folder import CACHE_BYTES, ShardFolder
from teacherstudent.targets.target_codec import Decoded
from teacherstudent.targets.target_shard import (
    STORE_VERSION,
    Sibling,
    check_header,
    decode_utterance,
    find_damages,
    iter_batches,
    iter_decoded,
    sibling_of,
)

STEM = "targets"
_OPEN_SHARDS = 32  # files, and lists of ids, held at a time
_KEPT = (1, 5, 10, 20)  # `info` says how much probability so many senones keep

Targets = tuple[NDArray[np.int32], NDArray[np.float32]]


class TargetWriter:
    """Writes the targets of one shard; a context manager. The file appears when the block ends without error, and
    its SHA-256 beside it.

    `provenance` says what the targets belong to (names and texts or numbers, such as the hashes of teacher,
    inventory and features, the numeric mode and the batch settings); readers refuse a store whose provenance is
    another one.
    """

    def __init__(
        self,
        path: Path | str,
        num_senones: int,
        k: int = 20,
        provenance: Mapping[str, str | int | float] | None = None,
        coding: str = "compact",
    ) -> None:
        if not 1 <= k <= num_senones:
            raise ValueError(f"got k = {k} of {num_senones} senones: choose k between 1 and {num_senones}")
        if coding not in CODINGS:
            raise ValueError(f"got coding {coding!r}: there are {', '.join(CODINGS)}")
        self.num_senones = num_senones
        self.k = k
        self._coding = CODINGS[coding]
        header = {
            "store_version": STORE_VERSION,
            "shard": shard_number(path),
            "num_senones": num_senones,
            "k": k,
            "coding": {"name": coding, **self._coding.facts},
            "frames": {"shift_seconds": FRAME_SHIFT_SECONDS, "rule": FRAME_RULE},
            "provenance": dict(provenance or {}),
        }
        layout = self._coding.layout(k, num_senones)
        self._writer = PackedWriter(path, header, layout, self._coding.block_rows, hashed=True)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write(self, utterance_id: str, logits: Tensor) -> None:
        """Keep the k highest posteriors of logits (T, S).

        Raises ValueError naming the utterance for another S, for NaN or +inf, and for an id already written.
        """
        where = self._where(utterance_id)
        if logits.ndim != 2 or logits.shape[1] != self.num_senones:
            raise ValueError(
                f"{where}: got logits {tuple(logits.shape)}, need (frames, {self.num_senones} senones)"
            )
        try:
            best = top_k(logits, self.k)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        self.write_best(utterance_id, best)

    def write_best(self, utterance_id: str, best: TopK) -> None:
        """The same, of logits whose k highest posteriors were found already."""
        if best.ids.ndim != 2 or best.ids.shape[1] != self.k:
            got = tuple(best.ids.shape)
            raise ValueError(f"{self._where(utterance_id)}: got senones {got}, need (frames, {self.k})")
        self._writer.write(utterance_id, **self._coding.encode(best, self.num_senones))

    def _where(self, utterance_id: str) -> str:
        return f"{self._writer.path}: utterance {utterance_id!r}"


class TargetStore:
    """All shards of a folder or fsspec URL: by utterance id, or shard by shard in order.

    `expect` names what the store must belong to: provenance, num_senones or k. A shard of which it is not
    true is refused, as is one whose header differs from that of shard 0. Shards are opened when first used,
    at most 32 at a time. May be pickled, and used in forked processes.

    A URL's shards are kept in `cache_folder` (by default ~/.cache/teacherstudent), `cache_bytes` of them; a store
    of more than 32 shards keeps the catalogue there that finds an utterance (catalogue.py).
    """

    def __init__(
        self,
        folder: Path | str,
        expect: Mapping[str, Any] | None = None,
        cache_folder: Path | str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.folder = folder
        self.expect = dict(expect or {})
        self._cache = (cache_folder, cache_bytes)
        self._shards = ShardFolder(folder, STEM, cache_folder, cache_bytes)
        self._open: OrderedDict[int, PackedShard] = OrderedDict()
        self._catalogue: Path | None = None
        self._first: Sibling | None = None
        self._first = sibling_of(self._shard(0))
        self.header = self._first.header

    def __reduce__(self) -> tuple[type["TargetStore"], tuple[Any, ...]]:
        return type(self), (self.folder, self.expect, *self._cache)

    def __getitem__(self, utterance_id: str) -> Targets:
        """ids (T, K) int32 and log-posteriors (T, K) float32, renormalised, the highest first."""
        return self.read(self.find(utterance_id), utterance_id)

    def dropped(self, utterance_id: str) -> NDArray[np.float32]:
        """(T,) the probability that was not kept."""
        return self.decode(self.find(utterance_id), utterance_id).dropped

    @property
    def num_shards(self) -> int:
        return self._shards.num_shards

    def shard_name(self, number: int) -> str:
        return self._shards.name(number)

    def shard_ids(self, number: int) -> tuple[str, ...]:
        """The utterances of a shard, in its order."""
        return self._shard(number).ids

    def read(self, number: int, utterance_id: str) -> Targets:
        """As `store[utterance_id]`, where the shard is known: nothing is looked for."""
        return self.decode(number, utterance_id)[:2]

    def decode(self, number: int, utterance_id: str) -> Decoded:
        """All that is stored of an utterance of a shard."""
        return decode_utterance(self._shard(number), utterance_id)

    def iter_shard(self, number: int) -> Iterator[tuple[str, NDArray[np.int32], NDArray[np.float32]]]:
        """Utterance id, ids (T, K) and log-posteriors (T, K) of each utterance of a shard, in order."""
        for names, decoded, frames in iter_batches(self._shard(number)):
            for name, start, stop in zip(names, frames, frames[1:]):
                yield name, decoded.ids[start:stop], decoded.log_posteriors[start:stop]

    def iter_decoded(self, number: int) -> Iterator[tuple[str, Decoded]]:
        """All that is stored of each utterance of a shard, in order."""
        return iter_decoded(self._shard(number))

    def find(self, utterance_id: str) -> int:
        """The shard that has an utterance; KeyError if there is none."""
        for number in reversed(self._open):
            if utterance_id in self._open[number]:
                return number
        for number in self._candidates(utterance_id):
            if utterance_id in self._shard(number):
                return number
        raise KeyError(f"{self.folder} has no targets for utterance {utterance_id!r}")

    def verify(self) -> None:
        """Read every byte; raises one ValueError that lists every damage by shard and utterances."""
        while self._open:  # else HDF5 would go on with what it knows of an open file
            self._open.popitem()[1].close()
        _raise_damages(find_damages(self._shards, self.expect))

    def _candidates(self, utterance_id: str) -> list[int]:
        """Shards that may have an utterance: few shards are all asked, for many there is a catalogue."""
        if self.num_shards <= _OPEN_SHARDS:
            return list(range(self.num_shards))
        if self._catalogue is None:
            name = f"catalogue.{self._shards.signature()[:32]}.sqlite"
            self._catalogue = self._shards.cache_folder / name
        if not self._catalogue.exists():
            build_catalogue(self._catalogue, map(self._shards.ids, range(self.num_shards)))
        return find_shards(self._catalogue, utterance_id)

    def _shard(self, number: int) -> PackedShard:
        """Shard `number`, checked when opened; beyond the limit the least recently used one is closed."""
        if number not in self._open:
            shard = self._shards.open(number)
            check_header(shard, number, self.expect, self._first)
            self._open[number] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def info(self, num_shards: int | None = None) -> "StoreInfo":
        """Sizes and means of the first shards, by default of all; reads every frame of them."""
        numbers = range(self.num_shards)[:num_shards]
        counts = [k for k in _KEPT if k < self.header["k"]] + [self.header["k"]]
        kept, entropy = np.zeros(len(counts)), np.zeros(len(counts))
        num_utterances = num_frames = num_bytes = 0
        for number in numbers:
            num_bytes += self._shards.num_bytes(number)
            for _, decoded in self.iter_decoded(number):
                posteriors = np.exp(decoded.log_posteriors.astype(np.float64))
                mass = posteriors.cumsum(axis=1)[:, [k - 1 for k in counts]]
                kept += ((1 - decoded.dropped[:, None]) * mass).sum(axis=0)
                entropy += [_entropy(posteriors[:, :k]) for k in counts]
                num_utterances += 1
                num_frames += len(posteriors)
        frames = max(num_frames, 1)
        return StoreInfo(
            num_shards=len(numbers),
            num_utterances=num_utterances,
            num_frames=num_frames,
            hours=num_frames * self.header["frames"]["shift_seconds"] / 3600,
            bytes_per_frame=num_bytes / frames,
            kept=dict(zip(counts, (kept / frames).tolist(), strict=True)),
            entropy_nats=dict(zip(counts, (entropy / frames).tolist(), strict=True)),
        )


def verify(folder: Path | str, expect: Mapping[str, Any] | None = None) -> None:
    """As TargetStore(folder, expect).verify(), of a store that may be too damaged to be opened, too."""
    _raise_damages(find_damages(ShardFolder(folder, STEM), expect or {}))


def _raise_damages(damages: list[str]) -> None:
    if damages:
        raise ValueError("\n".join(damages))


@dataclass(frozen=True)
class StoreInfo:
    """Sizes and means of a store. For the k highest senones of a frame, by k: the probability that they have
    together, and the entropy of their renormalised posteriors.
    """

    num_shards: int
    num_utterances: int
    num_frames: int
    hours: float
    bytes_per_frame: float
    kept: dict[int, float]
    entropy_nats: dict[int, float]


def _entropy(posteriors: NDArray[np.float64]) -> float:
    """Summed over frames, of posteriors (T, K) once they are renormalised; 0 log 0 is 0."""
    shares = posteriors / posteriors.sum(axis=1, keepdims=True)
    return -float((shares * np.log(np.where(shares > 0, shares, 1))).sum())
