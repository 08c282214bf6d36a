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
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from teacherstudent.data.features import FRAME_RULE, FRAME_SHIFT_SECONDS
from teacherstudent.data.packed import Arrays, PackedShard, PackedWriter, open_shards, shard_number
from teacherstudent.posteriors import renormalise, top_k

STORE_VERSION = 1
STEM = "targets"
_OPEN_SHARDS = 64  # files, and lists of ids, held at a time
_KEPT = (1, 5, 10, 20)  # `info` says how much probability so many senones keep

Targets = tuple[NDArray[np.int32], NDArray[np.float32]]


class TargetWriter:
    """Writes the targets of one shard; a context manager. The file appears when the block ends without error.

    `provenance` says what the targets belong to (names and texts or numbers, such as the hashes of teacher,
    inventory and features, and the numeric mode); readers refuse a store whose provenance is another one.
    """

    def __init__(
        self,
        path: Path | str,
        num_senones: int,
        k: int = 20,
        provenance: Mapping[str, str | int | float] | None = None,
    ) -> None:
        if not 1 <= k <= num_senones:
            raise ValueError(f"got k = {k} of {num_senones} senones: choose k between 1 and {num_senones}")
        self.num_senones = num_senones
        self.k = k
        self._id_dtype = np.dtype("uint16" if num_senones <= 1 << 16 else "uint32")
        header = {
            "store_version": STORE_VERSION,
            "shard": shard_number(path),
            "num_senones": num_senones,
            "k": k,
            "coding": _coding(self._id_dtype),
            "frames": {"shift_seconds": FRAME_SHIFT_SECONDS, "rule": FRAME_RULE},
            "provenance": dict(provenance or {}),
        }
        arrays: dict[str, tuple[DTypeLike, tuple[int, ...]]] = {
            "ids": (self._id_dtype, (k,)),
            "log_posteriors": ("float16", (k,)),
            "dropped": ("float16", ()),
        }
        self._writer = PackedWriter(path, header, arrays)

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
        where = f"{self._writer.path}: utterance {utterance_id!r}"
        if logits.ndim != 2 or logits.shape[1] != self.num_senones:
            raise ValueError(
                f"{where}: got logits {tuple(logits.shape)}, need (frames, {self.num_senones} senones)"
            )
        try:
            best = top_k(logits, self.k)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        with np.errstate(over="ignore"):  # below -65504, where e to the power of it is 0, becomes -inf
            self._writer.write(
                utterance_id,
                ids=best.ids.cpu().numpy().astype(self._id_dtype),
                log_posteriors=best.log_posteriors.cpu().numpy().astype("float16"),
                dropped=best.dropped.cpu().numpy().astype("float16"),
            )


