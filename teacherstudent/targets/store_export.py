"""The target store for other programs: fields of lhotse's Shar format, and Kaldi posteriors.

Shard i gives shard i of the output, in the same order; a file appears when it is complete.
"""
# T frames, K kept

import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from lhotse.array import Array, TemporalArray
from lhotse.shar.writers.tar import TarWriter

from teacherstudent.data.manifests import read_cuts
from teacherstudent.data.packed import shard_path
from teacherstudent.store import TargetStore
from teacherstudent.targets.target_codec import Decoded

SHAR_FIELDS = ("senones", "log_posteriors", "dropped")
_PAIR = np.dtype([("id_size", "u1"), ("id", "<i4"), ("value_size", "u1"), ("value", "<f4")])


def export_shar(store: TargetStore, output: Path, cuts_folder: Path | None = None) -> list[Path]:
    """Tar files senones.000000.tar, log_posteriors.000000.tar and dropped.000000.tar, a TemporalArray an utterance:
    `CutSet.from_shar({"cuts": [...], "senones": [...], "log_posteriors": [...]})` puts them beside the cuts.

    lhotse joins them by order. Where the shards of cuts (cuts.000000.jsonl in `cuts_folder`) hold cuts without targets,
    or cuts that do not begin where their recording does, name the folder: the former get an empty place. Log-posteriors
    are renormalised.
    """
    written = []
    for number in range(store.num_shards):
        places = dict.fromkeys(store.shard_ids(number), 0.0)  # seconds at which each begins in its recording
        if cuts_folder is not None:
            cuts = read_cuts(cuts_folder / f"cuts.{number:06d}.jsonl")
            places = {cut.id: float(cut.start) for cut in cuts}
        missing = set(store.shard_ids(number)) - set(places)
        if missing:
            some = f"{len(missing)} utterances, {min(missing)!r} among them"
            raise ValueError(
                f"{cuts_folder}: shard {number} has no cuts for {some}: name the cuts that were labelled"
            )
        for field in SHAR_FIELDS:
            path = output / f"{field}.{number:06d}.tar"
            with _completed(path) as partial, TarWriter(str(partial), shard_size=None) as writer:
                _write_field(store, number, places, field, writer)
            written.append(path)
    return written


def _write_field(
    store: TargetStore, number: int, places: dict[str, float], field: str, writer: TarWriter
) -> None:
    """As lhotse's ArrayTarWriter, but that one forgets where a cut begins: those of Shar begin at 0."""
    labelled = set(store.shard_ids(number))
    shift = store.header["frames"]["shift_seconds"]
    for utterance_id, start in places.items():
        if utterance_id not in labelled:
            writer.write(f"{utterance_id}.nodata", io.BytesIO())
            writer.write(f"{utterance_id}.nometa", io.BytesIO(), count=False)
            continue
        decoded = store.decode(number, utterance_id)
        value = dict(zip(SHAR_FIELDS, decoded, strict=True))[field]
        array = Array(storage_type="shar", storage_path="", storage_key="", shape=list(value.shape))
        manifest = TemporalArray(array, temporal_dim=0, frame_shift=shift, start=start)
        data = io.BytesIO()
        np.save(data, value, allow_pickle=False)
        writer.write(f"{utterance_id}.npy", data)
        text = json.dumps(manifest.to_dict()).encode()
        writer.write(f"{utterance_id}.json", io.BytesIO(text), count=False)


def export_kaldi(store: TargetStore, output: Path, text: bool = False) -> list[Path]:
    """Posteriors as Kaldi's programs write and read them (hmm/posterior.h), renormalised: targets.000000.ark, and for
    binary ones targets.000000.scp.

    Senones of posterior 0 are left out. Raises ValueError for an utterance whose id Kaldi's tables cannot hold.
    """
    written = []
    for number in range(store.num_shards):
        path = output / shard_path("", "targets", number).with_suffix(".ark").name
        encode = _as_text if text else _as_binary
        lines = []
        with _completed(path) as partial, partial.open("wb") as file:
            for utterance_id, decoded in store.iter_decoded(number):
                if re.search(r"\s", utterance_id):
                    name = f"{store.shard_name(number)}: utterance {utterance_id!r}"
                    raise ValueError(f"{name}: a key of Kaldi must not hold white space: export to Shar")
                file.write(f"{utterance_id} ".encode())
                lines.append(f"{utterance_id} {path}:{file.tell()}\n")
                file.write(encode(decoded))
        written.append(path)
        if not text:
            with _completed(path.with_suffix(".scp")) as partial:
                partial.write_text("".join(lines), encoding="utf-8")
            written.append(path.with_suffix(".scp"))
    return written


def _as_text(decoded: Decoded) -> bytes:
    frames = (" ".join(f"{senone} {value:.6g}" for senone, value in pairs) for pairs in _pairs(decoded))
    return ("".join(f"[ {frame} ] " for frame in frames) + "\n").encode()


def _as_binary(decoded: Decoded) -> bytes:
    """Every number with its size before it: \\0B, frames, and of each frame the number of its pairs and the pairs."""
    parts = [b"\0B", _whole(len(decoded.ids))]
    for pairs in _pairs(decoded):
        packed = np.empty(len(pairs), _PAIR)
        packed["id_size"] = packed["value_size"] = 4
        packed["id"], packed["value"] = pairs["id"], pairs["value"]
        parts += [_whole(len(pairs)), packed.tobytes()]
    return b"".join(parts)


def _whole(number: int) -> bytes:
    return b"\4" + number.to_bytes(4, "little", signed=True)


def _pairs(decoded: Decoded) -> Iterator[np.ndarray]:
    for ids, log_posteriors in zip(decoded.ids, decoded.log_posteriors, strict=True):
        pairs = np.empty(len(ids), [("id", "<i4"), ("value", "<f4")])
        pairs["id"], pairs["value"] = ids, np.exp(log_posteriors)
        yield pairs[pairs["value"] > 0]


@contextmanager
def _completed(path: Path) -> Iterator[Path]:
    """Another name to write to, which becomes the path's when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    try:
        yield partial
        if partial.exists():
            os.replace(partial, path)
        else:
            path.write_bytes(b"")  # lhotse opens no file for a shard without utterances
    finally:
        partial.unlink(missing_ok=True)
