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
from typing import Annotated, Any, Literal

import tomli_w

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
from teacherstudent.training_settings import Schedule


@dataclass(frozen=True)
class Corpus(Section):
    """Speech made by espeak-ng: many speakers, made noise. See corpus.py."""

    text: str = "grammar"  # of a voice assistant; "pseudo-words"; or the path of a word list, a word a line
    vocabulary: Count = 3000  # pseudo-words, or words of the list, that are said
    phones: Literal["plain", "position-stress"] = "plain"  # AE, or AE1_B: stressed, first of its word
    human_speakers: Count = 3
    unlabelled_speakers: Count = 15
    dev_speakers: Count = 4
    test_speakers: Count = 6
    human_minutes: Positive = 10.0
    unlabelled_minutes: Positive = 120.0
    dev_minutes: Positive = 6.0
    test_minutes: Positive = 15.0
    snr_db: tuple[Finite, ...] = (20.0, 10.0)  # every noisy utterance is made at one of these
    noisy_share: Share = 0.5  # of human-labelled and unlabelled utterances; dev and test have every condition
    shard_minutes: Positive = 10.0
    split: Natural = 0  # another number draws other speakers and deals them to other parts
    jobs: Count = field(default=2, metadata=RUNTIME)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.text, "corpus.text", self.text, "'grammar', 'pseudo-words' or the path of a word list")
        ratios = list(self.snr_db)
        require(len(set(ratios)) == len(ratios), "corpus.snr_db", ratios, "different numbers")
        needed = f"one or more numbers, for instance [10.0], since corpus.noisy_share = {self.noisy_share}"
        require(ratios or not self.noisy_share, "corpus.snr_db", ratios, needed)


@dataclass(frozen=True)
class Data(Section):
    """Where the audio is. Empty: the corpus step makes it, in the experiment folder. See sources.py.

    A part is a folder of lhotse cuts (cuts.000000.jsonl, …, used in place), a single cuts.jsonl(.gz) or a lhotse Shar
    folder, a Kaldi data folder (wav.scp, text, utt2spk, …), or a folder of WAV and FLAC files with transcripts.txt
    (`utterance word word …` a line; an utterance's id is its file's name).
    """

    folder: str = ""  # holds human/ unlabelled/ dev/ test/ with lexicon.txt beside them
    human: str = ""  # parts and files that lie elsewhere
    unlabelled: str = ""
    dev: str = ""
    test: str = ""
    lexicon: str = ""  # default: FOLDER/lexicon.txt
    # *.arpa, *.arpa.gz, or text, a sentence a line; default: what FOLDER has of lm.arpa, lm.arpa.gz, lm_text.txt, in
    # this order; else the human-labelled transcripts
    language_model: str = ""
    word_positions: bool = False  # mark the lexicon's phones by their place in the word: _B _I _E, _S alone
    shard_utterances: Count = 1000  # of parts that are not sharded cuts already


@dataclass(frozen=True)
class Features(Section):
    """64 log-mel energies every 10 ms, three frames stacked: 192 values every 30 ms."""

    sampling_rate: Literal[8000, 16000] = 16000
    num_mels: Count = 64
    storage: Literal["stored", "on-the-fly"] = "stored"  # on the fly: computed from the audio at every use
    resample: bool = True  # audio of another sampling rate; otherwise it is left out
    channel: Annotated[int, Range(-1)] = -1  # which one of audio with several; -1: such audio is left out
    max_left_out_share: Share = 0.05  # of a part's utterances that cannot be used: more is an error
    jobs: Count = field(default=2, metadata=RUNTIME)  # processes: of prepare, and of each reader on the fly


