"""Schedules of every mode, early stopping, held-out speech and averaged models, in whole trainings."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_training import NETWORK, NUM_SENONES, SCHEDULE, STEPS, VALIDATE_EVERY, make_source, make_training

from teacherstudent.config import Schedule
from teacherstudent.distributed import Communicator, in_process
from teacherstudent.training import checkpoint
from teacherstudent.training.batches import Batch, Position, Source
from teacherstudent.training.gradient import batch_loss
from teacherstudent.training.models import build_model, model_from_state
from teacherstudent.training.schedule import HUMAN, MACHINE, Plan
from teacherstudent.training.train import Training, train

torch.set_num_threads(1)

NAMES = (MACHINE, HUMAN)


class Interruption(Exception):
    pass


class Recording:
    """A source that notes every micro-batch that is made, and raises at one of them."""

    def __init__(self, source: Source, breaks_at: int = -1) -> None:
        self.source, self.breaks_at, self.taken = source, breaks_at, []

    def batch(self, position: Position, rank: int = 0) -> Batch:
        if len(self.taken) == self.breaks_at:
            raise Interruption
        self.taken.append((position.epoch, position.consumed + rank))
        return self.source.batch(position, rank)

    def advance(self, position: Position, num_workers: int) -> Position:
        return self.source.advance(position, num_workers)


def scheduled(
    folder: Path, method: str = "exact", rate: float = 0.3, dropout: float = 0.2, **changed
) -> Training:
    schedule = dataclasses.replace(SCHEDULE, **changed)
    training = make_training(folder, method, dataclasses.replace(NETWORK, dropout=dropout), rate)
    return dataclasses.replace(training, plan=Plan(schedule, rate))


def open_sources(schedule: Schedule) -> dict[str, Source]:
    plan = Plan(schedule, 0.1)
    return {name: make_source(name, batch_frames=plan.batch_frames(name, 30)) for name in plan.sources}


def run(
    training: Training, num_workers: int = 2, breaks_at: int = -1
) -> list[dict[str, list[tuple[int, int]]]]:
    """What each worker took of each source."""

    def work(comm: Communicator) -> dict[str, list[tuple[int, int]]]:
        opened = open_sources(training.plan.schedule)
        sources = {
            name: Recording(source, breaks_at if (comm.rank, name) == (1, MACHINE) else -1)
            for name, source in opened.items()
        }
        train(comm, training, sources, make_source("dev", 3), make_source(MACHINE, 4))
        return {name: source.taken for name, source in sources.items()}

    return in_process(num_workers, work, timeout_seconds=60)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def deal(source: Source, num_workers: int) -> "itertools.chain[Sequence[Batch]]":
    """Epoch after epoch, the micro-batches of a step; an epoch's last step may have fewer than there are workers."""
    return itertools.chain.from_iterable(
        [
            [
                source.batch(Position(epoch, i))
                for i in range(begin, min(begin + num_workers, source.num_batches(epoch)))
            ]
            for begin in range(0, source.num_batches(epoch), num_workers)
        ]
        for epoch in itertools.count()
    )


def train_plainly(training: Training, num_workers: int) -> dict[str, torch.Tensor]:
    """Each step from the settings: the frames' mean of weighted losses on each worker, clipped; then their mean."""
    schedule, settings = training.plan.schedule, training.optimisation
    multipliers = {
        HUMAN: schedule.human_learning_rate_multiplier,
        MACHINE: schedule.machine_learning_rate_multiplier,
    }
    weights = {HUMAN: schedule.human_loss_weight, MACHINE: schedule.machine_loss_weight}
    model = build_model(training.network, NUM_SENONES, training.normalisation, training.seed)
    optimizer = torch.optim.SGD(model.parameters(), settings.learning_rate, settings.momentum)
    dealt = {name: deal(source, num_workers) for name, source in open_sources(schedule).items()}
    mixed = schedule.mode == "mixed"
    for step in range(len(training.plan)):
        names = NAMES if mixed else (training.plan[step].source,)
        taken = {name: next(dealt[name]) for name in names}
        sums, total = [torch.zeros_like(parameter) for parameter in model.parameters()], 0
        for rank in range(num_workers):
            parts = {name: batches[rank] for name, batches in taken.items() if rank < len(batches)}
            num_frames = sum(batch.num_frames for batch in parts.values())
            if not num_frames:
                continue
            losses = [
                weights[name]
                * (multipliers[name] if mixed else 1)
                * batch_loss(model(batch.features, batch.lengths), batch)[0]
                for name, batch in parts.items()
            ]
            optimizer.zero_grad()
            (sum(losses) / num_frames).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            factor = 1 if mixed else multipliers[names[0]]
            for each, parameter in zip(sums, model.parameters(), strict=True):
                each += factor * num_frames * parameter.grad
            total += num_frames
        for each, parameter in zip(sums, model.parameters(), strict=True):
            parameter.grad = each / total
        optimizer.param_groups[0]["lr"] = training.plan[step].base_learning_rate
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("mode", ["mixed", "sequential", "interleaved"])
def test_every_mode_does_what_a_plain_loop_does_with_its_multipliers_and_loss_weights(
    tmp_path: Path, mode: str
) -> None:
    training = scheduled(
        tmp_path,
        mode=mode,
        dropout=0.0,
        steps=11,
        human_learning_rate_multiplier=3.0,
        machine_learning_rate_multiplier=0.5,
        human_loss_weight=0.25,
        machine_loss_weight=2.0,
    )
    run(training)
    weights = model_from_state(checkpoint.load(tmp_path / "final.pt")).state_dict()
    torch.testing.assert_close(weights, train_plainly(training, 2), rtol=1e-4, atol=1e-5)


