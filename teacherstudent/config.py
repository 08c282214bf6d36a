"""One experiment's settings: typed, frozen, with every default here, in data_sections.py (corpus to senones) and in
training_settings.py (network, schedule, optimisation, loss).

Defaults < TOML file < `section.key=value` on the command line. An unknown key is an error that names the
nearest known one; a value of the wrong type is an error that names the type. The page is one dataclass a
section, in the order in which the steps use them.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w

from teacherstudent.data_sections import Align, Conditions, Corpus, Data, Features, Senones
from teacherstudent.settings import (
    RUNTIME,
    Count,
    Finite,
    Natural,
    NotNegative,
    Positive,
    Range,
    Section,
    Share,
    as_tables,
    build,
    merge,
    parse_override,
    require,
)
from teacherstudent.training_settings import HardLoss, Loss, Network, Optimisation, Schedule


@dataclass(frozen=True)
class Teacher(Section):
    network: Network = field(default_factory=lambda: Network(cells=832, bidirectional=True))
    schedule: Schedule = field(default_factory=lambda: Schedule(mode="human-only"))
    optimisation: Optimisation = field(default_factory=Optimisation)
    loss: HardLoss = field(default_factory=HardLoss)

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = "'human-only': there are machine labels only when it has made them"
        require(self.schedule.mode == "human-only", "teacher.schedule.mode", self.schedule.mode, needed)
        _check_blocks(self.schedule, self.optimisation, "teacher")
        _check_chunks("teacher", self.network, self.optimisation)


@dataclass(frozen=True)
class Label(Section):
    """The teacher's posteriors over the unlabelled shards, the k highest of each frame kept. See label.py."""

    k: Natural = 20  # 0: all of them, for experiments
    human: bool = False  # label the human-labelled part too, for student.loss.soft_share
    coding: Literal["compact", "plain"] = "compact"  # docs/store.md
    # Auto: bf16 where the first worker's processor has it; what it chose holds for the whole store.
    numeric_mode: Literal["auto", "fp32", "bf16"] = "auto"
    batch_frames: Count = 20000  # of one pass through the teacher, padding included
    threads: Count = 1  # of a worker; last bits depend on it. More workers are faster than more threads
    chunk_frames: Count = 4000  # longer utterances in pieces of so many, each with context on both sides
    context_frames: Natural = 200
    # Of the part's utterances whose audio is gone or spoilt since they were prepared: more is an error.
    max_bad_share: Share = field(default=0.01, metadata=RUNTIME)
    # A worker on another machine that was silent for so long is taken for dead.
    lease_seconds: Positive = field(default=300.0, metadata=RUNTIME)


@dataclass(frozen=True)
class Student(Section):
    """The student, and named variants of it: `[student.variants.NAME.schedule]` overrides what is here."""

    network: Network = field(default_factory=lambda: Network(output_delay_frames=4))
    schedule: Schedule = field(default_factory=Schedule)
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(method="gtc"))
    workers: Natural = 0  # in-process ones that train it when no launcher did; 0: distributed.workers
    loss: Loss = field(default_factory=Loss)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    only: str = field(default="", metadata=RUNTIME)  # train this variant alone

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_blocks(self.schedule, self.optimisation, "student")
        _check_chunks("student", self.network, self.optimisation)


def _check_blocks(schedule: Schedule, optimisation: Optimisation, where: str) -> None:
    if optimisation.method in ("bmuf", "two-tiers"):
        schedule.check_blocks(optimisation.block_steps, optimisation.exact_steps, where)


def _check_chunks(name: str, network: Network, optimisation: Optimisation) -> None:
    needed = "0, since a bidirectional network has to hear the whole utterance"
    chunk_frames = optimisation.chunk_frames
    require(
        not (network.bidirectional and chunk_frames),
        f"{name}.optimisation.chunk_frames",
        chunk_frames,
        needed,
    )


@dataclass(frozen=True)
class Decode(Section):
    """WFST decoding over lexicon and language model.

    The acoustic scale (one over the language weight) and the word penalty are chosen on the development speakers.
    """

    acoustic_scales: tuple[Positive, ...] = (0.3, 0.5, 0.7, 1.0, 1.4)
    word_penalties: tuple[Finite, ...] = (0.0,)  # cost of every word, natural logarithm
    beam: Positive = 15.0
    max_active: Annotated[int, Range(21)] = 7000
    lattices: bool = False  # of the test utterances: kept, with n-best lists and the confidence of every word
    lattice_beam: Positive = 8.0
    nbest: Count = 10  # word sequences in an n-best list
    bootstrap_samples: Count = 1000
    only: str = field(default="", metadata=RUNTIME)  # decode this one alone: "teacher", or a student's name
    score_by: tuple[str, ...] = ("condition",)  # fields of the cuts; "speaker" is one
    # Of test audio on which each network's speed is measured, on one core; 0: not.
    speed_seconds: NotNegative = field(default=60.0, metadata=RUNTIME)
    jobs: Count = field(default=2, metadata=RUNTIME)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("acoustic_scales", "word_penalties"):
            require(getattr(self, name), f"decode.{name}", [], "one or more numbers")
        fields = list(self.score_by)
        require(len(set(fields)) == len(fields), "decode.score_by", fields, "different fields")


