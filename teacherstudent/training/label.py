"""The `label` step: the teacher's highest posteriors for every frame of the unlabelled shards.

    targets/targets.000003.h5           a shard of the store, and its .sha256 (docs/store.md)
    targets/left_out.000003.json        its utterances that could not be labelled, with the reason
    targets/numeric_mode.json           what the whole store is computed in
    targets/skipped.jsonl, report.json  what was left out in all; written at the end
    targets/shard_table.npy             how long the utterances of each shard are (shard_table.py); likewise
    targets-human/                      the same but the last of the human-labelled part, with label.human = true

The shards without targets are a queue. Any number of workers take them: those of a launcher, and processes started by
hand on any machine that sees the folder, which may come late, leave, and die (claims.py). A shard's bytes depend on its
cuts, the teacher and the settings in its header alone: whoever labels it again writes the same.

# T frames, S senones, K kept
"""

import copy
import dataclasses
import json
import math
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from teacherstudent.claims import Claims
from teacherstudent.config import Label
from teacherstudent.data.feature_reader import ReadableShard, open_features
from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.manifests import HUMAN, UNLABELLED
from teacherstudent.data.packed import hash_path, shard_path
from teacherstudent.data.prefetch import Readers, num_readers
from teacherstudent.distributed import Communicator
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_json, write_text
from teacherstudent.locks import remove_abandoned
from teacherstudent.posteriors import TopK
from teacherstudent.processes import compute_threads
from teacherstudent.progress import HoursBar, hours_bar
from teacherstudent.settings import require
from teacherstudent.store import STEM, TargetWriter
from teacherstudent.training import checkpoint
from teacherstudent.training.inference import (
    Pieces,
    computing,
    find_best,
    has_bfloat16,
    plan_batches,
    to_numeric_mode,
)
from teacherstudent.training.models import AcousticModel, model_from_state
from teacherstudent.training.pipeline import WriteBehind, read_ahead
from teacherstudent.training.table_files import TABLE, write_table
from teacherstudent.training.trainings import open_targets, target_provenance, targets_folder

_BATCHES_AHEAD = 2
_EXAMPLES = 5


def label(experiment: Experiment, comm: Communicator) -> list[Path]:
    """Label shards until all of them are there, with whoever else does. Returns the files of the whole store.

    Raises ValueError when too many utterances cannot be labelled, where the processor lacks what the store is
    computed in, and for more senones to be kept than there are.
    """
    names = (UNLABELLED, HUMAN) if experiment.config.label.human else (UNLABELLED,)
    return [path for name in names for path in _label_part(experiment, comm, name)]


def _label_part(experiment: Experiment, comm: Communicator, name: str) -> list[Path]:
    settings = experiment.config.label
    folder = targets_folder(experiment, name)
    folder.mkdir(parents=True, exist_ok=True)
    with experiment.claims() as claims:
        mode = _agree_numeric_mode(folder, settings, claims, comm.device)
        state = checkpoint.load(experiment.path("teacher", "best.pt"))
        model = to_numeric_mode(model_from_state(state), mode, comm.device)
        settings = dataclasses.replace(settings, k=_num_kept(settings, model.num_senones))
        shards = open_features(experiment, name, model.network.normalisation)
        part = _read_part(experiment, name)
        queue = _Queue(folder, len(shards), claims)
        total = part.seconds * len(queue.list_missing()) / max(len(shards), 1)
        with (
            computing(mode),
            compute_threads(settings.threads),
            Readers(_ReadBatch(shards), num_readers(experiment.config.features)) as readers,
            hours_bar(total, "label", show=comm.rank == 0) as bar,
        ):
            header = _header(target_provenance(experiment), mode, settings)
            _Worker(shards, queue, settings, part, header, model, readers, bar).run()
        comm.barrier(math.inf)  # the others may have an hour to go
        if comm.rank == 0:
            with claims.hold("report"):
                _report(folder, len(shards), part, settings.max_bad_share)
                if name == UNLABELLED:  # human-labelled speech has one that looks at its labels, too
                    jobs = experiment.config.features.jobs
                    write_table(folder / TABLE, name, shards, open_targets(experiment, name), jobs)
                remove_abandoned(folder, ".*")  # of workers that died: every shard is there
                claims.sweep()
    comm.barrier(math.inf)
    return list_outputs(folder, len(shards), has_table=name == UNLABELLED)


def list_outputs(folder: Path, num_shards: int, has_table: bool) -> list[Path]:
    """All that belongs to a store."""
    names = ["numeric_mode.json", "report.json", "skipped.jsonl", *([TABLE] if has_table else [])]
    outputs = [folder / name for name in names]
    for number in range(num_shards):
        path = shard_path(folder, STEM, number)
        outputs += [path, hash_path(path), _left_out_path(folder, number)]
    return outputs