def test_mixed_takes_every_micro_batch_of_both_sources_in_order_on_all_workers(tmp_path: Path) -> None:
    training = scheduled(tmp_path, mode="mixed", steps=12)
    ranks = run(training, 3)
    for name, source in open_sources(training.plan.schedule).items():
        position = Position()
        for step in range(12):
            for rank in range(3):
                assert ranks[rank][name][step] == (position.epoch, position.consumed + rank)
            position = source.advance(position, 3)


@pytest.mark.parametrize("method", ["gtc", "bmuf"])
@pytest.mark.parametrize("which", ["last", "best"])
def test_a_mixed_training_that_is_interrupted_ends_with_the_same_bytes_and_averaged_models(
    tmp_path: Path, method: str, which: str
) -> None:
    settings = {"mode": "mixed", "average_models": 3, "average": which, "rate": 2.0}
    whole = scheduled(tmp_path / "whole", method, **settings)
    run(whole)
    broken = scheduled(tmp_path / "broken", method, **settings)
    for breaks_at in (4, 8, 5):  # in each run
        with pytest.raises(Interruption):
            run(broken, breaks_at=breaks_at)
    run(broken)
    run(broken)  # is done: changes nothing
    expected = contents(whole.folder)
    assert set(expected) == {"best.pt", "final.pt", "averaged.pt", "log.jsonl"}
    assert contents(broken.folder) == expected
    errors = {line["step"]: line["dev_frame_error"] for line in read_log(whole.folder) if "dev_loss" in line}
    chosen = (
        list(errors)[-3:] if which == "last" else sorted(sorted(errors, key=lambda s: (errors[s], s))[:3])
    )
    assert checkpoint.load(whole.folder / "averaged.pt")["provenance"]["averaged_steps"] == chosen
    assert len(list(whole.checkpoints.glob("model*.pt"))) == 3


def test_the_average_of_one_last_model_is_the_final_one(tmp_path: Path) -> None:
    training = scheduled(tmp_path, "bmuf", average_models=1)
    run(training)
    averaged, final = (checkpoint.load(tmp_path / name)["weights"] for name in ("averaged.pt", "final.pt"))
    assert all(torch.equal(averaged[name], final[name]) for name in final)


@pytest.mark.parametrize("method", ["exact", "bmuf"])
def test_a_training_stops_when_no_validation_was_better_for_long(tmp_path: Path, method: str) -> None:
    whole = scheduled(tmp_path / "whole", method, rate=8.0)  # so high that it soon gets worse
    run(whole)
    errors = [line["dev_frame_error"] for line in read_log(whole.folder) if "dev_loss" in line]
    ends = [
        number
        for number in range(2, len(errors))
        if min(errors[number - 1 : number + 1]) >= min(errors[: number - 1])
    ]
    assert ends[0] < len(errors) - 2, "or nothing is tested"
    stopping = scheduled(tmp_path / "stopping", method, rate=8.0, stop_after_validations=2, average_models=1)
    ranks = run(stopping)
    log = read_log(stopping.folder)
    assert log[-1] == {
        "step": (ends[0] + 1) * VALIDATE_EVERY,
        "stopped": "no lower frame error in 2 validations",
    }
    assert [line["dev_frame_error"] for line in log if "dev_loss" in line] == errors[: ends[0] + 1]
    assert {sum(map(len, taken.values())) for taken in ranks} == {log[-1]["step"]}
    final, validated = (checkpoint.load(stopping.folder / f"{name}.pt") for name in ("final", "averaged"))
    assert all(torch.equal(validated["weights"][name], value) for name, value in final["weights"].items())
    assert final["provenance"]["step"] == log[-1]["step"]
    before = contents(stopping.folder)
    assert sum(map(len, run(stopping)[0].values())) == 0  # started again, it stays where it stopped
    assert contents(stopping.folder) == before


