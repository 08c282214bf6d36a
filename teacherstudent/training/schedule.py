"""Which source each step trains on, and at which learning rate: scheduled learning as data.

Interleaved: turns of machine-labelled and of human-labelled steps, the human-labelled ones at a higher learning
rate, over an exponential decay (Parthasarathi & Strom 2019, section 4). Step s is the same on every worker.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from teacherstudent.config import Schedule
from teacherstudent.settings import require

HUMAN: Final = "human"
MACHINE: Final = "machine"
MIXED: Final = "mixed"

SourceName = Literal["human", "machine"]

# In the order in which they come where there is nothing else to go by.
_SOURCES: Mapping[str, tuple[SourceName, ...]] = {
    "interleaved": (MACHINE, HUMAN),
    "sequential": (MACHINE, HUMAN),
    "mixed": (MACHINE, HUMAN),
    "human-only": (HUMAN,),
    "machine-only": (MACHINE,),
}


@dataclass(frozen=True)
class Portion:
    """What one source gives to a step: a micro-batch, and what its loss counts there."""

    source: SourceName
    loss_weight: float
    learning_rate: float  # the smooth decay times the source's multiplier


@dataclass(frozen=True)
class Step:
    """One step's portions, one unless sources are mixed; the learning rate of the optimiser; the gradient's multiplier.

    The multiplier is applied to the gradient, not to the optimiser's learning rate: with momentum the latter would
    apply the human-labelled steps' rate to what the steps before have gathered, and the machine-labelled steps'
    rate to most of the human gradient. With plain SGD the two are the same. Where sources are mixed the gradient is
    that of both: its multiplier is 1, and each source's multiplier is a part of its portion's loss weight, so that
    the gradient's clipping sees it.
    """

    portions: tuple[Portion, ...]
    base_learning_rate: float
    multiplier: float

    @property
    def source(self) -> Literal["human", "machine", "mixed"]:
        return self.portions[0].source if len(self.portions) == 1 else MIXED

    @property
    def learning_rate(self) -> float:
        return self.base_learning_rate * self.multiplier


class Plan:
    """The schedule of one training: `plan[step]`, `len(plan)`."""

    def __init__(self, schedule: Schedule, learning_rate: float) -> None:
        require(learning_rate > 0, "learning_rate", learning_rate, "> 0")
        require(schedule.mode in _SOURCES, "schedule.mode", schedule.mode, f"one of {', '.join(_SOURCES)}")
        self.schedule, self.base_learning_rate = schedule, learning_rate
        self._machine_first = schedule.mode != "sequential" or schedule.sequence == "machine-human"
        self._num_first = self.num_steps(MACHINE if self._machine_first else HUMAN)

    def __len__(self) -> int:
        return self.schedule.steps

    @property
    def sources(self) -> tuple[SourceName, ...]:
        return _SOURCES[self.schedule.mode]

    @property
    def num_sub_epochs(self) -> int:
        return self.schedule.num_sub_epochs

    def __getitem__(self, step: int) -> Step:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a schedule of {len(self)}")  # ends `for now in plan`, too
        rate = self._learning_rate(step)
        if self.schedule.mode == MIXED:
            portions = [
                Portion(source, self._loss_weight(source) * multiplier, rate * multiplier)
                for source, multiplier in ((source, self._multiplier(source)) for source in self.sources)
            ]
            return Step(tuple(portions), rate, 1.0)
        source = self._source(step)
        multiplier = self._multiplier(source)
        return Step((Portion(source, self._loss_weight(source), rate * multiplier),), rate, multiplier)

    def num_steps(self, source: SourceName) -> int:
        """That train on the source."""
        num_human = self.schedule.count_human_steps()
        if source == HUMAN or self.schedule.mode == MIXED:
            return num_human
        return len(self) - num_human

    def batch_frames(self, source: SourceName, batch_frames: int) -> int:
        """Of the source in one step, where a worker takes batch_frames in all: mixed, its turn's share of them."""
        if self.schedule.mode != MIXED:
            return batch_frames
        human, machine = self.schedule.human_turn_steps, self.schedule.machine_turn_steps
        share = (human if source == HUMAN else machine) / (human + machine)
        return max(1, round(share * batch_frames))

    def next_step(self, source: SourceName, step: int) -> int:
        """The first one from `step` on that trains on the source; len(self), or a later one, if there is none."""
        schedule = self.schedule
        if source not in self.sources or step >= len(self):
            return len(self)
        if self._source(step) == source or schedule.mode == MIXED:
            return step
        if schedule.mode == "sequential":
            return self._num_first if step < self._num_first else len(self)
        begin = schedule.machine_turn_steps if source == HUMAN else 0
        return step + (begin - step) % (schedule.machine_turn_steps + schedule.human_turn_steps)

    @property
    def round_steps(self) -> int:
        """A turn of each source, where they take turns."""
        schedule = self.schedule
        return (
            schedule.machine_turn_steps + schedule.human_turn_steps if schedule.mode == "interleaved" else 1
        )

    def has_met_all(self, step: int) -> bool:
        """Whether the steps before this one have trained on every source, or were of modes that take turns."""
        return self.schedule.mode != "sequential" or step > self._num_first

    def _source(self, step: int) -> SourceName:
        schedule = self.schedule
        if schedule.mode == "interleaved":
            in_turn = step % (schedule.machine_turn_steps + schedule.human_turn_steps)
            return MACHINE if in_turn < schedule.machine_turn_steps else HUMAN
        if schedule.mode == "sequential":
            return MACHINE if (step < self._num_first) == self._machine_first else HUMAN
        return HUMAN if schedule.mode == "human-only" else MACHINE

    def _learning_rate(self, step: int) -> float:
        schedule = self.schedule
        done = step / max(1, schedule.steps - 1)
        if schedule.decay == "sub-epoch":
            done = step // schedule.validate_every_steps / max(1, self.num_sub_epochs - 1)
        decay = schedule.final_learning_rate_ratio**done
        warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
        return self.base_learning_rate * decay * warmup

    def _multiplier(self, source: SourceName) -> float:
        """One source alone has no other to be set against: there the multiplier is 1."""
        if len(self.sources) == 1:
            return 1.0
        schedule = self.schedule
        human, machine = schedule.human_learning_rate_multiplier, schedule.machine_learning_rate_multiplier
        return human if source == HUMAN else machine

    def _loss_weight(self, source: SourceName) -> float:
        """As the multiplier, 1 for one source alone."""
        if len(self.sources) == 1:
            return 1.0
        return self.schedule.human_loss_weight if source == HUMAN else self.schedule.machine_loss_weight

    def describe(self) -> str:
        """For people, before anything runs."""
        schedule = self.schedule
        first, last = self._learning_rate(schedule.warmup_steps), self._learning_rate(len(self) - 1)
        warmup = (
            f", warm-up over {schedule.warmup_steps} steps, to {first:g}" if schedule.warmup_steps else ""
        )
        aligned = ", turns aligned to blocks" if schedule.align_turns_to_blocks else ""
        steady = ", constant in a sub-epoch" if schedule.decay == "sub-epoch" else ""
        rates = f"learning rate {self.base_learning_rate:g} decaying to {last:g}"
        return f"{schedule.mode}: {self._describe_sources()}; {len(self)} steps, {rates}{steady}{warmup}{aligned}"

    def _describe_sources(self) -> str:
        schedule = self.schedule
        if len(self.sources) == 1:
            return f"{self.sources[0]}-labelled steps only"
        turns = {MACHINE: schedule.machine_turn_steps, HUMAN: schedule.human_turn_steps}
        if schedule.mode == MIXED:
            text = f"{turns[MACHINE]} machine-labelled frames to {turns[HUMAN]} human-labelled in every step"
        else:
            if schedule.mode == "sequential":
                turns = {source: self.num_steps(source) for source in self.sources}
            order = (MACHINE, HUMAN) if self._machine_first else (HUMAN, MACHINE)
            text = " then ".join(f"{turns[source]} {source}-labelled" for source in order) + " steps"
        for source in reversed(self.sources):
            if source == HUMAN or self._multiplier(source) != 1:
                text += f", {source} at {self._multiplier(source):g} x the learning rate"
            if self._loss_weight(source) != 1:
                text += f", {source} loss times {self._loss_weight(source):g}"
        return text