@dataclass(frozen=True)
class Conditions(Section):
    """Training conditions: copies of utterances beside the originals, each with its own features. See conditions.py."""

    parts: tuple[Literal["human", "unlabelled", "dev", "test"], ...] = ("human",)
    # Times as fast: a copy at each, for instance [0.9, 1.1].
    speeds: tuple[Annotated[float, Range(0.5, 2)], ...] = ()
    noise_folder: str = ""  # of WAV and FLAC files, at any depth; a copy with one of them added
    snr_db: tuple[Finite, ...] = (20.0, 15.0, 10.0, 5.0)  # at one of these; dev and test: a copy at each
    impulse_response_folder: str = ""  # of WAV and FLAC files; a copy reverberated by one of them

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("speeds", "snr_db"):
            values = list(getattr(self, name))
            require(len(set(values)) == len(values), f"conditions.{name}", values, "different numbers")
        require(1.0 not in self.speeds, "conditions.speeds", list(self.speeds), "other than 1, the original")
        needed = "one or more numbers, since there is a conditions.noise_folder"
        require(self.snr_db or not self.noise_folder, "conditions.snr_db", [], needed)


@dataclass(frozen=True)
class Align(Section):
    """Which phone every frame belongs to: from the transcripts, or from alignments brought along."""

    source: Literal["cuts", "transcripts", "kaldi", "ctm", "textgrid"] = "cuts"
    folder: str = ""  # kaldi, ctm, textgrid: holds human/ dev/ test/, or all in one
    snip_edges: bool = (
        True  # kaldi, ctm: how Kaldi made its frames; a CTM of true times: false, and a shift of 0.01
    )
    frame_shift_seconds: Annotated[float, Range(0, 0.1, above=True)] = 0.01  # 0.03: of a chain model
    # Transcripts: the lexicon's word for words it lacks; empty: the utterance is left out
    unknown_word: str = ""
    # The rest but the last two: transcripts. Gaussian models, which only find where phones begin. See flat_start.py.
    # Of human-labelled speech, in shards evenly spread, that the models are fitted to.
    training_hours: Positive = 50.0
    states: Annotated[int, Range(1, 9)] = 3  # of a phone, 10 ms or more each; silence: twice as many
    monophone_gaussians: Count = 1000  # at most, with a hundred frames of 10 ms for each; so for triphones
    monophone_iterations: Count = 15
    triphone_leaves: Natural = 1000  # tied states, at most; 0: monophones alone
    triphone_gaussians: Count = 5000
    triphone_iterations: Count = 10
    beam: Positive = 40.0  # of the search for the best path; ten times as wide if it finds none
    max_dropped_share: Share = 0.1  # of a part's utterances without an alignment: more is an error
    jobs: Count = field(default=2, metadata=RUNTIME)

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = f"the folder that holds the alignments, since align.source = {self.source!r}"
        require(self.folder or self.source in ("cuts", "transcripts"), "align.folder", self.folder, needed)


@dataclass(frozen=True)
class Senones(Section):
    """Triphone states tied by a decision tree. See senones.py."""

    target: Count = 3000  # leaves of the tree; where merging some loses nothing, fewer senones stay
    min_count: Count = 50  # frames that every senone must have seen
    min_gain: NotNegative = 50.0  # log-likelihood a split must bring
    shared_roots: Literal["phone", "base"] = "base"  # base: AE1_B and AE0_E grow from the roots of AE
    # A file of phone sets, one a line (Kaldi's extra_questions.txt); empty: found from the data.
    questions: str = ""
    kaldi_tree: str = ""  # a Kaldi folder with tree, topo (or final.mdl) and phones.txt, taken as it is
    jobs: Count = field(default=2, metadata=RUNTIME)

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = (
            "empty, since senones.kaldi_tree is set: a tree that is taken as it is asks its own questions"
        )
        require(not (self.questions and self.kaldi_tree), "senones.questions", self.questions, needed)