def _agree_numeric_mode(folder: Path, settings: Label, claims: Claims, device: torch.device) -> str:
    """The first worker resolves "auto"; the others hold to it."""
    path = folder / "numeric_mode.json"
    with claims.hold("numeric_mode"):
        if not path.is_file():
            mode = settings.numeric_mode
            if mode == "auto":
                mode = "bf16" if has_bfloat16(device) else "fp32"
            write_json(path, {"numeric_mode": mode})
    return str(json.loads(path.read_text(encoding="utf-8"))["numeric_mode"])


def _num_kept(settings: Label, num_senones: int) -> int:
    needed = f"at most {num_senones}, the number of senones; 0 takes all of them"
    require(settings.k <= num_senones, "label.k", settings.k, needed)
    return settings.k or num_senones


class _Part(NamedTuple):
    """What `prepare` counted."""

    name: str
    folder: str  # of its targets
    num_utterances: int
    seconds: float


def _read_part(experiment: Experiment, name: str) -> _Part:
    text = experiment.path("features", "report.json").read_text(encoding="utf-8")
    found = json.loads(text)[name]
    seconds = 3600 * (found["hours"] + found["copy_hours"])
    folder = targets_folder(experiment, name).name
    return _Part(name, folder, found["utterances"] + found["copies"], seconds)


# -- the queue -----------------------------------------------------------------------------------------------


class _Queue:
    """The shards that have no targets yet."""

    def __init__(self, folder: Path, num_shards: int, claims: Claims) -> None:
        self.folder, self.num_shards = folder, num_shards
        self._claims = claims

    def output(self, number: int) -> Path:
        return shard_path(self.folder, STEM, number)

    def list_missing(self) -> list[int]:
        there = {entry.name for entry in os.scandir(self.folder)}
        return [number for number in range(self.num_shards) if self.output(number).name not in there]

    def take_free(self) -> Iterator[int]:
        """Shards that this worker has claimed, until none is free. Each starts elsewhere, to meet few others."""
        missing = self.list_missing()
        start = int.from_bytes(os.urandom(4), "little") % max(len(missing), 1)  # changes no shard's bytes
        for number in missing[start:] + missing[:start]:
            if not self.output(number).exists() and self._claims.take(self._name(number)):
                if self.output(number).exists():  # finished and given up in between
                    self.give_up(number)
                else:
                    yield number

    def give_up(self, number: int) -> None:
        self._claims.release(self._name(number))

    def wait(self) -> None:
        threading.Event().wait(self._claims.poll_seconds)

    def _name(self, number: int) -> str:
        return f"{self.folder.name}.{number:06d}"


# -- reading -------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """A batch of a shard."""

    shard: int
    rows: tuple[int, ...]  # utterances by number, longest first
    num_frames: int
    is_last: bool  # of its shard


def _open(shard: ReadableShard) -> ReadableShard:
    """A copy that is thrown away with its ids and its file: memory must not grow with the number of shards."""
    return copy.deepcopy(shard)


class _ReadBatch:
    """The features of a request's utterances, or for each why it has none."""

    def __init__(self, shards: Sequence[ReadableShard]) -> None:
        self._shards = shards
        self._opened: tuple[int, ReadableShard] | None = None  # the last one

    def __call__(self, request: _Request) -> list[np.ndarray | str]:
        if self._opened is None or self._opened[0] != request.shard:
            self._opened = request.shard, _open(self._shards[request.shard])
        return [self._read(self._opened[1], row) for row in request.rows]

    def _read(self, shard: ReadableShard, row: int) -> np.ndarray | str:
        try:
            values: np.ndarray = shard[shard.ids[row]]["values"]
        except ValueError as error:
            return str(error.__cause__ or error).replace(f"{shard.path.parent}/", "")
        expected = int(shard.num_frames[row])
        if not len(values):
            return "no frames"
        if len(values) != expected:
            return f"another length: {len(values)} frames, {expected} when it was prepared"
        if not np.isfinite(values).all():
            return "features that are not finite"
        return values.copy()


# -- one worker ----------------------------------------------------------------------------------------------


@dataclass
class _Labelled:
    """What became of a shard's utterances, by number."""

    shard: int
    best: dict[int, TopK] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)


