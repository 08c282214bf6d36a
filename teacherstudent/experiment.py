"""One experiment, one folder: where each step's results lie, which steps are done, and their hashes.

A step that ends writes `steps/NAME.json`: the hashes of what it read and of what it wrote. A step is done when
its record is there and what it read has not changed since; otherwise it starts anew, or goes on where it was
interrupted. Records hold relative paths and hashes only, so two folders with the same contents have the same
records.
"""

import json
import shutil
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from teacherstudent.claims import Claims
from teacherstudent.config import Config, to_toml
from teacherstudent.data.packed import hash_path
from teacherstudent.files import hash_file, hash_text, write_json, write_text
from teacherstudent.locks import remove_abandoned
from teacherstudent.settings import flatten

# Without resources and report, which look anew every time.
_ORDER = ("corpus", "prepare", "align", "senones", "teacher", "label", "student", "evaluate")
# What is not named here is read from the first on.
_FIRST_READER = {
    "conditions": "prepare",
    "align": "align",
    "senones": "align",
    "teacher": "teacher",
    "distributed": "teacher",
    "label": "label",
    "student": "student",
    "decode": "evaluate",
}

_LISTED = 20  # settings that differ


class Experiment:
    """The folder of one experiment, opened for one configuration.

    Settings may differ from those there before as long as no step that reads them was begun. Otherwise a ValueError
    names the settings and the steps.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.folder)
        self._check_folder()

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: name a new folder (folder=OTHER)")
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        saved = self.folder / "config.toml"  # looked for last: another process may begin at this moment
        if saved.is_file():
            self._check_settings(flatten(tomllib.loads(saved.read_text(encoding="utf-8"))))
        elif not all(name.startswith((".", "log")) for name in names):
            raise ValueError(
                f"{self.folder} is not empty and holds no experiment: name a new folder (folder=OTHER)"
            )

    def _check_settings(self, there: dict[str, Any]) -> None:
        """There are those of the folder, flat; one that did not exist then has its default."""
        here, first = flatten(tomllib.loads(to_toml(self.config))), flatten(tomllib.loads(to_toml(Config())))
        differing = [key for key in sorted(there | here) if there.get(key, first.get(key)) != here.get(key)]
        begun = [path.stem for path in sorted(self.path("steps").glob("*.json"))]
        read = {key: [step for step in begun if _reads(step, key)] for key in differing}
        stale = sorted(set().union(*read.values()))
        if not stale:
            return
        rows = [f"  {key}: {there.get(key)!r} there, {here.get(key)!r} now" for key in differing if read[key]]
        if len(rows) > _LISTED:
            rows[_LISTED:] = [f"  and {len(rows) - _LISTED} more"]
        records = " ".join(f"{self.path('steps')}/{step}.json" for step in stale)
        raise ValueError(
            "\n".join([f"{self.folder} has steps that were done, or begun, with other settings:", *rows])
            + "\nGive these a folder of their own (folder=OTHER); or do those steps again, by removing their "
            f"records: rm {records}"
        )

    def create(self) -> None:
        """Make the folder and save the resolved configuration in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.toml", to_toml(self.config))  # first: it says whose folder this is
        (self.folder / "steps").mkdir(exist_ok=True)
        (self.folder / "log").mkdir(exist_ok=True)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def claims(self) -> Claims:
        """Of one worker: what several processes on this folder must not do at the same time, and who does what."""
        return Claims(self.path("steps", ".claims"), self.config.label.lease_seconds)

    @property
    def data_folder(self) -> Path:
        """Where the parts' cuts, lexicon.txt and lm_text.txt lie."""
        return Path(self.config.data.folder) if self.config.data.folder else self.path("corpus")

    # -- which steps are done ------------------------------------------------------------------------------

    def _record(self, step: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.path("steps", f"{step}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return found

    def _hash(self, step: str) -> str:
        """Of all that a step wrote."""
        return hash_text(json.dumps(self._record(step).get("outputs"), sort_keys=True))

    def _changed_since(self, step: str) -> list[str]:
        """The earlier steps that have written something else since this one read it."""
        return [
            name for name, seen in self._record(step).get("inputs", {}).items() if seen != self._hash(name)
        ]

    def _inputs(self, steps: Iterable[str]) -> dict[str, str]:
        """What the given earlier steps wrote, one hash each; they must be done and up to date."""
        for step in steps:
            if self._record(step).get("outputs") is None:
                raise ValueError(
                    f"step {step!r} is not done in {self.folder}: run it first, or `teacherstudent run CONF` "
                    "which runs every step that is missing"
                )
            if changed := self._changed_since(step):
                raise ValueError(
                    f"step {step!r} is out of date in {self.folder}: {', '.join(changed)} changed since it ran. Run "
                    "it again, or `teacherstudent run CONF` which runs every step that needs it"
                )
        return {step: self._hash(step) for step in steps}

    def is_done(self, step: str, after: Iterable[str] = ()) -> bool:
        """Whether a step is done, its files are there, and all that it read is what is there now."""
        record = self._record(step)
        if record.get("outputs") is None or set(record["inputs"]) != set(after) or self._changed_since(step):
            return False
        current = not any(self._changed_since(earlier) for earlier in after)
        return current and all(self._place(name).is_file() for name in record["outputs"])

    def begin(self, step: str, after: Iterable[str], clear: Iterable[str] = (), again: bool = False) -> None:
        """Start or go on with a step. `clear`: its folders, emptied if what it reads has changed since.

        again: it is run every time, and what it wrote stands for done until it has written anew, since other processes
        may be at later steps.
        """
        inputs = self._inputs(after)
        if again and self._record(step).get("inputs") == inputs:
            return
        if self._record(step).get("inputs") != inputs:
            self.path("steps", f"{step}.json").unlink(missing_ok=True)  # first: half-emptied is not done
            for path in map(self.path, clear):
                if path.exists():
                    shutil.rmtree(path)
        self._write_record(step, {"inputs": inputs, "outputs": None})

    def finish(self, step: str, outputs: Iterable[Path]) -> None:
        """Record a step as done, with the hashes of the files that it wrote."""
        hashes = {self._name(path): _hash_output(path) for path in sorted(outputs)}
        self._write_record(step, self._record(step) | {"outputs": hashes})
        remove_abandoned(self.path("steps"), f".{step}.json.*")

    def _brought(self) -> list[tuple[str, Path]]:
        """What the data that lie elsewhere are called in the records, in any folder: data/human, data/lexicon, …"""
        data = self.config.data
        named = [(name, getattr(data, name)) for name in ("human", "unlabelled", "dev", "test")]
        named += [("lexicon", data.lexicon), ("language_model", data.language_model)]
        senones = self.config.senones
        named += [("align", self.config.align.folder), ("questions", senones.questions)]
        named += [("kaldi_tree", senones.kaldi_tree)]
        return [(f"data/{name}", Path(place)) for name, place in named if place] + [
            ("data", self.data_folder)
        ]

    def _name(self, path: Path) -> str:
        """Relative, also for data that were brought along and lie elsewhere."""
        if path.is_relative_to(self.folder):
            return path.relative_to(self.folder).as_posix()
        name, place = next((name, place) for name, place in self._brought() if path.is_relative_to(place))
        return (Path(name) / path.relative_to(place)).as_posix()

    def _place(self, name: str) -> Path:
        if (self.folder / name).exists() or not name.startswith("data/"):
            return self.folder / name
        called, place = next(
            (called, place) for called, place in self._brought() if Path(name).is_relative_to(called)
        )
        return place / Path(name).relative_to(called)

    def _write_record(self, step: str, record: dict[str, Any]) -> None:
        write_json(self.path("steps", f"{step}.json"), record)

    def hashes(self) -> dict[str, str]:
        """Of every file that every step wrote: the same for the same experiment in any folder."""
        merged: dict[str, str] = {}
        for path in sorted(self.path("steps").glob("*.json")):
            merged |= self._record(path.stem).get("outputs") or {}
        return dict(sorted(merged.items()))


def _reads(step: str, key: str) -> bool:
    """Whether what a step has made depends on a setting: every step does from the first on that may look at it."""
    section, kind = key.partition(".")[0], step.partition("-")[0]
    if kind == "student" and key.startswith("student.variants."):
        return f"{key}.".startswith(f"student.variants.{step.removeprefix('student-')}.")
    return kind in _ORDER and _ORDER.index(kind) >= _ORDER.index(_FIRST_READER.get(section, _ORDER[0]))


def _hash_output(path: Path) -> str:
    """Where a shard's writer has put the hash beside it, not all of it is read again."""
    beside = hash_path(path)
    hashed = path.suffix == ".h5" and beside.is_file()  # not what lies beside data that were brought along
    return beside.read_text(encoding="utf-8").split()[0] if hashed else hash_file(path)
