"""The `store` command: what a store holds, whether it is whole, how large it will be, one utterance of it, exports."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teacherstudent.data.features import FRAME_SHIFT_SECONDS, STACKED_FRAMES
from teacherstudent.data.manifests import UNLABELLED
from teacherstudent.data.packed import PackedShard, shard_path
from teacherstudent.reporting.report_data import senone_phones
from teacherstudent.store import TargetStore, verify
from teacherstudent.targets.store_export import export_kaldi, export_shar
from teacherstudent.targets.store_figures import draw_targets
from teacherstudent.tying.senones import Inventory

# The model of `estimate`. A share of a frame's senones was among those of the frame before; the senone at rank r lies
# about 40 / r levels below the one before it. Measured on softmax outputs of 3,183 senones: share 0.52 to 0.60.
_KNOWN_SHARE = 0.5
_FIRST_STEP_LEVELS = 40
_CODE_LOSS_BITS = 0.85  # of a Rice code, a step
_CONTAINER_SHARE = 0.02  # utterance ids, checksums, HDF5


@dataclass(frozen=True)
class Estimate:
    """Sizes before anybody labels."""

    num_frames: int
    bytes_per_frame: dict[str, float]  # by coding, everything included; and "dense", float32 of all senones


def estimate(hours: float, k: int = 20, num_senones: int = 3000) -> Estimate:
    """How large a store of so many hours will be. Raises ValueError for sizes that cannot be."""
    if not (hours > 0 and math.isfinite(hours)):
        raise ValueError(f"got {hours} hours: give a number above 0")
    if not 1 <= k <= num_senones:
        raise ValueError(f"got k = {k} of {num_senones} senones: choose k between 1 and {num_senones}")
    id_bits, place_bits = (num_senones - 1).bit_length(), (k - 1).bit_length()
    id_field = 1 + _KNOWN_SHARE * place_bits + (1 - _KNOWN_SHARE) * id_bits
    steps = sum(math.log2(1 + _FIRST_STEP_LEVELS / rank) + _CODE_LOSS_BITS for rank in range(1, k))
    sizes = {
        "compact": 1 + (k * id_field + steps) / 8,
        "plain": k * (2 if num_senones <= 1 << 16 else 4) + 2 * k + 2,
    }
    stored = {coding: size * (1 + _CONTAINER_SHARE) for coding, size in sizes.items()}
    return Estimate(round(hours * 3600 / FRAME_SHIFT_SECONDS), stored | {"dense": 4.0 * num_senones})


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
        ("coding", store.header["coding"]["name"]),
        *[
            (f"the best {k}", f"{mass:.4f} of the probability, {info.entropy_nats[k]:.3f} nats of entropy")
            for k, mass in info.kept.items()
        ],
        *[(name, str(value)) for name, value in sorted(store.header["provenance"].items())],
    ]
    return _table(rows)


def describe_estimate(hours: float, k: int, num_senones: int) -> str:
    sizes = estimate(hours, k, num_senones)
    what = {"dense": f"float32 of all {num_senones:,} senones"}
    rows = [("frames", f"{sizes.num_frames:,}")]
    for name, size in sizes.bytes_per_frame.items():
        total = _human_bytes(size * sizes.num_frames)
        rows.append((what.get(name, name), f"{size:,.1f} bytes a frame, {total}"))
    return _table(rows)


def show(
    folder: Path | str,
    utterance_id: str,
    output: Path,
    features_folder: Path | None = None,
    inventory_path: Path | None = None,
) -> list[str]:
    """Write a picture of an utterance's targets; returns what it lacks, for people.

    Features and inventory are those of the experiment that the folder is a part of, unless they are named.
    """
    store = TargetStore(folder)
    try:
        number = store.find(utterance_id)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    lacks = []
    features = shard_path(
        features_folder or Path(folder).parent / "features" / UNLABELLED, "features", number
    )
    log_mel = None
    if features.is_file():
        stacked = PackedShard(features)[utterance_id]["values"].astype(np.float32)
        log_mel = stacked.reshape(-1, stacked.shape[1] // STACKED_FRAMES)
    else:
        lacks.append(f"without log-mel energies: there is no {features}. Name the folder with --features")
    inventory = inventory_path or Path(folder).parent / "senones" / "inventory.json"
    names = None
    if inventory.is_file():
        phones = senone_phones(Inventory.load(inventory))
        names = {senone: "/".join(found[:3]) for senone, found in phones.items()}
    else:
        lacks.append(f"without the names of senones: there is no {inventory}. Name it with --inventory")
    shift = store.header["frames"]["shift_seconds"]
    draw_targets(output, utterance_id, store.decode(number, utterance_id), shift, log_mel, names)
    return lacks


def run(options: argparse.Namespace) -> None:
    """One verb, as store_arguments.py parsed it."""
    if options.verb == "info":
        print(describe(options.folder))
    elif options.verb == "verify":
        verify(options.folder)
        print(f"{options.folder}: every byte is as it was written")
    elif options.verb == "estimate":
        print(describe_estimate(options.hours, options.k, options.senones))
    elif options.verb == "show":
        output = options.output or Path(options.utterance.replace("/", "_") + ".png")
        for what in show(options.folder, options.utterance, output, options.features, options.inventory):
            print(what)
        print(output)
    else:
        _export(options)


def _export(options: argparse.Namespace) -> None:
    if options.cuts is not None and options.to != "shar":
        raise ValueError(f"--cuts is for --to shar, got --to {options.to}: leave it out")
    store = TargetStore(options.folder)
    if options.to == "shar":
        written = export_shar(store, options.output, options.cuts)
    else:
        written = export_kaldi(store, options.output, text=options.to == "kaldi-text")
    print(f"{options.output}: {len(written)} files of {store.num_shards} shards")


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _human_bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 999.5:  # which .3g would write as 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} PB"