@dataclass(frozen=True)
class Distributed(Section):
    """Without a launcher, `workers` in-process workers train; under a launcher its workers do."""

    workers: Count = 1
    # Of launched workers; in-process ones have one each. More are faster on large models, and change last bits.
    threads_per_worker: Count = 1
    timeout_seconds: Positive = field(default=600.0, metadata=RUNTIME)


@dataclass(frozen=True)
class Config(Section):
    folder: str = field(default="experiment", metadata=RUNTIME)
    seed: Natural = 0
    tensorboard: bool = field(default=False, metadata=RUNTIME)  # of the trainings, in log/tensorboard
    corpus: Corpus = field(default_factory=Corpus)
    data: Data = field(default_factory=Data)
    features: Features = field(default_factory=Features)
    conditions: Conditions = field(default_factory=Conditions)
    align: Align = field(default_factory=Align)
    senones: Senones = field(default_factory=Senones)
    teacher: Teacher = field(default_factory=Teacher)
    label: Label = field(default_factory=Label)
    student: Student = field(default_factory=Student)
    decode: Decode = field(default_factory=Decode)
    distributed: Distributed = field(default_factory=Distributed)

    def __post_init__(self) -> None:
        super().__post_init__()
        marked = self.corpus.phones == "position-stress" and not (self.data.folder or self.data.human)
        stored = self.features.storage == "stored"
        needed = "false, since features.storage = 'stored' keeps what was drawn once; 'on-the-fly' does not"
        require(not (self.conditions.redraw and stored), "conditions.redraw", True, needed)
        needed = "false: corpus.phones = 'position-stress' marks them already"
        require(not (self.data.word_positions and marked), "data.word_positions", True, needed)
        for name, student in self.student_variants().items():
            where = f"student.variants.{name}" if self.student.variants else "student"
            self._check_loss(f"{where}.loss", student)
            self._check_masks(where, student.optimisation)
        self._check_masks("teacher", self.teacher.optimisation)

    def _check_loss(self, where: str, student: Student) -> None:
        """A loss cannot use what the label step does not store."""
        loss, label = student.loss, self.label
        needed = f"at most label.k, which is {label.k}"
        require(not label.k or loss.kept <= label.k, f"{where}.kept", loss.kept, needed)
        needed = "0, unless label.human = true gives the human-labelled part posteriors of the teacher"
        lacks = student.schedule.mode != "machine-only" and not label.human
        require(not (loss.soft_share and lacks), f"{where}.soft_share", loss.soft_share, needed)

    def _check_masks(self, where: str, optimisation: Optimisation) -> None:
        masking, num_mels = optimisation.masking, self.features.num_mels
        fits = not masking.frequency_masks or masking.frequency_mask_mels <= num_mels
        name = f"{where}.optimisation.masking.frequency_mask_mels"
        require(fits, name, masking.frequency_mask_mels, f"at most features.num_mels, which is {num_mels}")

    def student_variants(self) -> dict[str, Student]:
        """Every student of the experiment by name; without variants, the one named "student"."""
        if not self.student.variants:
            return {"student": self.student}
        return {
            name: build(self.student, _variant(name, table), f"student.variants.{name}")
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
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        parsed = parse_override(override)
        _check_variants_leave(parsed, tables, override)
        tables = merge(tables, parsed)
    config = build(Config(), tables, "")
    names = config.student_variants()  # here, so that a typo in one is found before anything runs
    if config.student.only and config.student.only not in names:
        raise ValueError(
            f"student.only = {config.student.only!r}: the students of this experiment are {', '.join(names)}"
        )
    needed = f"the teacher or a student of this experiment: {', '.join(['teacher', *names])}"
    require(config.decode.only in ("", "teacher", *names), "decode.only", config.decode.only, needed)
    return config


def _check_variants_leave(parsed: Mapping[str, Any], tables: Mapping[str, Any], override: str) -> None:
    """ValueError for a setting of [student] that variants have of their own: of them nothing would come of it."""
    student = parsed.get("student", {})
    variants = tables.get("student", {}).get("variants", {})
    if not isinstance(student, Mapping) or not isinstance(variants, Mapping) or "variants" in student:
        return
    name = override.partition("=")[0].removeprefix("student.")
    own = [variant for variant, table in variants.items() if _holds(table, name.split("."))]
    if own:
        ways = ", ".join(f"student.variants.{variant}.{name}" for variant in own)
        raise ValueError(
            f"student.{name} on the command line would change nothing of the variants that have it of their own: say "
            f"{ways}"
        )


def _holds(table: Any, names: Sequence[str]) -> bool:
    for name in names:
        if not isinstance(table, Mapping) or name not in table:
            return False
        table = table[name]
    return True


def to_toml(config: Config) -> str:
    """The resolved configuration, without the settings that never change what comes out."""
    return tomli_w.dumps(as_tables(config))


def _variant(name: str, table: Any) -> Mapping[str, Any]:
    where = f"student.variants.{name}"
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"{where}: its name is a folder's: letters, digits, '_', '-' and '.' make one")
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} = {table!r}: a table is needed, for instance [{where}.schedule]")
    for key in ("variants", "only"):
        if key in table:
            raise ValueError(
                f"unknown setting '{where}.{key}'; a variant has network, schedule, optimisation, loss, workers"
            )
    return table
