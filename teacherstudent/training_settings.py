"""The settings of a training's course: which source each step takes, how fast, and when the training looks up."""

from dataclasses import dataclass
from typing import Annotated, Literal

from teacherstudent.settings import Count, Natural, Positive, Range, Section, require


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
    stop_after_validations: Natural = 0  # so many without a lower frame error end the training; 0: none does
    average_models: Natural = (
        0  # of so many validations, in averaged.pt: the mean of their weights; 0: not made
    )
    average: Literal["last", "best"] = "last"  # of which

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = f"below steps, which is {self.steps}"
        require(self.warmup_steps < self.steps, "schedule.warmup_steps", self.warmup_steps, needed)

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
