"""One experiment's settings: typed, frozen, with every default on this page.

Defaults < TOML file < `section.key=value` on the command line. An unknown key is an error that names the
nearest known one; a value of the wrong type is an error that names the type. The page is one dataclass a
section, in the order in which the steps use them.
"""

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

_NEEDED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a table"}
_RUNTIME = {"runtime": True}  # says where or how fast to run, never what comes out: may differ on a rerun


def _require(holds: object, name: str, value: Any, needed: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value!r}: it must be {needed}")


@dataclass(frozen=True)
class Corpus:
    """Speech made by espeak-ng: a voice-assistant grammar, many speakers, made noise. See corpus.py."""

    human_speakers: int = 3
    unlabelled_speakers: int = 15
    dev_speakers: int = 4
    test_speakers: int = 6
    human_minutes: float = 10.0
    unlabelled_minutes: float = 120.0
    dev_minutes: float = 6.0
    test_minutes: float = 15.0
    snr_db: tuple[float, ...] = (20.0, 10.0)  # every noisy utterance is made at one of these
    noisy_share: float = 0.5  # of human-labelled and unlabelled utterances; dev and test have every condition
    shard_minutes: float = 10.0
    split: int = 0  # another number draws other speakers and deals them to other parts
    jobs: int = field(default=2, metadata=_RUNTIME)


@dataclass(frozen=True)
class Data:
    """Where the audio is. Empty: the corpus step makes it, in the experiment folder."""

    folder: str = ""  # holds human/ unlabelled/ dev/ test/ with cuts.*.jsonl, lexicon.txt, lm_text.txt


@dataclass(frozen=True)
class Features:
    """64 log-mel energies every 10 ms, three frames stacked: 192 values every 30 ms, globally normalised."""

    sampling_rate: Literal[8000, 16000] = 16000
    num_mels: int = 64
    jobs: int = field(default=2, metadata=_RUNTIME)


@dataclass(frozen=True)
class Senones:
    """Triphone states tied by a decision tree. See senones.py."""

    target: int = 3000
    min_count: int = 50  # frames that every senone must have seen
    min_gain: float = 50.0  # log-likelihood a split must bring


@dataclass(frozen=True)
class Network:
    """Stacked LSTM layers and one linear layer to the senones."""

    layers: int = 5
    cells: int = 768  # per direction
    bidirectional: bool = False
    output_delay_frames: int = 0  # of 30 ms: how far a unidirectional network may look ahead
    dropout: float = 0.0  # between layers, one mask an utterance


@dataclass(frozen=True)
class Schedule:
    """Which source each step trains on, and at which learning rate. Every worker is on the same source."""

    mode: Literal["interleaved", "human-only", "machine-only"] = "interleaved"
    steps: int = 10000
    machine_turn_steps: int = 3
    human_turn_steps: int = 1
    human_learning_rate_multiplier: float = 2.0
    final_learning_rate_ratio: float = 0.1  # exponential decay reaches it at the last step
    warmup_steps: int = 0
    validate_every_steps: int = 500


@dataclass(frozen=True)
class Optimisation:
    """How one step is taken, and how the workers share it."""

    method: Literal["exact", "gtc", "bmuf"] = "exact"
    learning_rate: float = 0.1
    momentum: float = 0.9
    clip_norm: float = 1.0  # of each worker's gradient, before any exchange
    batch_frames: int = 4000  # frames of 30 ms a worker takes in one step
    density: float = 1e-3  # gtc: share of gradient elements sent
    multi_quantum: bool = False  # gtc: send all that has grown past the threshold, not one quantum a step
    block_steps: int = 50  # bmuf
    block_momentum: float | None = None  # bmuf: default 1 - 1/workers

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(self.clip_norm > 0, "clip_norm", self.clip_norm, "> 0")
        _require(self.batch_frames >= 1, "batch_frames", self.batch_frames, ">= 1")
        _require(0 < self.density < 1, "density", self.density, "in (0, 1)")
        _require(self.block_steps >= 1, "block_steps", self.block_steps, ">= 1")
        momentum = self.block_momentum
        _require(momentum is None or 0 <= momentum < 1, "block_momentum", momentum, "in [0, 1)")


@dataclass(frozen=True)
class Teacher:
    network: Network = field(default_factory=lambda: Network(cells=832, bidirectional=True))
    schedule: Schedule = field(default_factory=lambda: Schedule(mode="human-only"))
    optimisation: Optimisation = field(default_factory=Optimisation)


@dataclass(frozen=True)
class Label:
    """The teacher's posteriors over the unlabelled shards, the k highest of each frame kept."""

    k: int = 20
    batch_frames: int = 20000

    def __post_init__(self) -> None:
        _require(self.k >= 1, "label.k", self.k, ">= 1")
        _require(self.batch_frames >= 1, "label.batch_frames", self.batch_frames, ">= 1")


@dataclass(frozen=True)
class Student:
    """The student, and named variants of it: `[student.variants.NAME.schedule]` overrides what is here."""

    network: Network = field(default_factory=lambda: Network(output_delay_frames=4))
    schedule: Schedule = field(default_factory=Schedule)
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(method="gtc"))
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    only: str = field(default="", metadata=_RUNTIME)  # train this variant alone


