"""The `senones` step: tie triphone states by a decision tree, then label every frame with its senone.

Shards are worked on in processes of their own. What they found is added up in the order of the shards, so that the
number of processes changes no bit.
"""
# T frames, P phones, S senones

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacherstudent.data.feature_reader import FeatureShard, open_features
from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.manifests import HUMAN, LABELLED_PARTS
from teacherstudent.data.packed import PackedShard, PackedWriter, open_shards, shard_path
from teacherstudent.experiment import Experiment
from teacherstudent.files import hash_file
from teacherstudent.processes import ProcessMap
from teacherstudent.progress import hours_bar
from teacherstudent.tying.events import Statistics, tree_features
from teacherstudent.tying.kaldi_inventory import read_kaldi_inventory
from teacherstudent.tying.questions import read_questions
from teacherstudent.tying.senones import Inventory, build

PROCESS_SECONDS = 3600.0  # of audio: another process is not worth its start for less


def tie_senones(experiment: Experiment) -> list[Path]:
    """Write senones/inventory.json, and senones/PART/labels.*.h5 for what is aligned of the labelled parts.

    The tree and the priors come from the human-labelled part alone; with senones.kaldi_tree, only the priors do.
    """
    settings = experiment.config.senones
    aligned = {part: open_shards(experiment.path("align", part), "phones") for part in LABELLED_PARTS}
    outputs = [experiment.path("senones", "inventory.json")]
    jobs = _num_processes(settings.jobs, [shard for shards in aligned.values() for shard in shards])
    with ProcessMap(jobs, methodcaller, "__call__") as processes:
        if settings.kaldi_tree:
            inventory = read_kaldi_inventory(Path(settings.kaldi_tree))
        else:
            inventory = _grow(experiment, aligned[HUMAN], processes)
        counts = np.zeros(inventory.num_senones, np.int64)
        for part, shards in aligned.items():
            folder = experiment.path("senones", part)
            folder.mkdir(parents=True, exist_ok=True)
            paths = [shard_path(folder, "labels", number) for number in range(len(shards))]
            found = processes.map(partial(_write_labels, inventory, *pair) for pair in zip(paths, shards))
            for frames in _with_bar(found, shards, f"senones of {part}"):
                counts += frames if part == HUMAN else 0
            outputs += paths
    inventory.with_priors(counts).save(outputs[0])
    _warn_unseen(counts)
    print(
        f"senones: {inventory.num_senones} from {len(inventory.phones)} phones, {counts.sum()} frames",
        flush=True,
    )
    return outputs


def _num_processes(jobs: int, shards: Sequence[PackedShard]) -> int:
    """As many as are worth starting."""
    return min(jobs, len(shards), int(1 + sum(map(_seconds, shards)) / PROCESS_SECONDS))


def _seconds(shard: PackedShard) -> float:
    return FRAME_SHIFT_SECONDS * int(shard.num_frames.sum())


def _with_bar(results: Iterator[Any], shards: Sequence[PackedShard], what: str) -> Iterator[Any]:
    with hours_bar(sum(map(_seconds, shards)), what) as bar:
        for result, shard in zip(results, shards, strict=True):
            bar.update(_seconds(shard))
            yield result


def _grow(experiment: Experiment, aligned: Sequence[PackedShard], processes: ProcessMap) -> Inventory:
    settings = experiment.config.senones
    if "pdf" in aligned[0].arrays:
        raise ValueError(
            f"{aligned[0].path} holds pdfs, not phones: no tree can be grown from them. Set senones.kaldi_tree to the "
            "folder with the tree that they belong to, or import alignments with their model"
        )
    phones = tuple(aligned[0].header["phones"])
    questions = read_questions(Path(settings.questions), phones) if settings.questions else None
    features = open_features(experiment, HUMAN)
    if len(features) != len(aligned):
        raise ValueError(
            f"the part {HUMAN!r} has {len(features)} shards of features and {len(aligned)} of alignments: align again"
        )
    statistics = Statistics(len(phones))
    found = processes.map(partial(_accumulate, phones, *pair) for pair in zip(features, aligned))
    for of_shard in _with_bar(found, aligned, "tree statistics"):
        statistics.merge(of_shard)
    inventory = build(statistics, phones, settings, questions)
    if settings.questions:
        inventory.provenance["questions_sha256"] = hash_file(Path(settings.questions))
    return inventory