class TargetStore:
    """All shards of a folder: by utterance id, or shard by shard in order.

    `expect` names what the store must belong to: provenance, num_senones or k. A shard of which it is not
    true is refused, as is one whose header differs from that of shard 0. Shards are opened when first used,
    at most 64 at a time. May be pickled.
    """

    def __init__(self, folder: Path | str, expect: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.expect = dict(expect or {})
        self.shards: tuple[Path, ...] = tuple(shard.path for shard in open_shards(folder, STEM))
        self._open: OrderedDict[int, PackedShard] = OrderedDict()
        self.header = {name: value for name, value in self._shard(0).header.items() if name != "shard"}

    def __reduce__(self) -> tuple[type["TargetStore"], tuple[Path, dict[str, Any]]]:
        return type(self), (self.folder, self.expect)

    def __getitem__(self, utterance_id: str) -> Targets:
        """ids (T, K) int32 and log-posteriors (T, K) float32, renormalised, the highest first."""
        return _as_targets(self._find(utterance_id)[utterance_id])

    def dropped(self, utterance_id: str) -> NDArray[np.float32]:
        """(T,) the probability that was not kept."""
        return self._find(utterance_id)[utterance_id]["dropped"].astype(np.float32)

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def shard_ids(self, number: int) -> tuple[str, ...]:
        """The utterances of a shard, in its order."""
        return self._shard(number).ids

    def read(self, number: int, utterance_id: str) -> Targets:
        """As `store[utterance_id]`, where the shard is known: nothing is looked for."""
        return _as_targets(self._shard(number)[utterance_id])

    def iter_shard(self, number: int) -> Iterator[tuple[str, NDArray[np.int32], NDArray[np.float32]]]:
        """Utterance id, ids (T, K) and log-posteriors (T, K) of each utterance of a shard, in order."""
        for utterance_id, arrays in self._shard(number):
            yield utterance_id, *_as_targets(arrays)

    def verify(self) -> None:
        """Read everything; raises one ValueError that lists every damage by shard and utterances."""
        damages: list[str] = []
        for number in range(self.num_shards):
            try:
                self._shard(number).verify()
            except ValueError as error:
                damages.append(str(error))
        if damages:
            raise ValueError("\n".join(damages))

    def info(self, num_shards: int | None = None) -> "StoreInfo":
        """Sizes and means of the first shards, by default of all; reads every frame of them."""
        shards = self.shards[:num_shards]
        counts = [k for k in _KEPT if k < self.header["k"]] + [self.header["k"]]
        kept, entropy = np.zeros(len(counts)), 0.0
        num_utterances = num_frames = 0
        for number in range(len(shards)):
            shard = self._shard(number)
            num_utterances += len(shard)
            for _, arrays in shard:
                stored = arrays["log_posteriors"].astype(np.float64)
                kept += np.exp(stored).cumsum(axis=1)[:, [k - 1 for k in counts]].sum(axis=0)
                log_posteriors = _as_targets(arrays)[1].astype(np.float64)
                entropy -= _expected(log_posteriors)
                num_frames += len(stored)
        return StoreInfo(
            num_shards=len(shards),
            num_utterances=num_utterances,
            num_frames=num_frames,
            hours=num_frames * self.header["frames"]["shift_seconds"] / 3600,
            bytes_per_frame=sum(path.stat().st_size for path in shards) / max(num_frames, 1),
            kept=dict(zip(counts, (kept / max(num_frames, 1)).tolist(), strict=True)),
            entropy_nats=entropy / max(num_frames, 1),
        )

    def _find(self, utterance_id: str) -> PackedShard:
        for number in [*reversed(self._open), *range(self.num_shards)]:
            shard = self._shard(number)
            if utterance_id in shard:
                return shard
        raise KeyError(f"{self.folder} has no targets for utterance {utterance_id!r}")

    def _shard(self, number: int) -> PackedShard:
        """Shard `number`, checked when opened; beyond the limit the least recently used one is closed."""
        if number not in self._open:
            shard = PackedShard(self.shards[number])
            self._check(shard, number)
            self._open[number] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def _check(self, shard: PackedShard, number: int) -> None:
        header = shard.header
        if header.get("store_version") != STORE_VERSION:
            got = f"store version {header.get('store_version')!r}"
            raise ValueError(f"{shard.path}: got {got}, this reader knows version {STORE_VERSION}")
        if header["shard"] != number:
            raise ValueError(f"{shard.path} was written as shard {header['shard']}: has it been renamed?")
        known = header["provenance"] | {"num_senones": header["num_senones"], "k": header["k"]}
        for name, needed in self.expect.items():
            if known.get(name) != needed:
                got = f"got {name} = {known.get(name)!r}, need {needed!r}"
                raise ValueError(f"{shard.path} belongs to something else: {got}. Label again")
        if number:
            for name, needed in self.header.items():
                if header.get(name) != needed:
                    first = self.shards[0].name
                    raise ValueError(
                        f"{shard.path}: {name} is {header.get(name)!r}, need {needed!r} as in {first}. "
                        "Shards of two stores are mixed in this folder: label again"
                    )


@dataclass(frozen=True)
class StoreInfo:
    """What `store info` prints. `kept` is the mean probability of the k highest senones, by k."""

    num_shards: int
    num_utterances: int
    num_frames: int
    hours: float
    bytes_per_frame: float
    kept: dict[int, float]
    entropy_nats: float


def describe(folder: Path | str) -> str:
    """What a store holds and what it belongs to, as a table for people."""
    store = TargetStore(folder)
    info = store.info()
    rows = [
        ("shards", f"{info.num_shards:,}"),
        ("utterances", f"{info.num_utterances:,}"),
        ("frames", f"{info.num_frames:,}"),
        ("hours", f"{info.hours:,.2f}"),
        ("bytes a frame", f"{info.bytes_per_frame:.1f}"),
        ("senones", f"{store.header['num_senones']:,}"),
        *[(f"mass kept by {k}", f"{mass:.4f}") for k, mass in info.kept.items()],
        ("entropy", f"{info.entropy_nats:.3f} nats"),
        *[(name, str(value)) for name, value in sorted(store.header["provenance"].items())],
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _coding(id_dtype: np.dtype[Any]) -> dict[str, Any]:
    return {
        "ids": f"{id_dtype.name}, by falling log-posterior",
        "log_posteriors": "float16 natural logarithm, rounded to nearest, not renormalised",
        "dropped": "float16 probability",
        # of x: at most the larger of the two; of a probability p: max p |ln p| 2^-11 = 2^-11 / e
        "worst_error": {
            "relative_nats": 2.0**-11,
            "absolute_nats": 2.0**-25,
            "below": "less than -65504 may become -inf",
            "probability": 1.8e-4,
        },
    }


def _as_targets(arrays: Arrays) -> Targets:
    log_posteriors = torch.from_numpy(arrays["log_posteriors"].astype(np.float32))
    return arrays["ids"].astype(np.int32), renormalise(log_posteriors).numpy()


def _expected(log_posteriors: NDArray[np.float64]) -> float:
    """Sum over frames and senones of p log p, where 0 log 0 is 0."""
    posteriors = np.exp(log_posteriors)
    return float((posteriors * np.where(posteriors > 0, log_posteriors, 0)).sum())
