"""The table of shards knows how many micro-batches there will be, and nothing of who is in them."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.training.shard_table import BINS_PER_OCTAVE, ShardTable

lengths = st.one_of(st.integers(0, 40), st.integers(41, 5000), st.integers(10**5, 10**6))
tables = st.lists(st.lists(lengths, max_size=12), min_size=1, max_size=9)


def make(shards: Sequence[Sequence[int]]) -> ShardTable:
    return ShardTable.make(np.array(shard, np.int64) for shard in shards)


def deal(utterances: Sequence[int], table: ShardTable, batch_frames: int) -> list[list[int]]:
    """By the letter: the longest that is left opens a micro-batch and says how many it takes."""
    left, batches = sorted(utterances, reverse=True), []
    while left:
        size = int(table.find_sizes(np.array(left[:1]), batch_frames)[0])
        batches.append(left[:size])
        left = left[size:]
    return batches


@settings(max_examples=200, deadline=None)
@given(tables, st.integers(1, 9000), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_table_counts_as_many_micro_batches_as_are_dealt(shards, batch_frames, window, random) -> None:
    table = make(shards)
    order = random.sample(range(len(shards)), len(shards))
    counted = table.count_batches(np.array(order), window, batch_frames)
    dealt = []
    for start in range(0, len(order), window):
        together = [length for shard in order[start : start + window] for length in shards[shard]]
        batches = deal(together, table, batch_frames)
        assert all(len(batch) * batch[0] <= batch_frames or len(batch) == 1 for batch in batches)
        dealt.append(len(batches))
    assert counted.tolist() == dealt


@settings(max_examples=60, deadline=None)
@given(tables)
def test_utterances_frames_and_lengths_are_those_of_the_shards(shards) -> None:
    table = make(shards)
    assert table.num_shards == len(shards)
    assert table.num_utterances.tolist() == [len(shard) for shard in shards]
    assert table.total_frames == sum(map(sum, shards))
    for number, shard in enumerate(shards):
        assert table.describes(number, np.array(shard[::-1], np.int64))
        assert not table.describes(number, np.array([*shard, 7]))
        assert not table.describes(number, np.array([*shard, 10**7]))
        assert not shard or not table.describes(number, np.array([shard[0] + 1, *shard[1:]]))


def test_micro_batches_are_as_full_as_with_the_lengths_themselves_but_for_a_few_percent() -> None:
    random = np.random.default_rng(3)
    seconds = {
        "read aloud": np.clip(random.normal(12.3, 3.8, 20000), 1.3, 16.5),
        "spontaneous": np.clip(random.lognormal(1.6, 0.8, 20000), 0.4, 40),
        "cut every 30 s": np.where(random.random(20000) < 0.8, 30, random.uniform(1, 30, 20000)),
    }
    for name, of_corpus in seconds.items():
        frames = np.ceil(of_corpus / 0.03).astype(np.int64)
        table = make([frames.tolist()])
        for batch_frames in (1000, 4000, 8000):
            count = int(table.count_batches(np.array([0]), 1, batch_frames)[0])
            ranked, exact, start = np.sort(frames)[::-1], 0, 0
            while start < len(ranked):
                start, exact = start + max(1, batch_frames // int(ranked[start])), exact + 1
            assert exact <= count <= 1.04 * exact, (name, batch_frames)


def test_bins_are_narrow_and_short_utterances_have_one_each() -> None:
    every = np.arange(1, 60_000)
    sizes = make([every.tolist()]).find_sizes(every, 10**15)
    longest = 10**15 // sizes  # of the bin, to within rounding
    assert (longest >= every - 1).all()
    assert (longest <= np.maximum(every, every * 2 ** (1 / BINS_PER_OCTAVE)) + 1).all()
    assert (sizes[:16] == 10**15 // every[:16]).all()


def test_a_saved_table_is_the_same_and_its_file_too(tmp_path: Path) -> None:
    shards = [[3, 400, 5], [], [77] * 20]
    path = tmp_path / "shard_table.npy"
    make(shards).save(path)
    written = path.read_bytes()
    table = ShardTable.load(path)
    travelled = pickle.loads(pickle.dumps(table))
    for other in (table, travelled, pickle.loads(pickle.dumps(make(shards)))):
        assert all(other.describes(number, np.array(shard, np.int64)) for number, shard in enumerate(shards))
        assert other.count_batches(np.arange(3), 2, 500).tolist() == [2, 4]
        assert other.total_frames == 408 + 1540
    assert len(pickle.dumps(table)) < 500
    table.save(path)
    assert path.read_bytes() == written
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_rows_can_be_replaced_for_one_table_without_changing_another_or_the_file(tmp_path: Path) -> None:
    path = tmp_path / "shard_table.npy"
    make([[3, 400, 5], [6], [7, 7]]).save(path)
    for table in (make([[3, 400, 5], [6], [7, 7]]), ShardTable.load(path)):
        fewer = table.replace({0: np.array([3]), 1: np.zeros(0, np.int64)})
        for one in (fewer, pickle.loads(pickle.dumps(fewer))):
            assert one.num_utterances.tolist() == [1, 0, 2]
            assert one.total_frames == 3 + 14
            assert one.describes(0, np.array([3]))
        assert fewer.replace({2: np.array([7])}).num_utterances.tolist() == [1, 0, 1]
        first = table.replace({0: np.array([5])}, num_shards=2)
        assert pickle.loads(pickle.dumps(first)).num_utterances.tolist() == [1, 1]
        assert table.num_utterances.tolist() == ShardTable.load(path).num_utterances.tolist() == [3, 1, 2]
        assert table.total_frames == ShardTable.load(path).total_frames == 428


def test_what_is_no_table_or_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard_table.npy"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"shard_table.npy is damaged: .* Remove it"):
        ShardTable.load(path)
    for wrong in (np.zeros((3, 3), np.uint32), np.ones((3, 3)), np.ones(3, np.uint32)):
        np.save(path, wrong)
        with pytest.raises(ValueError, match="is no table of shards of version 1: remove it"):
            ShardTable.load(path)
    with pytest.raises(ValueError, match="shard 1 has 3000000000 frames, a table counts up to"):
        make([[3], [1_500_000_000] * 2])
