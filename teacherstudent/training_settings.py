"""The settings of a training: its network, the course that it takes, how a step is made, and what is learnt from it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from teacherstudent.settings import Count, Natural, Positive, Range, Section, Share, require

LEAST_CHUNK_FRAMES = 16  # see divide in models.py


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
class Schedule(Section):
    """Which source each step trains on, and at which learning rate. Every worker is on the same source in every step.

    See training/schedule.py.
    """

    # interleaved: turns of both sources; sequential: one after the other, as many steps of each as interleaved gives;
    # mixed: both in every step, each with its turn's share of optimisation.batch_frames.
    mode: Literal["interleaved", "sequential", "mixed", "human-only", "machine-only"] = "interleaved"
    steps: Count = 10000
    machine_turn_steps: Count = 3
    human_turn_steps: Count = 1
    sequence: Literal["machine-human", "human-machine"] = "machine-human"  # sequential
    # bmuf, two-tiers: a block never holds steps of two sources; turns that are no whole blocks are an error.
    align_turns_to_blocks: bool = False
    machine_shards: Natural = 0  # of the machine-labelled data, the first so many; 0: all
    # Of each source where there are two: one alone has no other to be set against. A multiplier scales the clipped
    # gradient, a loss weight the loss before it; where sources are mixed, both scale the loss.
    human_learning_rate_multiplier: Positive = 2.0
    machine_learning_rate_multiplier: Positive = 1.0
    human_loss_weight: Positive = 1.0
    machine_loss_weight: Positive = 1.0
    # Exponential decay reaches it at the last step, or in the last sub-epoch.
    final_learning_rate_ratio: Annotated[float, Range(0, 1, above=True)] = 0.1
    decay: Literal["step", "sub-epoch"] = (
        "step"  # at every step, or constant in a sub-epoch but for the warm-up
    )
    warmup_steps: Natural = 0
    validate_every_steps: Count = 500  # a sub-epoch
    # Of the machine-labelled, where they are trained on: the first ones, kept for validation. See Source.hold_out.
    held_out_utterances: Natural = 0
    # So many without a lower frame error end the training; 0: none does. Sequential: none of the first source's counts.
    stop_after_validations: Natural = 0
    average_models: Natural = (
        0  # of so many validations, in averaged.pt: the mean of their weights; 0: not made
    )
    average: Literal["last", "best"] = "last"  # of which

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = f"below steps, which is {self.steps}"
        require(self.warmup_steps < self.steps, "schedule.warmup_steps", self.warmup_steps, needed)
        # The first is the best so far, and the last ends the training anyway.
        needed = (
            f"0, or at least two below {self.num_sub_epochs}, the number of validations in {self.steps} steps"
        )
        waits = self.stop_after_validations
        require(
            not waits or waits <= self.num_sub_epochs - 2, "schedule.stop_after_validations", waits, needed
        )
        needed = f"at most {self.num_sub_epochs}, the number of validations in {self.steps} steps"
        enough = self.average_models <= self.num_sub_epochs
        require(enough, "schedule.average_models", self.average_models, needed)

    @property
    def num_sub_epochs(self) -> int:
        """Each ends with a validation, and so does the last step."""
        return -(-self.steps // self.validate_every_steps)

    def count_human_steps(self) -> int:
        """Steps with human labels; the others, and all where sources are mixed, have machine labels."""
        if self.mode in ("interleaved", "sequential"):
            turns, rest = divmod(self.steps, self.machine_turn_steps + self.human_turn_steps)
            return turns * self.human_turn_steps + max(0, rest - self.machine_turn_steps)
        return 0 if self.mode == "machine-only" else self.steps

    def check_blocks(self, block_steps: int, exact_steps: int, where: str) -> None:
        """Raises ValueError where blocks would hold two sources; where: the section that the schedule is in.

        Blocks are counted from the end of the exact_steps, and anew from a sub-epoch's end when a training goes on
        from there with another number of workers.
        """
        if not self.align_turns_to_blocks or self.mode not in ("interleaved", "sequential"):
            return
        counts = {
            "schedule.machine_turn_steps": self.machine_turn_steps,
            "schedule.human_turn_steps": self.human_turn_steps,
            "schedule.validate_every_steps": self.validate_every_steps,
            "optimisation.exact_steps": exact_steps,
        }
        if self.mode == "sequential":
            counts["schedule.steps"] = self.steps
        for name, count in counts.items():
            lower = count // block_steps * block_steps
            choices = f"{lower} or {lower + block_steps}" if lower else f"{block_steps}"
            needed = (
                f"a multiple of optimisation.block_steps = {block_steps}, such as {choices}, since "
                "schedule.align_turns_to_blocks = true"
            )
            require(count % block_steps == 0, f"{where}.{name}", count, needed)


@dataclass(frozen=True)
class Masking(Section):
    """Features hidden from the network in training, other ones in every step (SpecAugment); off by default.

    The widths are those of Park et al. 2019 (their "SM") in 64 mel bands and frames of 30 ms.
    """

    frequency_masks: Natural = 0  # of an utterance
    frequency_mask_mels: Count = 12  # bands, at most
    time_masks: Natural = 0  # of an utterance
    time_mask_frames: Count = 23  # of 30 ms, at most
    time_mask_share: Share = 0.2  # of its utterance, at most
    sources: tuple[Literal["human", "machine"], ...] = ("human", "machine")  # whose utterances have masks


@dataclass(frozen=True)
class Optimisation(Section):
    """How one step is taken, and how the workers share it."""

    method: Literal["exact", "gtc", "bmuf", "two-tiers"] = "exact"
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    clip_norm: Positive = 1.0  # of each worker's gradient, before any exchange
    batch_frames: Count = 4000  # frames of 30 ms a worker takes in one step
    # Of 30 ms: utterances pass through the network in pieces of so many, and the gradient reaches no further back than
    # the piece's first frame. Memory is that of one piece. 0: whole utterances.
    chunk_frames: Natural = 0
    # Bf16: products of bfloat16, everything else in float32; auto: where every worker's processor has it.
    numeric_mode: Literal["auto", "fp32", "bf16"] = "fp32"
    masking: Masking = field(default_factory=Masking)
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
    local_state: Literal["keep", "reset", "average"] = "reset"  # bmuf: the workers' momentum at a block's end
    wire: Literal["full", "bf16", "fp16", "int8"] = (
        "full"  # bmuf: what updates travel as, with error feedback
    )
    group_size: Count = 1  # two-tiers: workers that share every step by gtc; bmuf across such groups

    def __post_init__(self) -> None:
        super().__post_init__()
        corrects = self.momentum_correction and self.method != "gtc"
        require(not corrects, "optimisation.momentum_correction", True, "false: it belongs to method = 'gtc'")
        chunk, least = self.chunk_frames, LEAST_CHUNK_FRAMES
        needed = f"0, for whole utterances, or at least {least}"
        require(not 0 < chunk < least, "optimisation.chunk_frames", chunk, needed)


@dataclass(frozen=True)
class HardLoss(Section):
    """What a network learns from human labels: cross-entropy. See losses.py."""

    # Of a label's probability, shared out evenly over all senones.
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0


@dataclass(frozen=True)
class Loss(HardLoss):
    """What the student learns, also from the teacher's posteriors: cross-entropy against those that were kept."""

    kept: Natural = 0  # the best so many of the stored ones, down to 1; 0: all that are stored
    tail: bool = (
        False  # the dropped mass is one more class, any other senone; false: the kept are renormalised
    )
    temperature: Positive = 1.0  # above 1: posteriors of teacher and student are made flatter alike
    # A machine-labelled frame counts as much as: any other; the teacher's highest posterior; the sum of the kept.
    confidence: Literal["none", "highest", "kept"] = "none"
    confidence_floor: Share = 0.0  # of the teacher's highest posterior: frames below it count nothing
    # On human-labelled data (1 - soft_share) of the loss is the labels', the rest the teacher's posteriors'.
    soft_share: Share = 0.0  # needs label.human

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = "1, since loss.tail = true: how a temperature changes the dropped mass, nobody stored"
        require(not self.tail or self.temperature == 1, "loss.temperature", self.temperature, needed)
