"""One shard of the target store: what its header must say, its utterances decoded, all that is damaged in it."""
# K kept

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacherstudent.data.packed import Arrays, PackedShard, hash_line, hash_path
from teacherstudent.data.packed_index import remedy
from teacherstudent.files import hash_file
from teacherstudent.targets.codings import CODINGS
from teacherstudent.targets.shard_folder import ShardFolder
from teacherstudent.targets.target_codec import Decoded

STORE_VERSION = 2
_BATCH_BLOCKS = 16  # decoded at a time: what comes of them fits in a processor's cache


class Sibling(NamedTuple):
    """A shard of the same store, and what its header must have in common with the others."""

    name: str
    header: dict[str, Any]


def sibling_of(shard: PackedShard) -> Sibling:
    return Sibling(shard.path.name, {name: value for name, value in shard.header.items() if name != "shard"})


def check_header(
    shard: PackedShard, number: int, expect: Mapping[str, Any], sibling: Sibling | None = None
) -> None:
    """Raises ValueError unless it is shard `number` of a store of which `expect` is true, the one of its sibling."""
    header = shard.header
    if header.get("store_version") != STORE_VERSION:
        got = f"store version {header.get('store_version')!r}"
        raise ValueError(f"{shard.path}: got {got}, this reader knows version {STORE_VERSION}. Label again")
    if header["shard"] != number:
        raise ValueError(f"{shard.path} was written as shard {header['shard']}: has it been renamed?")
    known = header["provenance"] | {"num_senones": header["num_senones"], "k": header["k"]}
    for name, needed in expect.items():
        if known.get(name) != needed:
            got = f"got {name} = {known.get(name)!r}, need {needed!r}"
            raise ValueError(f"{shard.path} belongs to something else: {got}. Label again")
    if header["coding"]["name"] not in CODINGS:
        got = f"coding {header['coding']['name']!r}"
        raise ValueError(f"{shard.path}: got {got}, this reader knows {', '.join(CODINGS)}")
    if sibling is None:
        return
    for name, needed in sibling.header.items():
        if header.get(name) != needed:
            raise ValueError(
                f"{shard.path}: {name} is {header.get(name)!r}, need {needed!r} as in {sibling.name}. "
                "Shards of two stores are mixed in this folder: label again"
            )


def decode_utterance(shard: PackedShard, utterance_id: str) -> Decoded:
    """All that is stored of an utterance."""
    arrays = shard[utterance_id]
    offsets = np.array([0, len(next(iter(arrays.values())))], np.int64)
    try:
        return _decode(shard, arrays, offsets)[0]
    except ValueError as error:
        where = f"{shard.path}: utterance {utterance_id!r}"
        raise ValueError(f"{where} is damaged: {error}. {remedy(shard.path)}") from None


def iter_batches(shard: PackedShard) -> Iterator[tuple[tuple[str, ...], Decoded, list[int]]]:
    """Of many neighbouring utterances at a time, in order: ids (n), all that is stored of them, end to end, and the
    frames (n + 1) at which each begins and the last one ends.
    """
    for names, offsets, arrays in shard.iter_batches(_BATCH_BLOCKS):
        try:
            decoded, frames = _decode(shard, arrays, offsets)
        except ValueError:  # which one?
            for name in names:
                decoded = decode_utterance(shard, name)
                yield (name,), decoded, [0, len(decoded.ids)]
        else:
            yield names, decoded, frames.tolist()


def iter_decoded(shard: PackedShard) -> Iterator[tuple[str, Decoded]]:
    """All that is stored of each utterance, in order."""
    for names, decoded, frames in iter_batches(shard):
        for name, start, stop in zip(names, frames, frames[1:]):
            yield name, decoded.frames(start, stop)


def _decode(
    shard: PackedShard, arrays: Arrays, offsets: NDArray[np.int64]
) -> tuple[Decoded, NDArray[np.int64]]:
    header = shard.header
    return CODINGS[header["coding"]["name"]].decode(arrays, offsets, header["k"], header["num_senones"])


def find_damages(shards: ShardFolder, expect: Mapping[str, Any]) -> list[str]:
    """Read every byte; all damages, by shard and utterances. The first shard whose header holds is what the others are
    compared with.
    """
    damages = [f"{shards.url}: {name} is there, its shard is not" for name in shards.orphans()]
    sibling: Sibling | None = None
    for number in range(shards.num_shards):
        shard = shards.open(number)
        try:
            check_header(shard, number, expect, sibling)
            sibling = sibling or sibling_of(shard)
            shard.verify()
            for _ in iter_decoded(shard):
                pass
        except ValueError as error:
            damages += str(error).splitlines()
        finally:
            shard.close()
        damages += _compare_hash(shard)
    return damages


def _compare_hash(shard: PackedShard) -> list[str]:
    path, beside = shard.path, hash_path(shard.path)
    try:
        if beside.read_text(encoding="utf-8") == hash_line(path, hash_file(path)):
            return []
        return [f"{path}: its SHA-256 is not the one in {beside.name}. {remedy(path)}"]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{path}: cannot be compared with {beside.name}: {error}. {remedy(path)}"]