def _accumulate(phones: Sequence[str], features: FeatureShard, aligned: PackedShard) -> Statistics:
    """Of one shard, by itself."""
    ids = _translate(aligned, phones)
    statistics = Statistics(len(phones))
    known = set(features.ids)
    for utterance, arrays in aligned:
        if utterance not in known:
            raise ValueError(
                f"{aligned.path}: utterance {utterance!r} has no features: prepare and align again"
            )
        values = features[utterance]["values"]
        phone, first = ids[arrays["phone"]], arrays["first"]
        num_frames = min(len(values), len(phone))
        if abs(len(values) - len(phone)) > 1:
            raise ValueError(
                f"{aligned.path}: utterance {utterance!r} has {len(phone)} aligned frames and {len(values)} frames of "
                "features: align again"
            )
        with _naming(aligned, utterance):
            statistics.accumulate(tree_features(values[:num_frames]), phone[:num_frames], first[:num_frames])
    return statistics


def _write_labels(inventory: Inventory, output: Path, aligned: PackedShard) -> NDArray[np.int64]:
    """The labels of one shard. Returns how many frames carry each senone: (S,)."""
    counts = np.zeros(inventory.num_senones, np.int64)
    label = _copy_pdfs(inventory, aligned) if "pdf" in aligned.arrays else _label_phones(inventory, aligned)
    with PackedWriter(output, {"num_senones": inventory.num_senones}, {"senone": ("int32", ())}) as writer:
        for utterance, arrays in aligned:
            with _naming(aligned, utterance):
                senones = label(arrays)
            counts += np.bincount(senones, minlength=inventory.num_senones)
            writer.write(utterance, senone=senones)
    return counts


Arrays = Mapping[str, NDArray[Any]]


def _label_phones(inventory: Inventory, aligned: PackedShard) -> Callable[[Arrays], NDArray[np.int32]]:
    ids = _translate(aligned, inventory.phones)
    return lambda arrays: inventory.label(ids[arrays["phone"]], arrays["first"])


def _copy_pdfs(inventory: Inventory, aligned: PackedShard) -> Callable[[Arrays], NDArray[np.int32]]:
    """The pdfs of a Kaldi alignment are the senones of its tree."""
    num_pdfs = aligned.header.get("num_pdfs", inventory.num_senones)
    if num_pdfs != inventory.num_senones:
        raise ValueError(
            f"{aligned.path} holds pdfs of a model with {num_pdfs} of them, the tree of senones.kaldi_tree has "
            f"{inventory.num_senones}: tree and alignments must be of one model"
        )

    def copy(arrays: Arrays) -> NDArray[np.int32]:
        pdfs = arrays["pdf"].astype(np.int32)
        if len(pdfs) and not 0 <= pdfs.min() <= pdfs.max() < inventory.num_senones:
            wrong = pdfs.min() if pdfs.min() < 0 else pdfs.max()
            raise ValueError(f"pdf {wrong}, where the tree of senones.kaldi_tree has {inventory.num_senones}")
        return pdfs

    return copy


def _translate(aligned: PackedShard, phones: Sequence[str]) -> NDArray[np.int64]:
    """(P' + 1,): the id among `phones` of every phone of the shard, by its own id."""
    ids = {name: phone for phone, name in enumerate(phones, 1)}
    names = aligned.header["phones"]
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise ValueError(
            f"{aligned.path} is aligned with phone {unknown[0]!r}, which the tree lacks ({len(unknown)} in all): the "
            "lexicon of the alignments must have the phones of the tree"
        )
    return np.array([0, *(ids[name] for name in names)])


@contextmanager
def _naming(aligned: PackedShard, utterance: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{aligned.path}: utterance {utterance!r}: {error}") from None


def _warn_unseen(counts: NDArray[np.int64]) -> None:
    """Of a tree that was brought along; one of our own has seen all its senones."""
    unseen = int((counts == 0).sum())
    if unseen:
        warnings.warn(
            f"{unseen} of {len(counts)} senones are in no aligned frame of the part {HUMAN!r}: they get the least "
            "prior there is, and will hardly be recognised",
            stacklevel=2,
        )