def test_one_source_after_the_other_is_not_stopped_before_the_other_has_come(tmp_path: Path) -> None:
    run(scheduled(tmp_path, rate=8.0, mode="sequential", stop_after_validations=1))
    lines = read_log(tmp_path)
    [stopped] = [line["step"] for line in lines if "stopped" in line]
    assert "human" in {line["source"] for line in lines if "loss" in line}
    num_machine = scheduled(tmp_path, mode="sequential").plan.num_steps(MACHINE)
    errors = [line["dev_frame_error"] for line in lines if "dev_loss" in line and line["step"] <= num_machine]
    assert any(later >= earlier for earlier, later in itertools.pairwise(errors)), "or nothing is tested"
    assert stopped > num_machine


def test_a_training_that_gets_better_is_not_stopped(tmp_path: Path) -> None:
    run(scheduled(tmp_path, stop_after_validations=SCHEDULE.num_sub_epochs - 2))
    assert read_log(tmp_path)[-1]["step"] == STEPS
    assert not any("stopped" in line for line in read_log(tmp_path))


def test_the_model_is_validated_on_both_sources_and_held_out_speech_decides_nothing(tmp_path: Path) -> None:
    training = scheduled(tmp_path, "gtc", rate=2.0)
    run(training)
    lines = [line for line in read_log(tmp_path) if "held_out_loss" in line or "dev_loss" in line]
    best = min((line for line in lines if "dev_loss" in line), key=lambda line: line["dev_frame_error"])
    model = model_from_state(checkpoint.load(tmp_path / "best.pt"))
    for name, source, place in (
        (HUMAN, make_source("dev", 3), "dev"),
        (MACHINE, make_source(MACHINE, 4), "held_out"),
    ):
        (line,) = (line for line in lines if line["source"] == name and line["step"] == best["step"])
        loss, errors = 0.0, 0
        for index in range(source.num_batches(0)):
            batch = source.batch(Position(0, index))
            logits = model(batch.features, batch.lengths)
            loss += float(batch_loss(logits, batch)[0].detach())
            labels = batch.senones if name == HUMAN else batch.ids[..., 0]
            for row, length in enumerate(batch.lengths.tolist()):
                errors += int((logits[row, :length].argmax(dim=1) != labels[row, :length]).sum())
        assert line[f"{place}_loss"] == pytest.approx(loss / source.total_frames, rel=1e-5)
        assert line[f"{place}_frame_error"] == pytest.approx(100 * errors / source.total_frames)
    assert checkpoint.load(tmp_path / "best.pt")["provenance"]["step"] == best["step"]


def test_the_log_tells_each_sources_hours_rate_and_norm_also_where_they_are_mixed(tmp_path: Path) -> None:
    training = scheduled(tmp_path, mode="mixed", steps=10, validate_every_steps=10)
    run(training, 1)
    lines = {line["source"]: line for line in read_log(tmp_path) if "loss" in line}
    for name, source in open_sources(training.plan.schedule).items():
        position, num_frames = Position(), 0
        for _ in range(10):
            num_frames += source.batch(position).num_frames
            position = source.advance(position, 1)
        assert lines[name]["source_hours"] == pytest.approx(num_frames * 0.03 / 3600)
    assert lines[HUMAN]["learning_rate"] == 2 * lines[MACHINE]["learning_rate"] == pytest.approx(0.06)
    assert lines[HUMAN]["gradient_norm"] == lines[MACHINE]["gradient_norm"] > 0
    assert lines[HUMAN]["hours"] == lines[HUMAN]["source_hours"] + lines[MACHINE]["source_hours"]


def test_a_training_that_another_version_began_is_refused_saying_what_to_remove(tmp_path: Path) -> None:
    training = scheduled(tmp_path, steps=6)
    run(training)
    for path in training.checkpoints.glob("step*.pt"):
        saved = checkpoint.load(path)
        del saved["progress"]["averaged"]
        checkpoint.save(path, saved)
    with pytest.raises(ValueError, match=r"another version of teacherstudent.*remove .* and train again"):
        run(training)
