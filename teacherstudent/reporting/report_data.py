"""What the report reads from an experiment folder, as far as it is there."""
# T10 frames of 10 ms, T frames of 30 ms, M mel bands, F features of a stacked frame, S senones, K kept

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacherstudent.config import Config, load
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, STACKED_FRAMES
from teacherstudent.data.manifests import UNLABELLED
from teacherstudent.data.packed import open_shards
from teacherstudent.decoding.error_tables import ALL, quietest_first
from teacherstudent.files import hash_file, hash_text
from teacherstudent.store import STEM, TargetStore
from teacherstudent.training.schedule import HUMAN, MACHINE
from teacherstudent.tying.senones import Inventory

Columns = dict[str, NDArray[np.float64]]  # equally long; NaN where a line had no value

TEACHER = "teacher"
_STUDENT_COLOURS = ("machine", "third", "fourth", "fifth")
_SHOWN_SECONDS = (2.0, 6.0)  # of the utterance in the posteriorgram, where there is one


@dataclass(frozen=True)
class Curves:
    """One training's log.jsonl."""

    name: str
    train: dict[str, Columns]  # by source: step, hours, loss, bytes_sent, density
    dev: Columns  # step, dev_loss, dev_frame_error

    @property
    def num_steps(self) -> int:
        return int(
            max(
                (
                    columns["step"].max()
                    for columns in [*self.train.values(), self.dev]
                    if len(columns["step"])
                ),
                default=0,
            )
        )

    @property
    def sent(self) -> Columns:
        """Step, bytes_sent and density of every logged step, whatever its source."""
        rows = {
            step: (total, density)
            for columns in self.train.values()
            for step, total, density in zip(columns["step"], columns["bytes_sent"], columns["density"])
        }
        steps = sorted(rows)
        values = np.array([rows[step] for step in steps]).reshape(-1, 2)
        return {"step": np.array(steps), "bytes_sent": values[:, 0], "density": values[:, 1]}


@dataclass(frozen=True)
class Posteriorgram:
    """One machine-labelled utterance."""

    utterance_id: str
    log_mel: NDArray[np.float32]  # (T10, M)
    posteriors: NDArray[np.float32]  # (T, S), 0 where they were not kept
    kept: NDArray[np.float32]  # (T,)
    names: list[str]  # (S,) the phones of each senone


