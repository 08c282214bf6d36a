"""The sections of the configuration about data: speech, features, conditions, alignments, senones. See config.py."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

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
    require,
)


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
    # Trainings hear another noise, at the same ratio, or another room in every epoch; features.storage = "on-the-fly".
    redraw: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("speeds", "snr_db"):
            values = list(getattr(self, name))
            require(len(set(values)) == len(values), f"conditions.{name}", values, "different numbers")
        require(1.0 not in self.speeds, "conditions.speeds", list(self.speeds), "other than 1, the original")
        needed = "one or more numbers, since there is a conditions.noise_folder"
        require(self.snr_db or not self.noise_folder, "conditions.snr_db", [], needed)
        needed = "false, since there is no conditions.noise_folder or impulse_response_folder to draw from"
        drawn_from = self.noise_folder or self.impulse_response_folder
        require(drawn_from or not self.redraw, "conditions.redraw", True, needed)


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
