"""`--dry-run`: what a training would do, with no data, inventory or worker present."""

from dataclasses import dataclass
from pathlib import Path

from teacherstudent import wheels
from teacherstudent.config import Config, Features, Network, Optimisation, Schedule, to_toml
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, STACKED_FRAMES
from teacherstudent.training.models import num_parameters
from teacherstudent.training.schedule import Plan
from teacherstudent.training.schedule_drawing import LEGEND, draw_learning_rates, draw_turns


@dataclass(frozen=True)
class _Planned:
    network: Network
    schedule: Schedule
    optimisation: Optimisation
    workers: int

    @property
    def plan(self) -> Plan:
        return Plan(self.schedule, self.optimisation.learning_rate)


def describe(config: Config, step: str) -> str:
    """The resolved configuration, then parameters, schedule and amount of data of every training of the step."""
    blocks = [to_toml(config).rstrip()]
    blocks += [f"{name}\n" + _describe(config, planned) for name, planned in _trainings(config, step).items()]
    return "\n\n".join(blocks)


def draw(config: Config, step: str, path: Path) -> None:
    """The schedules of the step's trainings as a picture: PNG, SVG or PDF by the path's suffix.

    Raises ValueError for another suffix, and without matplotlib.
    """
    wheels.load("matplotlib", "report")
    from teacherstudent.reporting.report_figures import save_schedules

    save_schedules([(name, planned.plan) for name, planned in _trainings(config, step).items()], path)


def _trainings(config: Config, step: str) -> dict[str, _Planned]:
    trainings: dict[str, _Planned] = {}
    workers = config.distributed.workers
    if step in ("teacher", "run"):
        teacher = config.teacher
        trainings["teacher"] = _Planned(teacher.network, teacher.schedule, teacher.optimisation, workers)
    if step in ("student", "run"):
        for name, student in config.student_variants().items():
            if config.student.only in ("", name):
                trainings[f"student {name}"] = _Planned(
                    student.network, student.schedule, student.optimisation, student.workers or workers
                )
    return trainings


def _describe(config: Config, planned: _Planned) -> str:
    network, optimisation, plan = planned.network, planned.optimisation, planned.plan
    parameters = num_parameters(network, config.senones.target, _num_features(config.features))
    workers = planned.workers
    kind = "bidirectional" if network.bidirectional else "unidirectional"
    delay = f", output delay {network.output_delay_frames} frames" if network.output_delay_frames else ""
    return "\n".join(
        [
            f"  network     {network.layers} x {network.cells} {kind} LSTM{delay}, "
            f"{parameters / 1e6:.2f} M parameters with {config.senones.target} senones",
            f"  schedule    {plan.describe()}",
            f"  first steps {draw_turns(plan)} ({LEGEND})",
            *(f"              {line}" for line in draw_learning_rates(plan)),
            f"  sub-epochs  {_describe_sub_epochs(plan)}",
            f"  workers     {workers} in this process without a launcher, the launched ones under one; "
            f"method {optimisation.method}",
            f"  data        {optimisation.batch_frames} frames a step and worker: "
            + _describe_data(plan, optimisation.batch_frames, workers),
        ]
    )


def _describe_sub_epochs(plan: Plan) -> str:
    schedule = plan.schedule
    text = f"{plan.num_sub_epochs} of {min(schedule.validate_every_steps, len(plan))} steps, each with a validation"
    if schedule.held_out_utterances and "machine" in plan.sources:
        text += f", also on {schedule.held_out_utterances} machine-labelled utterances"
    if schedule.stop_after_validations:
        text += f"; stops after {schedule.stop_after_validations} without a lower frame error"
    if schedule.average_models:
        text += f"; the {schedule.average} {schedule.average_models} models are averaged"
    return text


def _describe_data(plan: Plan, batch_frames: int, workers: int) -> str:
    """Batches are filled as far as whole utterances do: it may be less."""
    hours = {
        source: plan.num_steps(source)
        * plan.batch_frames(source, batch_frames)
        * workers
        * FRAME_SHIFT_SECONDS
        / 3600
        for source in plan.sources
    }
    each = ", ".join(
        f"{source} {plan.num_steps(source)} steps, {hours[source]:.1f} hours" for source in plan.sources
    )
    shards = plan.schedule.machine_shards if "machine" in plan.sources else 0
    of_shards = f"; machine-labelled from the first {shards} shards alone" if shards else ""
    return f"at most {sum(hours.values()):.1f} hours of audio ({each}){of_shards}"


def _num_features(features: Features) -> int:
    return features.num_mels * STACKED_FRAMES
