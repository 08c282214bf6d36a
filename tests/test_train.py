"""A training is its plan and its batches alone: the same bytes however often it was interrupted."""

import itertools
import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import NETWORK, NUM_SENONES, STEPS, VALIDATE_EVERY, make_source, make_training
from torch.nn import functional

from teacherstudent.config import Loss
from teacherstudent.distributed import Communicator, connect, in_process
from teacherstudent.training import checkpoint
from teacherstudent.training.batches import Batch, Position, Source
from teacherstudent.training.gradient import batch_loss
from teacherstudent.training.models import build_model, model_from_state
from teacherstudent.training.schedule import HUMAN, MACHINE
from teacherstudent.training.train import Training, train
from teacherstudent.training.workers import METHODS

torch.set_num_threads(1)

FILES = ("best.pt", "final.pt", "log.jsonl")


class Interruption(Exception):
    pass


class Breaking:
    """A source that raises when its worker begins a step."""

    def __init__(self, source: Source, calls: "itertools.count[int]", step: int) -> None:
        self.source, self.calls, self.step = source, calls, step
        self.taken: list[tuple[int, int]] = []  # epoch and micro-batch of every step

    def batch(self, position: Position, rank: int) -> Batch:
        if next(self.calls) == self.step:
            raise Interruption
        self.taken.append((position.epoch, position.consumed + rank))
        return self.source.batch(position, rank)

    def advance(self, position: Position, num_workers: int) -> Position:
        return self.source.advance(position, num_workers)


def train_on(
    comm: Communicator, training: Training, step: int = -1, rank: int = 1
) -> dict[str, list[tuple[int, int]]]:
    """On this worker; `rank` is interrupted when it begins its `step`th step from here. What it took of each source."""
    calls = itertools.count(0 if comm.rank == rank else STEPS)
    sources = {name: Breaking(make_source(name), calls, step) for name in (HUMAN, MACHINE)}
    train(comm, training, sources, make_source("dev", 3))
    return {name: source.taken for name, source in sources.items()}


def train_together(training: Training, num_workers: int = 2, **interruption: int) -> None:
    in_process(num_workers, lambda comm: train_on(comm, training, **interruption), timeout_seconds=30)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What a training that nobody interrupts leaves, by method."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for method in METHODS:
        train_together(make_training(folder / method, method))
    return {method: contents(folder / method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_training_interrupted_at_any_step_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, dict[str, bytes]], method: str
) -> None:
    for step in (0, 3, 4, 5, 10, 11, 18, STEPS - 1):
        training = make_training(tmp_path / str(step), method)
        with pytest.raises(Interruption):
            train_together(training, step=step, rank=step % 2)
        train_together(training)
        assert contents(training.folder) == undisturbed[method], step


def test_two_tiers_interrupted_at_any_step_end_with_the_same_bytes(tmp_path: Path) -> None:
    train_together(make_training(tmp_path / "undisturbed", "two-tiers", group_size=2), 4)
    for step in (3, 5, 10):
        training = make_training(tmp_path / str(step), "two-tiers", group_size=2)
        with pytest.raises(Interruption):
            train_together(training, 4, step=step, rank=3)
        train_together(training, 4)
        assert contents(training.folder) == contents(tmp_path / "undisturbed"), step