@dataclass
class _Worker:
    shards: Sequence[ReadableShard]
    queue: _Queue
    settings: Label
    part: _Part
    header: dict[str, str | int | float]
    model: AcousticModel
    readers: Readers[_Request, list[np.ndarray | str]]
    bar: HoursBar
    num_skipped: int = 0

    def run(self) -> None:
        """Until every shard has targets, whoever made them."""
        while missing := self.queue.list_missing():
            self._label_what_is_free()
            if set(missing) == set(self.queue.list_missing()):
                self.queue.wait()

    def _label_what_is_free(self) -> None:
        labelled: _Labelled | None = None
        with read_ahead(self._read(), _BATCHES_AHEAD) as batches, WriteBehind(self._write, 1) as writer:
            for request, values in batches:
                labelled = labelled or _Labelled(request.shard)
                self._label(request, values, labelled)
                if request.is_last:
                    writer.put(labelled)
                    labelled = None

    def _read(self) -> Iterator[tuple[_Request, list[np.ndarray | str]]]:
        sent: deque[_Request] = deque()

        def remember() -> Iterator[_Request]:
            for number in self.queue.take_free():
                for request in self._plan(number):
                    sent.append(request)
                    yield request

        for values in self.readers.map(remember()):
            yield sent.popleft(), values

    def _plan(self, number: int) -> list[_Request]:
        lengths, settings = _open(self.shards[number]).num_frames, self.settings
        batches = plan_batches(lengths, settings.batch_frames, settings.chunk_frames) or [[]]
        return [
            _Request(number, tuple(rows), int(lengths[rows].sum()), place == len(batches))
            for place, rows in enumerate(batches, 1)
        ]

    def _label(self, request: _Request, values: list[np.ndarray | str], labelled: _Labelled) -> None:
        usable = {row: value for row, value in zip(request.rows, values) if not isinstance(value, str)}
        labelled.skipped |= {row: why for row, why in zip(request.rows, values) if isinstance(why, str)}
        if usable:
            settings = self.settings
            pieces = Pieces(settings.chunk_frames, settings.context_frames)
            found = find_best(self.model, list(usable.values()), settings.k, settings.batch_frames, pieces)
            for row, best in zip(usable, found):
                if isinstance(best, str):
                    labelled.skipped[row] = best
                else:
                    labelled.best[row] = best
        self.bar.update(request.num_frames * FRAME_SHIFT_SECONDS)

    def _write(self, labelled: _Labelled) -> None:
        output, ids = self.queue.output(labelled.shard), _open(self.shards[labelled.shard]).ids
        skipped = [[ids[row], labelled.skipped[row]] for row in sorted(labelled.skipped)]
        coding, k = self.settings.coding, self.settings.k
        try:
            write_json(_left_out_path(self.queue.folder, labelled.shard), skipped)
            with TargetWriter(output, self.model.num_senones, k, self.header, coding) as writer:
                for row in sorted(labelled.best):
                    writer.write_best(ids[row], labelled.best[row])
        except FileNotFoundError:
            # this worker was taken for dead; another has written the shard, and swept up since
            if not output.exists():
                raise
        self.queue.give_up(labelled.shard)
        self.num_skipped += len(skipped)
        _check_share(self.num_skipped, self.part, self.settings.max_bad_share, skipped)


def _header(provenance: dict[str, str], mode: str, settings: Label) -> dict[str, str | int | float]:
    """All that a shard's bytes depend on besides its cuts."""
    names = ("batch_frames", "threads", "chunk_frames", "context_frames")
    return {**provenance, "numeric_mode": mode, **{name: getattr(settings, name) for name in names}}


# -- the report ----------------------------------------------------------------------------------------------


def _left_out_path(folder: Path, number: int) -> Path:
    return folder / f"left_out.{number:06d}.json"


def _report(folder: Path, num_shards: int, part: _Part, max_bad_share: float) -> None:
    """Write skipped.jsonl and report.json from what lies beside the shards."""
    skipped: list[list[str]] = []
    for number in range(num_shards):
        skipped += json.loads(_left_out_path(folder, number).read_text(encoding="utf-8"))
    lines = [json.dumps({"id": name, "reason": why}) + "\n" for name, why in skipped]
    write_text(folder / "skipped.jsonl", "".join(lines))
    kinds = Counter(why.partition(":")[0] for _, why in skipped)
    report = {
        "utterances": part.num_utterances - len(skipped),
        "left_out": dict(sorted(kinds.items())),
    }
    write_json(folder / "report.json", report)
    _check_share(len(skipped), part, max_bad_share, skipped)
    if skipped:
        warnings.warn(_tell(len(skipped), part, skipped), stacklevel=2)


def _check_share(num_skipped: int, part: _Part, max_bad_share: float, examples: list[list[str]]) -> None:
    if num_skipped > max_bad_share * part.num_utterances:
        raise ValueError(
            f"{_tell(num_skipped, part, examples)}\nThat is more than label.max_bad_share = {max_bad_share:g}. Mend "
            "the audio, remove the targets.*.h5 of the shards whose left_out.*.json is not empty, and label again; or "
            "allow a greater share"
        )


def _tell(num_skipped: int, part: _Part, examples: list[list[str]]) -> str:
    rows = [f"  {name}: {why}" for name, why in examples[:_EXAMPLES]]
    told = f"{num_skipped} of {part.num_utterances} {part.name} utterances could not be labelled"
    return f"{told} ({part.folder}/left_out.*.json and skipped.jsonl list them):\n" + "\n".join(rows)