class Findings:
    """An experiment folder; every part may be absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config = load(folder / "config.toml")
        self.results: dict[str, Any] | None = _read_json(folder / "evaluate" / "results.json")
        self.speeds: dict[str, Any] | None = _read_json(folder / "evaluate" / "speed.json")
        names = [TEACHER, *(f"students/{name}" for name in self.config.student_variants())]
        logs = {Path(name).name: folder / name / "log.jsonl" for name in names}
        self.curves = [read_curves(name, path) for name, path in logs.items() if path.is_file()]
        labelled = any((folder / "targets").glob(f"{STEM}.*.h5"))
        self.store: TargetStore | None = TargetStore(folder / "targets") if labelled else None

    @cached_property
    def colours(self) -> dict[str, str]:
        """The name of a colour for every training: the teacher's, human labels' or one of its own."""
        colours, free = {TEACHER: TEACHER}, iter(_STUDENT_COLOURS * len(self.config.student_variants()))
        for name, student in self.config.student_variants().items():
            colours[name] = "human" if student.schedule.mode == "human-only" else next(free)
        return colours

    def system_colour(self, system: str) -> str:
        """As that of its training; a training may have several systems, such as NAME-early."""
        return self.colours[self._training(system)]

    def _training(self, system: str) -> str:
        owners = [name for name in self.colours if system == name or system.startswith(f"{name}-")]
        if not owners:
            known = ", ".join(self.colours)
            raise ValueError(
                f"{self.folder}: system {system!r} belongs to no training of {known}. Evaluate again"
            )
        return max(owners, key=len)

    @cached_property
    def systems(self) -> dict[str, dict[str, Any]]:
        """Rows of the results: the teacher, those of human labels alone, the others; as configured."""
        rows: dict[str, dict[str, Any]] = (self.results or {}).get("systems", {})
        order = list(self.colours)
        groups = {TEACHER: 0, "human": 1}

        def place(name: str) -> tuple[int, int, str]:
            return groups.get(self.system_colour(name), 2), order.index(self._training(name)), name

        return {name: rows[name] for name in sorted(rows, key=place)}

    @cached_property
    def conditions(self) -> list[str]:
        """Of the test: all together, clean speech, then from little noise to much, then others by name."""
        names = {name for row in self.systems.values() for name in row["conditions"]}
        return sorted(names, key=lambda name: (name != ALL, quietest_first(name)))

    def hours(self, part: str) -> float | None:
        """Of audio in a part that has features, copies in other conditions included."""
        report = _read_json(self.folder / "features" / "report.json")
        return None if report is None else float(report[part]["hours"] + report[part]["copy_hours"])

    def posteriorgram(self) -> Posteriorgram | None:
        """Of the first utterance of the first shard that is neither very short nor long; else of the first."""
        features = self.folder / "features" / UNLABELLED
        if self.store is None or not any(features.glob("features.*.h5")):
            return None
        shard = open_shards(features, "features")[0]
        seconds = shard.num_frames * FRAME_SHIFT_SECONDS
        order = sorted(
            range(len(shard)), key=lambda n: not _SHOWN_SECONDS[0] <= seconds[n] <= _SHOWN_SECONDS[1]
        )
        labelled = set(self.store.shard_ids(0))
        order = [number for number in order if shard.num_frames[number] and shard.ids[number] in labelled]
        if not order:
            return None
        utterance_id = shard.ids[order[0]]
        found = self.store.decode(0, utterance_id)
        posteriors = np.zeros((len(found.ids), self.store.header["num_senones"]), np.float32)
        kept = 1 - found.dropped
        np.put_along_axis(posteriors, found.ids, np.exp(found.log_posteriors) * kept[:, None], axis=1)
        stacked = shard[utterance_id]["values"].astype(np.float32)
        log_mel = stacked.reshape(-1, stacked.shape[1] // STACKED_FRAMES)
        return Posteriorgram(utterance_id, log_mel, posteriors, kept, self._senone_names(posteriors.shape[1]))

    def _senone_names(self, num_senones: int) -> list[str]:
        path = self.folder / "senones" / "inventory.json"
        if not path.is_file():
            return [str(senone) for senone in range(num_senones)]
        phones = senone_phones(Inventory.load(path))
        return ["/".join(phones.get(senone, [])[:3]) or str(senone) for senone in range(num_senones)]

    def hashes(self) -> list[tuple[str, int, str]]:
        """Of every finished step: its name, the number of files it wrote, one hash of them all."""
        rows = []
        for path in sorted((self.folder / "steps").glob("*.json")):
            outputs = (_read_json(path) or {}).get("outputs")
            if outputs:
                rows.append((path.stem, len(outputs), hash_text(json.dumps(outputs, sort_keys=True))))
        return rows

    def config_hash(self) -> str:
        return hash_file(self.folder / "config.toml")


def read_curves(name: str, path: Path) -> Curves:
    """Raises ValueError naming file and line for a line that is not JSON.

    A training may be writing just now: a last line without its end is left out.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}. Train again") from None
    keys = ("step", "hours", "loss", "bytes_sent", "density")
    trained = [row for row in rows if "loss" in row]
    sources = {source: [row for row in trained if row["source"] == source] for source in (HUMAN, MACHINE)}
    train = {source: _columns(lines, keys) for source, lines in sources.items() if lines}
    validations = [row for row in rows if "dev_loss" in row]
    return Curves(name, train, _columns(validations, ("step", "dev_loss", "dev_frame_error")))


def senone_phones(inventory: Inventory) -> dict[int, list[str]]:
    """The phones that each senone may be a part of, with the state: `a0`, the first frame of an a."""
    found: dict[int, list[str]] = {}
    for phone, roots in zip(inventory.phones, inventory.roots, strict=True):
        for state, root in enumerate(roots):
            places = [root]
            while places:
                place = places.pop()
                if place >= 0:
                    places += inventory.nodes[place][2:]
                elif (name := f"{phone}{'₀₁'[state]}") not in found.setdefault(~place, []):
                    found[~place].append(name)
    return found


def _columns(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> Columns:
    return {key: np.array([_number(row.get(key)) for row in rows], dtype=np.float64) for key in keys}


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Run the step that writes it again") from None
    return values