@dataclass(frozen=True)
class Decode:
    """WFST decoding over lexicon and a bigram language model; the scale is chosen on development speakers."""

    acoustic_scales: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0, 1.4)
    beam: float = 15.0
    max_active: int = 7000
    bootstrap_samples: int = 1000
    jobs: int = field(default=2, metadata=_RUNTIME)

    def __post_init__(self) -> None:
        scales = self.acoustic_scales
        _require(scales and min(scales) > 0, "decode.acoustic_scales", list(scales), "one or more, each > 0")
        _require(self.beam > 0, "decode.beam", self.beam, "> 0")
        _require(self.max_active >= 1, "decode.max_active", self.max_active, ">= 1")
        _require(self.bootstrap_samples >= 1, "decode.bootstrap_samples", self.bootstrap_samples, ">= 1")
        _require(self.jobs >= 1, "decode.jobs", self.jobs, ">= 1")


@dataclass(frozen=True)
class Distributed:
    """Without a launcher, `workers` in-process workers train; under a launcher its workers do."""

    workers: int = 1
    # Of launched workers; in-process ones have one each. More are faster on large models, and change last bits.
    threads_per_worker: int = 1
    timeout_seconds: float = field(default=600.0, metadata=_RUNTIME)

    def __post_init__(self) -> None:
        _require(self.workers >= 1, "distributed.workers", self.workers, ">= 1")
        _require(
            self.threads_per_worker >= 1, "distributed.threads_per_worker", self.threads_per_worker, ">= 1"
        )
        _require(self.timeout_seconds > 0, "distributed.timeout_seconds", self.timeout_seconds, "> 0")


@dataclass(frozen=True)
class Config:
    folder: str = field(default="experiment", metadata=_RUNTIME)
    seed: int = 0
    corpus: Corpus = field(default_factory=Corpus)
    data: Data = field(default_factory=Data)
    features: Features = field(default_factory=Features)
    senones: Senones = field(default_factory=Senones)
    teacher: Teacher = field(default_factory=Teacher)
    label: Label = field(default_factory=Label)
    student: Student = field(default_factory=Student)
    decode: Decode = field(default_factory=Decode)
    distributed: Distributed = field(default_factory=Distributed)

    def student_variants(self) -> dict[str, Student]:
        """Every student of the experiment by name; without variants, the one named "student"."""
        if not self.student.variants:
            return {"student": self.student}
        return {
            name: _build(self.student, _variant(name, table), f"student.variants.{name}")
            for name, table in self.student.variants.items()
        }


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides.

    Raises ValueError with what was got, what is needed and the nearest known key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no configuration at {path}: a TOML file is needed. "
            "examples/smoke/smoke.toml is one to start from; `teacherstudent --help` lists the steps."
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    config = _build(Config(), tables, "")
    for override in overrides:
        config = _build(config, _parse_override(override), "")
    names = config.student_variants()  # here, so that a typo in one is found before anything runs
    if config.student.only and config.student.only not in names:
        raise ValueError(
            f"student.only = {config.student.only!r}: the students of this experiment are {', '.join(names)}"
        )
    return config


def to_toml(config: Config) -> str:
    """The resolved configuration, without the settings that never change what comes out."""
    return tomli_w.dumps(_as_tables(config))


def _as_tables(section: Any) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if item.metadata.get("runtime") or value is None:
            continue
        if dataclasses.is_dataclass(value):
            value = _as_tables(value)
        tables[item.name] = list(value) if isinstance(value, tuple) else value
    return tables


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1, "c": {}}} -> {"a.b": 1, "a.c": {}}."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"got {override!r}: an override is section.key=value, for instance seed=1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # an unquoted string
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _build(section: Any, tables: Mapping[str, Any], where: str) -> Any:
    """A copy of the dataclass `section` with the values of `tables` put in, each checked."""
    fields = {item.name: item for item in dataclasses.fields(section)}
    kinds = typing.get_type_hints(type(section))
    changed: dict[str, Any] = {}
    for key, value in tables.items():
        name = f"{where}.{key}" if where else key
        if key not in fields:
            raise ValueError(f"unknown setting {name!r}{_nearest(key, fields, where)}")
        present = getattr(section, key)
        if dataclasses.is_dataclass(present):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{name} is a section: give its settings as {name}.KEY = VALUE, not {value!r}"
                )
            changed[key] = _build(present, value, name)
        elif isinstance(present, dict):
            changed[key] = _merge(present, _checked(value, kinds[key], name))
        else:
            changed[key] = _checked(value, kinds[key], name)
    return dataclasses.replace(section, **changed)


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _variant(name: str, table: Any) -> Mapping[str, Any]:
    where = f"student.variants.{name}"
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"{where}: its name is a folder's: letters, digits, '_', '-' and '.' make one")
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} = {table!r}: a table is needed, for instance [{where}.schedule]")
    for key in ("variants", "only"):
        if key in table:
            raise ValueError(
                f"unknown setting '{where}.{key}'; a variant has network, schedule, optimisation"
            )
    return table


def _nearest(key: str, known: Mapping[str, Any], where: str) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    place = f"[{where}]" if where else "the top level"
    if close:
        return f"; the nearest in {place} is {close[0]!r}"
    return f"; {place} knows {', '.join(sorted(known))}"


def _checked(value: Any, kind: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise ValueError(f"{name} = {value!r}: it must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is types.UnionType:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        return _checked(value, kind, name)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{name} = {value!r}: a list is needed, for instance [1.0, 2.0]")
        return tuple(_checked(part, typing.get_args(kind)[0], name) for part in value)
    if origin is dict:
        kind = dict
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or value != value:  # NaN
        raise ValueError(f"{name} = {value!r}: {_NEEDED[kind]} is needed")
    return value
