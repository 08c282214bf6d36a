"""Which source each step trains on, and at which learning rate: scheduled learning as data.

Interleaved: turns of machine-labelled and of human-labelled steps, the human-labelled ones at a higher learning
rate, over an exponential decay (Parthasarathi & Strom 2019, section 4). Step s is the same on every worker.
"""

from dataclasses import dataclass
from typing import Final, Literal

from teacherstudent.config import Schedule
from teacherstudent.settings import require

HUMAN: Final = "human"
MACHINE: Final = "machine"


@dataclass(frozen=True)
class Step:
    """One step's source, and its learning rate: the smooth decay times the source's multiplier.

    The multiplier is applied to the gradient, not to the optimiser's learning rate: with momentum the latter would
    apply the human-labelled steps' rate to what the steps before have gathered, and the machine-labelled steps'
    rate to most of the human gradient. With plain SGD the two are the same.
    """

    source: Literal["human", "machine"]
    base_learning_rate: float
    multiplier: float

    @property
    def learning_rate(self) -> float:
        return self.base_learning_rate * self.multiplier


class Plan:
    """The schedule of one training: `plan[step]`, `len(plan)`."""

    def __init__(self, schedule: Schedule, learning_rate: float) -> None:
        require(learning_rate > 0, "learning_rate", learning_rate, "> 0")
        self.schedule, self.base_learning_rate = schedule, learning_rate

    def __len__(self) -> int:
        return self.schedule.steps

    @property
    def sources(self) -> tuple[str, ...]:
        modes = {"human-only": (HUMAN,), "machine-only": (MACHINE,), "interleaved": (MACHINE, HUMAN)}
        return modes[self.schedule.mode]

    def __getitem__(self, step: int) -> Step:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a schedule of {len(self)}")  # ends `for now in plan`, too
        source = self._source(step)
        return Step(source, self._learning_rate(step), self._multiplier(source))

    def _source(self, step: int) -> Literal["human", "machine"]:
        schedule = self.schedule
        if schedule.mode == "interleaved":
            in_turn = step % (schedule.machine_turn_steps + schedule.human_turn_steps)
            return MACHINE if in_turn < schedule.machine_turn_steps else HUMAN
        return HUMAN if schedule.mode == "human-only" else MACHINE

    def _learning_rate(self, step: int) -> float:
        schedule = self.schedule
        decay = schedule.final_learning_rate_ratio ** (step / max(1, schedule.steps - 1))
        warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
        return self.base_learning_rate * decay * warmup

    def _multiplier(self, source: str) -> float:
        """One source alone has no other to be set against: there the multiplier is 1."""
        interleaved_human = self.schedule.mode == "interleaved" and source == HUMAN
        return self.schedule.human_learning_rate_multiplier if interleaved_human else 1.0

    def describe(self) -> str:
        """For people, before anything runs."""
        schedule = self.schedule
        turns = (
            f"{schedule.machine_turn_steps} machine-labelled then {schedule.human_turn_steps} human-labelled steps, "
            f"human at {schedule.human_learning_rate_multiplier:g} x the learning rate"
            if schedule.mode == "interleaved"
            else f"{self.sources[0]}-labelled steps only"
        )
        first, last = self._learning_rate(schedule.warmup_steps), self._learning_rate(len(self) - 1)
        warmup = f", warm-up over {schedule.warmup_steps} steps" if schedule.warmup_steps else ""
        return f"{schedule.mode}: {turns}; {len(self)} steps, learning rate {first:g} to {last:g}{warmup}"
