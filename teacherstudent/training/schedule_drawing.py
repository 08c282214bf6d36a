"""A schedule drawn in characters: for a terminal, before anything runs."""

import itertools

from teacherstudent.training.schedule import HUMAN, MACHINE, MIXED, Plan, SourceName

_LETTERS = {HUMAN: "h", MACHINE: "m", MIXED: "x"}
LEGEND = "h human-labelled, m machine-labelled, x mixed"
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def draw_turns(plan: Plan, num_steps: int = 40) -> str:
    """A letter for each of the first steps."""
    return "".join(_LETTERS[plan[step].source] for step in range(min(num_steps, len(plan))))


def draw_learning_rates(plan: Plan, width: int = 60, height: int = 4) -> list[str]:
    """For each source a picture of its learning rate over the steps, all of one scale; below, where sub-epochs end.

    A column stands for equally many steps (but for rounding) and shows the rate at the first of them that trains on
    the source, and nothing where none does. The figure is the highest rate of all steps.
    """
    width = min(width, len(plan))
    rates = {source: _sample(plan, source, width) for source in reversed(plan.sources)}
    tops = {source: _highest_rate(plan, source) for source in rates}
    highest = max(tops.values())
    labels = {source: f"{source:<7} {top:<8.3g}" for source, top in tops.items()}
    lines = []
    for source, row in rates.items():
        eighths = [max(1, round(8 * height * rate / highest)) if rate else 0 for rate in row]
        for level in reversed(range(height)):
            blocks = "".join(_EIGHTHS[min(max(each - 8 * level, 0), 8)] for each in eighths)
            label = labels[source] if level == height - 1 else ""
            lines.append(f"{label:<16}│{blocks}".rstrip())
        lines.append(f"{'':16}└{_draw_axis(plan, width)}")
    return lines


def _highest_rate(plan: Plan, source: SourceName) -> float:
    """Within the warm-up or at the first step after it: later on rates fall."""
    first, last = (plan.next_step(source, step) for step in (0, max(0, plan.schedule.warmup_steps - 1)))
    return max((_rate(plan, source, step) for step in range(first, min(last + 1, len(plan)))), default=0.0)


def _rate(plan: Plan, source: SourceName, step: int) -> float:
    return max((part.learning_rate for part in plan[step].portions if part.source == source), default=0.0)


def _sample(plan: Plan, source: SourceName, width: int) -> list[float]:
    """The source's learning rate in each column, 0 where it has no step."""
    edges = [column * len(plan) // width for column in range(width + 1)]
    found = []
    for begin, end in itertools.pairwise(edges):
        step = plan.next_step(source, begin)
        found.append(_rate(plan, source, step) if step < end else 0.0)
    return found


def _draw_axis(plan: Plan, width: int) -> str:
    """A tick in the column in which a sub-epoch ends; none where ticks would touch each other."""
    axis = ["─"] * width
    if 2 * plan.num_sub_epochs <= width:
        for number in range(1, plan.num_sub_epochs + 1):
            last = min(number * plan.schedule.validate_every_steps, len(plan)) - 1
            axis[last * width // len(plan)] = "┴"
    return "".join(axis)
