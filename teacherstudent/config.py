"""One experiment's settings: typed, frozen, with every default on this page.

Defaults < TOML file < `section.key=value` on the command line. An unknown key is an error that names the
nearest known one; a value of the wrong type is an error that names the type. The page is one dataclass a
section, in the order in which the steps use them.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from teacherstudent.settings import RUNTIME, as_tables, build, parse_override, require


@dataclass(frozen=True)
class Corpus:
    """Speech made by espeak-ng: many speakers, made noise. See corpus.py."""

    text: str = (
        "grammar"  # of a voice assistant; or "pseudo-words", or the path of a word list, a word a line
    )
    vocabulary: int = 3000  # pseudo-words, or words of the list, that are said
    phones: Literal["plain", "position-stress"] = "plain"  # AE, or AE1_B: stressed, first of its word
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
    jobs: int = field(default=2, metadata=RUNTIME)


@dataclass(frozen=True)
class Data:
    """Where the audio is. Empty: the corpus step makes it, in the experiment folder. See sources.py.

    A part is a folder of lhotse cuts (cuts.*.jsonl), a Kaldi data folder (wav.scp, text, utt2spk, …), or a folder of
    audio files with transcripts.txt (`utterance word word …` a line).
    """

    folder: str = ""  # holds human/ unlabelled/ dev/ test/ with lexicon.txt beside them
    human: str = ""  # parts and files that lie elsewhere
    unlabelled: str = ""
    dev: str = ""
    test: str = ""
    lexicon: str = ""  # default: FOLDER/lexicon.txt
    language_model: str = (
        ""  # *.arpa, *.arpa.gz, or text, a sentence a line; default: what FOLDER has of lm.arpa,
    )
    # lm.arpa.gz, lm_text.txt, in this order; else the human-labelled transcripts
    word_positions: bool = False  # mark the lexicon's phones by their place in the word: _B _I _E, _S alone
    shard_utterances: int = 1000  # of parts that are not sharded cuts already


@dataclass(frozen=True)
class Features:
    """64 log-mel energies every 10 ms, three frames stacked: 192 values every 30 ms."""

    sampling_rate: Literal[8000, 16000] = 16000
    num_mels: int = 64
    storage: Literal["stored", "on-the-fly"] = "stored"  # on the fly: computed from the audio at every use
    resample: bool = True  # audio of another sampling rate; otherwise it is left out
    channel: int = -1  # which one of audio with several; -1: such audio is left out
    max_left_out_share: float = 0.05  # of a part's utterances that cannot be used: more is an error
    jobs: int = field(default=2, metadata=RUNTIME)


@dataclass(frozen=True)
class Conditions:
    """Training conditions: copies of utterances beside the originals, each with its own features."""

    parts: tuple[str, ...] = ("human",)
    speeds: tuple[float, ...] = ()  # a copy at each, for instance [0.9, 1.1]
    noise_folder: str = ""  # of audio files; a copy with one of them added
    snr_db: tuple[float, ...] = (20.0, 15.0, 10.0, 5.0)  # at one of these; dev and test: a copy at each
    impulse_response_folder: str = ""  # of audio files; a copy reverberated by one of them


@dataclass(frozen=True)
class Align:
    """Which phone every frame belongs to: from the transcripts, or from alignments brought along."""

    source: Literal["cuts", "transcripts", "kaldi", "ctm", "textgrid"] = "cuts"
    folder: str = ""  # kaldi, ctm, textgrid: holds human/ dev/ test/, or all in one
    snip_edges: bool = True  # kaldi: how its frames were made (the default of compute-mfcc-feats)
    frame_shift_seconds: float = 0.01  # kaldi: 0.03 for the alignments of a chain model
    unknown_word: str = (
        ""  # transcripts: the lexicon's word for words it lacks; empty: the utterance is left out
    )
    states: int = 3  # transcripts: emitting states of a phone in the Gaussian models
    monophone_gaussians: int = 1000
    triphone_leaves: int = 1000
    triphone_gaussians: int = 5000
    monophone_iterations: int = 25
    triphone_iterations: int = 20
    beam: float = 40.0
    max_dropped_share: float = 0.1  # of a part's utterances without an alignment: more is an error
    jobs: int = field(default=2, metadata=RUNTIME)


@dataclass(frozen=True)
class Senones:
    """Triphone states tied by a decision tree. See senones.py."""

    target: int = 3000
    min_count: int = 50  # frames that every senone must have seen
    min_gain: float = 50.0  # log-likelihood a split must bring
    shared_roots: Literal["phone", "base"] = "base"  # base: AE1_B and AE0_E grow from the roots of AE
    questions: str = ""  # a file of phone sets, one a line (Kaldi's sets.txt); empty: found from the data
    kaldi_tree: str = ""  # a Kaldi folder with tree, topo (or final.mdl) and phones.txt, taken as it is


@dataclass(frozen=True)
class Network:
    """Stacked LSTM layers and one linear layer to the senones."""

    layers: int = 5
    cells: int = 768  # per direction
    bidirectional: bool = False
    output_delay_frames: int = 0  # of 30 ms: how far a unidirectional network may look ahead
    # Over all data; over all that a speaker said; or over what was heard so far, as a stream has to.
    normalisation: Literal["global", "speaker", "causal"] = "global"
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
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "> 0")
        require(self.batch_frames >= 1, "batch_frames", self.batch_frames, ">= 1")
        require(0 < self.density < 1, "density", self.density, "in (0, 1)")
        require(self.block_steps >= 1, "block_steps", self.block_steps, ">= 1")
        momentum = self.block_momentum
        require(momentum is None or 0 <= momentum < 1, "block_momentum", momentum, "in [0, 1)")


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
        require(self.k >= 1, "label.k", self.k, ">= 1")
        require(self.batch_frames >= 1, "label.batch_frames", self.batch_frames, ">= 1")


@dataclass(frozen=True)
class Student:
    """The student, and named variants of it: `[student.variants.NAME.schedule]` overrides what is here."""

    network: Network = field(default_factory=lambda: Network(output_delay_frames=4))
    schedule: Schedule = field(default_factory=Schedule)
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(method="gtc"))
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    only: str = field(default="", metadata=RUNTIME)  # train this variant alone


@dataclass(frozen=True)
class Decode:
    """WFST decoding over lexicon and language model.

    The acoustic scale (one over the language weight) and the word penalty are chosen on the development speakers.
    """

    acoustic_scales: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0, 1.4)
    word_penalties: tuple[float, ...] = (0.0,)  # cost of every word, natural logarithm
    beam: float = 15.0
    lattice_beam: float = 8.0
    max_active: int = 7000
    nbest: int = 1  # hypotheses of every test utterance that are written
    bootstrap_samples: int = 1000
    score_by: tuple[str, ...] = ("condition",)  # fields of the cuts; "speaker" is one
    speed_seconds: float = (
        60.0  # of test audio on which each network's speed is measured, on one core; 0: not
    )
    jobs: int = field(default=2, metadata=RUNTIME)

    def __post_init__(self) -> None:
        scales = self.acoustic_scales
        require(scales and min(scales) > 0, "decode.acoustic_scales", list(scales), "one or more, each > 0")
        require(self.beam > 0, "decode.beam", self.beam, "> 0")
        require(self.max_active >= 1, "decode.max_active", self.max_active, ">= 1")
        require(self.bootstrap_samples >= 1, "decode.bootstrap_samples", self.bootstrap_samples, ">= 1")
        require(self.jobs >= 1, "decode.jobs", self.jobs, ">= 1")
        require(self.lattice_beam > 0, "decode.lattice_beam", self.lattice_beam, "> 0")
        require(self.nbest >= 1, "decode.nbest", self.nbest, ">= 1")
        require(self.word_penalties, "decode.word_penalties", list(self.word_penalties), "one or more")
        require(self.speed_seconds >= 0, "decode.speed_seconds", self.speed_seconds, ">= 0")


@dataclass(frozen=True)
class Distributed:
    """Without a launcher, `workers` in-process workers train; under a launcher its workers do."""

    workers: int = 1
    # Of launched workers; in-process ones have one each. More are faster on large models, and change last bits.
    threads_per_worker: int = 1
    timeout_seconds: float = field(default=600.0, metadata=RUNTIME)

    def __post_init__(self) -> None:
        require(self.workers >= 1, "distributed.workers", self.workers, ">= 1")
        require(
            self.threads_per_worker >= 1, "distributed.threads_per_worker", self.threads_per_worker, ">= 1"
        )
        require(self.timeout_seconds > 0, "distributed.timeout_seconds", self.timeout_seconds, "> 0")


@dataclass(frozen=True)
class Config:
    folder: str = field(default="experiment", metadata=RUNTIME)
    seed: int = 0
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
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    config = build(Config(), tables, "")
    for override in overrides:
        config = build(config, parse_override(override), "")
    names = config.student_variants()  # here, so that a typo in one is found before anything runs
    if config.student.only and config.student.only not in names:
        raise ValueError(
            f"student.only = {config.student.only!r}: the students of this experiment are {', '.join(names)}"
        )
    return config


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
                f"unknown setting '{where}.{key}'; a variant has network, schedule, optimisation"
            )
    return table