@dataclass(frozen=True)
class Network(Section):
    """Stacked LSTM layers and one linear layer to the senones."""

    layers: Count = 5
    cells: Count = 768  # per direction
    bidirectional: bool = False
    output_delay_frames: Natural = 0  # of 30 ms: how far a unidirectional network may look ahead
    # Over all data; over all that a speaker said; or over what was heard so far, as a stream has to.
    normalisation: Literal["global", "speaker", "causal"] = "global"
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # between layers, one mask an utterance

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = "0, since a bidirectional network sees the whole utterance"
        unneeded = self.bidirectional and self.output_delay_frames
        require(not unneeded, "network.output_delay_frames", self.output_delay_frames, needed)


@dataclass(frozen=True)
class Optimisation(Section):
    """How one step is taken, and how the workers share it."""

    method: Literal["exact", "gtc", "bmuf", "two-tiers"] = "exact"
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    clip_norm: Positive = 1.0  # of each worker's gradient, before any exchange
    batch_frames: Count = 4000  # frames of 30 ms a worker takes in one step
    # Gtc: share of gradient elements sent.
    density: Annotated[float, Range(0, 1, above=True, below=True)] = 1e-3
    multi_quantum: bool = False  # gtc: send all that has grown past the threshold, not one quantum a step
    momentum_correction: bool = False  # gtc: momentum on every worker before compression, not after it
    ramp_steps: Natural = 0  # gtc: over so many steps the density goes down from 1e-2
    exact_steps: Natural = 0  # gtc, bmuf: so many first steps average exactly
    codec: Literal["auto", "words", "rice", "bitmap", "dense"] = (
        "auto"  # gtc: of messages; auto takes fewest bytes
    )
    block_steps: Count = 50  # bmuf
    block_momentum: Annotated[float, Range(0, 1, below=True)] | None = None  # bmuf: default 1 - 1/workers
    local_state: Literal["keep", "reset", "average"] = "keep"  # bmuf: the workers' momentum at a block's end
    wire: Literal["full", "bf16", "fp16", "int8"] = (
        "full"  # bmuf: what updates travel as, with error feedback
    )
    group_size: Count = 1  # two-tiers: workers that share every step by gtc; bmuf across such groups

    def __post_init__(self) -> None:
        super().__post_init__()
        corrects = self.momentum_correction and self.method != "gtc"
        require(not corrects, "optimisation.momentum_correction", True, "false: it belongs to method = 'gtc'")


@dataclass(frozen=True)
class Teacher(Section):
    network: Network = field(default_factory=lambda: Network(cells=832, bidirectional=True))
    schedule: Schedule = field(default_factory=lambda: Schedule(mode="human-only"))
    optimisation: Optimisation = field(default_factory=Optimisation)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_blocks(self.schedule, self.optimisation, "teacher")


@dataclass(frozen=True)
class Label(Section):
    """The teacher's posteriors over the unlabelled shards, the k highest of each frame kept. See label.py."""

    k: Count = 20
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
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    only: str = field(default="", metadata=RUNTIME)  # train this variant alone

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_blocks(self.schedule, self.optimisation, "student")


def _check_blocks(schedule: Schedule, optimisation: Optimisation, where: str) -> None:
    if optimisation.method in ("bmuf", "two-tiers"):
        schedule.check_blocks(optimisation.block_steps, optimisation.exact_steps, where)


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
        needed = "false: corpus.phones = 'position-stress' marks them already"
        require(not (self.data.word_positions and marked), "data.word_positions", True, needed)

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
        tables = merge(tables, parse_override(override))
    config = build(Config(), tables, "")
    names = config.student_variants()  # here, so that a typo in one is found before anything runs
    if config.student.only and config.student.only not in names:
        raise ValueError(
            f"student.only = {config.student.only!r}: the students of this experiment are {', '.join(names)}"
        )
    needed = f"the teacher or a student of this experiment: {', '.join(['teacher', *names])}"
    require(config.decode.only in ("", "teacher", *names), "decode.only", config.decode.only, needed)
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
                f"unknown setting '{where}.{key}'; a variant has network, schedule, optimisation, workers"
            )
    return table
