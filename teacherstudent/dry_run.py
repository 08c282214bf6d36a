"""`--dry-run`: what a training would do, with no data, inventory or worker present."""

from dataclasses import dataclass
from pathlib import Path

from teacherstudent import wheels
from teacherstudent.config import (
    Config,
    Features,
    HardLoss,
    Label,
    Loss,
    Optimisation,
    Student,
    Teacher,
    to_toml,
)
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, STACKED_FRAMES
from teacherstudent.training.models import num_parameters
from teacherstudent.training.schedule import Plan
from teacherstudent.training.schedule_drawing import LEGEND, draw_learning_rates, draw_turns


@dataclass(frozen=True)
class _Planned:
    training: Teacher | Student
    workers: int

    @property
    def plan(self) -> Plan:
        return Plan(self.training.schedule, self.training.optimisation.learning_rate)


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
        trainings["teacher"] = _Planned(config.teacher, workers)
    if step in ("student", "run"):
        for name, student in config.student_variants().items():
            if config.student.only in ("", name):
                trainings[f"student {name}"] = _Planned(student, student.workers or workers)
    return trainings


def _describe(config: Config, planned: _Planned) -> str:
    training, plan = planned.training, planned.plan
    network, optimisation = training.network, training.optimisation
    parameters = num_parameters(network, config.senones.target, _num_features(config.features))
    workers = planned.workers
    kind = "bidirectional" if network.bidirectional else "unidirectional"
    delay = f", output delay {network.output_delay_frames} frames" if network.output_delay_frames else ""
    dropout = f", dropout {network.dropout:g}" if network.dropout else ""
    return "\n".join(
        [
            f"  network     {network.layers} x {network.cells} {kind} LSTM{delay}{dropout}, {network.normalisation} "
            f"normalisation, {parameters / 1e6:.2f} M parameters with {config.senones.target} senones",
            f"  schedule    {plan.describe()}",
            f"  first steps {draw_turns(plan)} ({LEGEND})",
            *(f"              {line}" for line in draw_learning_rates(plan)),
            f"  sub-epochs  {_describe_sub_epochs(plan)}",
            f"  loss        {_describe_loss(training.loss, plan, config.label)}",
            f"  a step      {_describe_step(optimisation, plan)}",
            f"  workers     {workers} in this process without a launcher, the launched ones under one",
            f"  method      {optimisation.method}{_describe_method(optimisation, workers)}",
            f"  data        {optimisation.batch_frames} frames a step and worker: "
            + _describe_data(plan, optimisation.batch_frames, workers),
        ]
    )


def _describe_sub_epochs(plan: Plan) -> str:
    schedule = plan.schedule
    text = f"{plan.num_sub_epochs} of {min(schedule.validate_every_steps, len(plan))} steps, each with a validation"
    if schedule.held_out_utterances:
        number = schedule.held_out_utterances
        text += f", also on {number} machine-labelled utterances{_unless_used(plan, 'machine')}"
    if schedule.stop_after_validations:
        text += f"; stops after {schedule.stop_after_validations} without a lower frame error"
    if schedule.average_models:
        text += f"; the {schedule.average} {schedule.average_models} models are averaged"
    return text


def _unless_used(plan: Plan, source: str) -> str:
    return "" if source in plan.sources else ": not here, where none is trained on"


def _describe_loss(loss: HardLoss, plan: Plan, label: Label) -> str:
    """What is learnt from each source: a weight or a multiplier of it is the schedule's."""
    texts = []
    if "human" in plan.sources:
        smoothing = f", {loss.label_smoothing:g} of it for all senones alike" if loss.label_smoothing else ""
        soft = loss if isinstance(loss, Loss) and loss.soft_share else None
        teacher = f"; {100 * soft.soft_share:g} % with {_describe_posteriors(soft, label)}" if soft else ""
        texts.append(f"human: cross-entropy with the label{smoothing}{teacher}")
    if "machine" in plan.sources and isinstance(loss, Loss):
        texts.append(f"machine: cross-entropy with {_describe_posteriors(loss, label)}")
    return "; ".join(texts)


def _describe_posteriors(loss: Loss, label: Label) -> str:
    kept, stored = loss.kept or label.k, label.k or "all"
    text = f"the best {kept} of {stored} stored posteriors" if kept else "all posteriors"
    text += ", what they lack as one more class" if loss.tail else ", renormalised"
    if loss.temperature != 1:
        text += f", temperature {loss.temperature:g}"
    if loss.confidence != "none":
        weights = {"highest": "highest posterior", "kept": "sum of the kept"}
        text += f", frames weighed by the teacher's {weights[loss.confidence]}"
    if loss.confidence_floor:
        text += f", none of frames whose highest is below {loss.confidence_floor:g}"
    return text


def _describe_step(optimisation: Optimisation, plan: Plan) -> str:
    """A worker's, before anything is exchanged."""
    chunk, masking = optimisation.chunk_frames, optimisation.masking
    parts = [
        f"pieces of {chunk} frames" if chunk else "whole utterances",
        f"numeric mode {optimisation.numeric_mode}",
        f"gradient clipped to norm {optimisation.clip_norm:g}",
        f"momentum {optimisation.momentum:g}{' before compression' * optimisation.momentum_correction}",
    ]
    if masking.sources and masking.frequency_masks:
        parts.append(f"{masking.frequency_masks} masks of up to {masking.frequency_mask_mels} mel bands")
    if masking.sources and masking.time_masks:
        share = f"{masking.time_mask_frames} frames and {100 * masking.time_mask_share:g} % of the utterance"
        parts.append(f"{masking.time_masks} masks of up to {share}")
    if len(masking.sources) == 1 and (masking.frequency_masks or masking.time_masks):
        [source] = masking.sources
        parts.append(f"masks on {source}-labelled alone{_unless_used(plan, source)}")
    return ", ".join(parts)


def _describe_method(optimisation: Optimisation, workers: int) -> str:
    """The settings that it reads."""
    method = optimisation.method
    gtc = f"density {optimisation.density:g}"
    gtc += f", reached from 1e-2 in {optimisation.ramp_steps} steps" if optimisation.ramp_steps else ""
    gtc += ", multi-quantum" * optimisation.multi_quantum
    gtc += f", {optimisation.codec} messages" if optimisation.codec != "auto" else ""
    momentum = optimisation.block_momentum
    size = optimisation.group_size if method == "two-tiers" else 1
    groups = f"groups of {size} by gtc, {gtc}" if size > 1 else "groups of 1, which is bmuf"
    if workers % size:
        groups += f" (an error with {workers} workers: {size} has to divide their number)"
    default = "by their number" if workers % size else f"{1 - size / workers:.4g} with so many workers"
    blocks = f"blocks of {optimisation.block_steps} steps, block momentum "
    blocks += default if momentum is None else f"{momentum:g}"
    blocks += f", {optimisation.local_state} local state, {optimisation.wire} updates"
    texts = {"exact": "", "gtc": gtc, "bmuf": blocks, "two-tiers": f"{groups}; {blocks}"}
    exact = optimisation.exact_steps if method != "exact" else 0
    text = texts[method] + (f", after {exact} exact steps" if exact else "")
    return f": {text}" if text else ""


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
    shards = plan.schedule.machine_shards
    unused = _unless_used(plan, "machine")
    of_shards = f"; machine-labelled from the first {shards} shards alone{unused}" if shards else ""
    return f"at most {sum(hours.values()):.1f} hours of audio ({each}){of_shards}"


def _num_features(features: Features) -> int:
    return features.num_mels * STACKED_FRAMES
