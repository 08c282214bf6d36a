"""Batches made ahead, in other processes, are the same batches; what goes wrong there is told here."""

import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_audio import open_experiment, write_data
from tiny_training import make_source, make_training

from teacherstudent.data.feature_reader import open_features
from teacherstudent.data.prefetch import BatchReader, Readers, Request
from teacherstudent.data.prepare import prepare
from teacherstudent.distributed import in_process
from teacherstudent.training.batches import Batch, Position, Source
from teacherstudent.training.schedule import HUMAN, MACHINE
from teacherstudent.training.shard_table import ShardTable
from teacherstudent.training.train import train


def square(number: int) -> int:
    return number * number


def misbehave(what: str) -> str:
    """In a process of its own."""
    if what == "die":
        os._exit(7)
    if what == "hang":
        threading.Event().wait()
    if what == "complain":
        raise ValueError("utterance 'u7' has no audio")
    if what == "break":
        raise ZeroDivisionError("oh")
    return what


def numbered(asked: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        asked.append(number)
        yield number


@pytest.mark.parametrize("num_processes", [0, 2])
def test_results_come_in_order_and_no_more_is_asked_for_than_there_are_processes(num_processes: int) -> None:
    with Readers(square, num_processes) as readers:
        asked: list[int] = []
        for index, result in enumerate(readers.map(numbered(asked, 20))):
            assert result == index * index
            assert len(asked) <= index + 1 + num_processes
        assert len(asked) == 20
        outer = []
        for index, result in enumerate(readers.map(range(6))):  # as a validation inside of a training
            inner = readers.map(range(10, 15))
            outer += [result, next(inner)] if index == 3 else [result, *inner]  # given up half-way, once
        expected = []
        for index in range(6):
            expected += [index**2, *([100] if index == 3 else [n * n for n in range(10, 15)])]
        assert outer == expected


@pytest.mark.parametrize(("what", "error", "words"), [
    ("die", ValueError, r"reader 1 of 1 \(process \d+\) died with exit code 7 before it had read die"),
    ("hang", ValueError, r"reader 1 of 1 \(process \d+\) has not read hang in 3 seconds"),
    ("complain", ValueError, "^utterance 'u7' has no audio$"),
    ("break", ValueError, "ZeroDivisionError: oh"),
])  # fmt: skip
def test_what_goes_wrong_in_a_process_is_an_error_here_that_names_it(
    what: str, error: type, words: str
) -> None:
    with Readers(misbehave, 1) as readers:
        assert list(readers.map(["fine"])) == ["fine"]  # it is there
        readers._timeout_seconds = 3 if what == "hang" else 60
        with pytest.raises(error, match=words):
            list(readers.map(["fine"] * 2 + [what] + ["fine"] * 3))
        processes = [process for process, _ in readers._processes]
    assert not any(process.is_alive() for process in processes)


def test_what_a_reader_was_asked_for_is_named_in_a_line(tmp_path: Path) -> None:
    assert str(Request("human", Position(2, 30), rank=1)) == "micro-batch 31 of epoch 2 of the source 'human'"
    experiment = open_experiment(write_data(tmp_path / "data"), storage="on-the-fly")
    prepare(experiment)
    [shard, _] = open_features(experiment, "unlabelled", "causal")
    assert str(shard) == str(experiment.path("features", "unlabelled", "cuts.000000.jsonl"))


def sources(data: Path, storage: str) -> dict[str, Source]:
    """Of features on the fly, and with labels of their ids."""
    experiment = open_experiment(data, storage, storage=storage)
    prepare(experiment)
    found = {}
    for name, part in (("human", "human"), ("machine", "unlabelled")):
        shards = open_features(experiment, part, "causal")
        labels = [
            Labels(
                {
                    n: {"senone": np.full(count, row)}
                    for row, (n, count) in enumerate(zip(s.ids, s.num_frames))
                }
            )
            for s in shards
        ]
        found[name] = Source(name, shards, labels, ShardTable.make(s.num_frames for s in shards), 12, seed=1)
    return found


class Labels(dict[str, dict[str, np.ndarray]]):
    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self)

    @property
    def num_frames(self) -> np.ndarray:
        return np.array([len(arrays["senone"]) for arrays in self.values()], np.int64)


def same(one: Batch, other: Batch) -> bool:
    return pickle.dumps([None if v is None else v.numpy() for v in vars(one).values()]) == pickle.dumps(
        [None if v is None else v.numpy() for v in vars(other).values()]
    )


def test_a_training_sees_the_same_batches_stored_or_on_the_fly_ahead_or_not(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    stored = sources(data, "stored")
    computed = sources(data, "on-the-fly")
    requests = [
        Request(name, Position(epoch, index), rank)
        for epoch in range(2)
        for index in range(3)
        for name in ("human", "machine")
        for rank in range(2)
    ]
    expected = [stored[request.source].batch(request.position, request.rank) for request in requests]
    assert any(batch.num_frames == 0 for batch in expected)
    assert len({batch.features.sum().item() for batch in expected}) > 4
    for num_processes in (0, 2):
        with BatchReader(computed, num_processes) as reader:
            for (request, batch), asked, other in zip(reader.read(requests), requests, expected, strict=True):
                assert request == asked
                assert same(batch, other)


def test_batches_of_stored_labels_survive_the_journey() -> None:
    machine = {"machine": make_source("machine")}
    with BatchReader(machine, 1) as reader:
        [(_, batch)] = reader.read([Request("machine", Position(0, 0))])
    assert same(batch, machine["machine"].batch(Position(0, 0)))
    assert batch.ids is not None


def test_a_training_with_readers_writes_the_same_bytes_as_one_without(tmp_path: Path) -> None:
    written = []
    for readers in (0, 2):
        training = replace(make_training(tmp_path / f"{readers}"), readers=readers)
        sources = {name: make_source(name) for name in (HUMAN, MACHINE)}
        in_process(1, lambda comm: train(comm, training, sources, make_source(HUMAN, 3)))  # noqa: B023
        written.append([(training.folder / name).read_bytes() for name in ("best.pt", "final.pt")])
    assert written[0] == written[1]