@pytest.mark.parametrize("method", METHODS)
def test_a_training_interrupted_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, dict[str, bytes]], method: str
) -> None:
    training = make_training(tmp_path, method)
    for _ in range(STEPS // VALIDATE_EVERY):
        with pytest.raises(Interruption):
            train_together(training, step=VALIDATE_EVERY + 1)
    train_together(training)
    assert contents(tmp_path) == undisturbed[method]


def test_a_training_interrupted_before_any_write_of_a_file_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, survived = checkpoint.save, 0
    for number in itertools.count():
        writes = itertools.count()

        def breaking(path: Path, what: object, writes=writes, number=number) -> None:
            if next(writes) == number:
                raise Interruption
            save(path, what)

        training = make_training(tmp_path / str(number), "bmuf")
        monkeypatch.setattr(checkpoint, "save", breaking)
        try:
            train_together(training)
            break
        except Interruption:
            survived += 1
        monkeypatch.setattr(checkpoint, "save", save)
        train_together(training)
        assert contents(training.folder) == undisturbed["bmuf"], number
    assert survived > 2 * STEPS // VALIDATE_EVERY


def test_a_training_that_is_done_changes_nothing_when_it_is_started_again(
    tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    training = make_training(tmp_path, "bmuf")
    train_together(training)
    train_together(training)
    assert contents(tmp_path) == undisturbed["bmuf"]


@pytest.mark.parametrize(
    ("method", "num_workers"),
    [(method, number) for method in METHODS for number in (1, 3) if (method, number) != ("two-tiers", 1)],
)
@pytest.mark.filterwarnings("ignore:(GTC|BMUF) with one worker")
@pytest.mark.filterwarnings("ignore:this BMUF state was saved by 2 workers inside a block")
def test_going_on_with_another_number_of_workers_takes_every_micro_batch_once(
    tmp_path: Path, method: str, num_workers: int
) -> None:
    training = make_training(tmp_path, method)
    with pytest.raises(Interruption):
        train_together(training, step=VALIDATE_EVERY)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*what they held is lost")
        ranks = in_process(num_workers, lambda comm: train_on(comm, training), timeout_seconds=30)
    assert read_log(tmp_path)[-1]["step"] == STEPS
    num_steps = Counter(training.plan[step].source for step in range(VALIDATE_EVERY))
    for name in (HUMAN, MACHINE):
        source, position = make_source(name), Position()
        taken = []
        for _ in range(num_steps[name]):  # by the two workers
            taken += [(position.epoch, position.consumed + rank) for rank in range(2)]
            position = source.advance(position, 2)
        taken += [place for rank in ranks for place in rank[name]]
        assert len(set(taken)) == len(taken)
        last = max(epoch for epoch, _ in taken)
        for epoch in range(last):
            dealt = {place for place in taken if place[0] == epoch}
            assert dealt >= {(epoch, number) for number in range(source.num_batches(epoch))}


def plain_training(training: Training, num_workers: int) -> dict[str, torch.Tensor]:
    """The mean over all frames of a step, each worker's gradient clipped, and torch's own SGD."""
    settings = training.optimisation
    model = build_model(training.network, NUM_SENONES, training.normalisation, training.seed)
    optimizer = torch.optim.SGD(model.parameters(), settings.learning_rate, settings.momentum)
    sources = {name: make_source(name) for name in (HUMAN, MACHINE)}
    dealt = {name: [] for name in sources}  # epoch after epoch, each ending with a step of its own
    for name, source in sources.items():
        for epoch in range(STEPS):
            batches = [source.batch(Position(epoch, index)) for index in range(source.num_batches(epoch))]
            dealt[name] += [batches[i : i + num_workers] for i in range(0, len(batches), num_workers)]
    for step in range(STEPS):
        now = training.plan[step]
        batches = dealt[now.source].pop(0)
        mean = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for batch in batches:
            model.zero_grad()
            logits = model(batch.features, batch.lengths)
            (batch_loss(logits, batch)[0] / batch.num_frames).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            share = batch.num_frames / sum(other.num_frames for other in batches)
            for total, parameter in zip(mean, model.parameters()):
                total += share * parameter.grad
        for total, parameter in zip(mean, model.parameters()):
            parameter.grad = now.multiplier * total
        optimizer.param_groups[0]["lr"] = now.base_learning_rate
        optimizer.step()
    return model.state_dict()


def test_workers_together_do_what_one_plain_loop_does_also_where_an_epoch_ends_inside_a_step(
    tmp_path: Path,
) -> None:
    assert make_source(HUMAN).num_batches(0) % 2 == 1
    training = make_training(tmp_path, network=replace(NETWORK, dropout=0.0))
    train_together(training)
    weights = model_from_state(checkpoint.load(tmp_path / "final.pt")).state_dict()
    torch.testing.assert_close(weights, plain_training(training, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_all_workers_end_with_the_same_model_also_where_some_had_no_data(tmp_path: Path, method: str) -> None:
    train_together(make_training(tmp_path, method), 3)
    ranks = [checkpoint.load(tmp_path / "checkpoint" / f"step{STEPS}.rank{rank}.pt") for rank in range(3)]
    for other in ranks[1:]:
        torch.testing.assert_close(other["weights"], ranks[0]["weights"], rtol=0, atol=0)
        assert other["progress"]["positions"] == ranks[0]["progress"]["positions"]
    assert len({sum(rank["progress"]["frames"].values()) for rank in ranks}) > 1


def test_the_log_has_the_learning_rate_of_the_plan_for_each_source_and_a_loss_that_falls(
    tmp_path: Path,
) -> None:
    training = make_training(tmp_path)
    train_together(training)
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    assert {line["source"] for line in lines} == {HUMAN, MACHINE}
    for line in lines:
        last = max(s for s in range(line["step"]) if training.plan[s].source == line["source"])
        assert line["learning_rate"] == training.plan[last].learning_rate
        assert 0 < line["frame_error"] <= 100
        assert line["gradient_norm"] > 0
    assert lines[-1]["hours"] == sum(
        [line["source_hours"] for line in lines if line["source"] == name][-1] for name in (HUMAN, MACHINE)
    )
    validations = [line for line in read_log(tmp_path) if "dev_loss" in line]
    assert [line["step"] for line in validations] == [*range(VALIDATE_EVERY, STEPS, VALIDATE_EVERY), STEPS]
    assert validations[-1]["dev_loss"] < validations[0]["dev_loss"]


def test_best_is_the_first_model_of_the_lowest_frame_error_on_the_development_speakers(
    tmp_path: Path,
) -> None:
    training = make_training(tmp_path, "gtc", rate=8.0)  # so high that better and worse models come in turn
    train_together(training)
    validations = [line for line in read_log(tmp_path) if "dev_loss" in line]
    best = min(validations, key=lambda line: line["dev_frame_error"])
    assert best not in (validations[0], validations[-1], min(validations, key=lambda line: line["dev_loss"]))
    state = checkpoint.load(tmp_path / "best.pt")
    wanted = {"of": "test", "step": best["step"], "seed": 3, "numeric_mode": "fp32"}
    assert state["provenance"] == wanted
    dev, model = make_source("dev", 3), model_from_state(state)
    with torch.no_grad():
        losses = [
            float(batch_loss(model(batch.features, batch.lengths), batch)[0])
            for batch in (dev.batch(Position(0, index)) for index in range(dev.num_batches(0)))
        ]
    assert sum(losses) / dev.total_frames == pytest.approx(best["dev_loss"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cause", ["learning rate", "training features", "development features"])
def test_a_training_that_diverges_tells_every_worker_its_name_and_learning_rate(
    tmp_path: Path, method: str, cause: str
) -> None:
    training = make_training(tmp_path, method, rate=1e6 if cause == "learning rate" else 0.3)

    def attempt(comm: Communicator) -> str:
        sources = {name: make_source(name, nan=cause == "training features") for name in (HUMAN, MACHINE)}
        with pytest.raises(ValueError) as error:
            train(comm, training, sources, make_source("dev", 3, nan=cause == "development features"))
        return str(error.value)

    messages = in_process(2, attempt, timeout_seconds=30)
    assert messages[0] == messages[1]
    assert "student x" in messages[0]
    assert f"learning_rate than {training.optimisation.learning_rate:g}" in messages[0]
    assert not (tmp_path / "final.pt").exists()


def test_human_labels_give_the_senone_loss_and_machine_labels_the_posterior_loss_and_both_frame_errors() -> (
    None
):
    logits = torch.randn(1, 12, NUM_SENONES, generator=torch.Generator().manual_seed(0))
    log_softmax = functional.log_softmax(logits[0], dim=1)
    human = make_source(HUMAN, 2, 1).batch(Position(0, 0))
    expected = -sum(float(log_softmax[t, int(human.senones[0, t])]) for t in range(human.num_frames))
    wrong = sum(int(log_softmax[t].argmax()) != int(human.senones[0, t]) for t in range(human.num_frames))
    loss, errors = batch_loss(logits[:, : human.num_frames], human)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert errors == wrong
    machine = make_source(MACHINE, 2, 1).batch(Position(0, 0))
    expected = -sum(
        float(machine.probabilities[0, t, k] * log_softmax[t, int(machine.ids[0, t, k])])
        for t in range(machine.num_frames)
        for k in range(2)
    )
    loss, errors = batch_loss(logits[:, : machine.num_frames], machine)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert errors == sum(
        int(log_softmax[t].argmax()) != int(machine.ids[0, t, 0]) for t in range(machine.num_frames)
    )


def test_both_targets_of_a_frame_share_its_loss_and_its_errors_are_the_labels() -> None:
    human = make_source(HUMAN, 2, 1).batch(Position(0, 0))
    ids = torch.stack([human.senones, (human.senones + 1) % NUM_SENONES], dim=2).flip(2)
    probabilities = torch.tensor([0.75, 0.25]).expand(ids.shape)
    both = replace(human, ids=ids, probabilities=probabilities)
    machine = replace(both, senones=None)
    shape = (1, human.num_frames, NUM_SENONES)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (hard, wrong), (soft, _) = batch_loss(logits, human), batch_loss(logits, machine, Loss(temperature=2.0))
    loss, errors = batch_loss(logits, both, Loss(soft_share=0.25, temperature=2.0))
    assert float(loss) == pytest.approx(0.75 * float(hard) + 0.25 * float(soft), rel=1e-5)
    assert errors == wrong
    assert float(batch_loss(logits, both)[0]) == float(hard)


def test_logits_of_half_precision_have_the_loss_of_their_values_in_float32() -> None:
    for name in (HUMAN, MACHINE):
        batch = make_source(name, 2, 1).batch(Position(0, 0))
        logits = torch.randn(1, batch.num_frames, NUM_SENONES).bfloat16()
        loss = batch_loss(logits, batch)[0]
        assert loss.dtype == torch.float32
        assert torch.equal(loss, batch_loss(logits.float(), batch)[0])


def test_the_loss_of_the_settings_is_what_is_trained_with(tmp_path: Path) -> None:
    found = []
    for name, loss in (("plain", Loss()), ("smooth", Loss(label_smoothing=0.3)), ("first", Loss(kept=1))):
        training = replace(make_training(tmp_path / name), loss=loss)
        sources = {source: make_source(source) for source in (HUMAN, MACHINE)}
        train(connect(), training, sources, make_source("dev", 4))
        found.append(checkpoint.load(tmp_path / name / "final.pt")["weights"]["output.weight"])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
