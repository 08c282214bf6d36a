"""`--dry-run`: what a training would do, with no data, inventory or worker present."""

from teacherstudent.config import Config, Features, Network, Optimisation, Schedule, to_toml
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, STACKED_FRAMES
from teacherstudent.training.models import num_parameters
from teacherstudent.training.schedule import Plan


def describe(config: Config, step: str) -> str:
    """The resolved configuration, then parameters, schedule and amount of data of every training of the step."""
    trainings: dict[str, tuple[Network, Schedule, Optimisation]] = {}
    if step in ("teacher", "run"):
        teacher = config.teacher
        trainings["teacher"] = (teacher.network, teacher.schedule, teacher.optimisation)
    if step in ("student", "run"):
        for name, student in config.student_variants().items():
            if config.student.only in ("", name):
                trainings[f"student {name}"] = (student.network, student.schedule, student.optimisation)
    blocks = [to_toml(config).rstrip()]
    for name, (network, schedule, optimisation) in trainings.items():
        blocks.append(f"{name}\n" + _describe(config, network, schedule, optimisation))
    return "\n\n".join(blocks)


def _describe(config: Config, network: Network, schedule: Schedule, optimisation: Optimisation) -> str:
    plan = Plan(schedule, optimisation.learning_rate)
    parameters = num_parameters(network, config.senones.target, _num_features(config.features))
    workers = config.distributed.workers
    hours = len(plan) * workers * optimisation.batch_frames * FRAME_SHIFT_SECONDS / 3600
    kind = "bidirectional" if network.bidirectional else "unidirectional"
    first = "".join(plan[index].source[0] for index in range(min(40, len(plan))))
    delay = f", output delay {network.output_delay_frames} frames" if network.output_delay_frames else ""
    return "\n".join(
        [
            f"  network     {network.layers} x {network.cells} {kind} LSTM{delay}, "
            f"{parameters / 1e6:.2f} M parameters with {config.senones.target} senones",
            f"  schedule    {plan.describe()}",
            f"  first steps {first} (h human-labelled, m machine-labelled)",
            f"  workers     {workers} in this process without a launcher, the launched ones under one; "
            f"method {optimisation.method}",
            f"  data        {optimisation.batch_frames} frames a step and worker: at most {hours:.1f} hours of audio",
        ]
    )


def _num_features(features: Features) -> int:
    return features.num_mels * STACKED_FRAMES
