"""Micro-batches are a pure function of (seed, epoch, position): first_k + remaining == all, for any workers.

No shard is opened that does not hold the micro-batch asked for, and none at all to find it.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.training.batches import WINDOW_SHARDS, Batch, Position, Source, collate
from teacherstudent.training.losses import PADDING
from teacherstudent.training.shard_table import ShardTable

torch.set_num_threads(1)

Sizes = Sequence[Sequence[int]]  # frames of the utterances of each shard
SIZES = [[7, 3, 9], [], [4], [12, 1, 1, 5, 30], [2, 6]]
shards = st.lists(st.lists(st.integers(1, 30), max_size=6), min_size=1, max_size=20).filter(any)


class Shard(dict[str, dict[str, np.ndarray]]):
    """One shard in memory, by utterance."""

    @property
    def ids(self) -> Sequence[str]:
        return tuple(self)

    @property
    def num_frames(self) -> np.ndarray:
        """Of features or labels."""
        return np.array([len(next(iter(arrays.values()))) for arrays in self.values()], np.int64)

    def in_epoch(self, epoch: int) -> "Shard":
        return self


def make_shards(sizes: Sizes) -> tuple[list[Shard], list[Shard]]:
    """Features and labels: utterance number n of the source has features of n everywhere, and senone n."""
    features, labels = [Shard() for _ in sizes], [Shard() for _ in sizes]
    places = [(shard, length) for shard, lengths in enumerate(sizes) for length in lengths]
    for number, (shard, length) in enumerate(places):
        features[shard][f"u{number}"] = {"values": np.full((length, 2), number, np.float16)}
        labels[shard][f"u{number}"] = {"senone": np.full(length, number, np.int32)}
    return features, labels


def make(sizes: Sizes = SIZES, batch_frames: int = 20, seed: int = 5, name: str = "human") -> Source:
    return Source(name, *make_shards(sizes), make_table(sizes), batch_frames, seed)


def make_table(sizes: Sizes) -> ShardTable:
    return ShardTable.make(np.array(lengths, np.int64) for lengths in sizes)


def numbers(batch: Batch) -> tuple[int, ...]:
    """Which utterances a batch holds."""
    return tuple(int(row[0, 0]) for row in batch.features)


def take(source: Source, position: Position, world_size: int, steps: int) -> tuple[list, Position]:
    """The batches that are not empty of some steps, rank by rank."""
    taken = []
    for _ in range(steps):
        batches = [source.batch(position, rank) for rank in range(world_size)]
        taken += [numbers(batch) for batch in batches if batch.num_frames]
        position = source.advance(position, world_size)
    return taken, position


def whole_epoch(source: Source, world_size: int, epoch: int = 0) -> list:
    taken, position = [], Position(epoch)
    while position.epoch == epoch:
        more, position = take(source, position, world_size, 1)
        taken += more
    assert position == Position(epoch + 1, 0)
    return taken


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@settings(max_examples=25, deadline=None)
@given(sizes=shards, batch_frames=st.integers(1, 70), seed=st.integers(0, 99))
def test_an_epoch_has_every_utterance_exactly_once(
    world_size: int, sizes: Sizes, batch_frames: int, seed: int
) -> None:
    for epoch in (0, 1):
        dealt = sum(whole_epoch(make(sizes, batch_frames, seed), world_size, epoch), ())
        assert sorted(dealt) == list(range(sum(map(len, sizes))))


@settings(max_examples=60, deadline=None)
@given(shards, st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 8))
def test_the_first_k_steps_and_the_rest_are_all_also_when_the_number_of_workers_changes(
    sizes: Sizes, batch_frames: int, before: int, after: int, k: int
) -> None:
    everything = [batch for epoch in range(18) for batch in whole_epoch(make(sizes, batch_frames), 1, epoch)]
    first, position = take(make(sizes, batch_frames), Position(), before, k)
    rest, _ = take(make(sizes, batch_frames), position, after, 9)
    assert first + rest == everything[: len(first) + len(rest)]


def test_a_batch_is_the_same_in_whatever_order_and_by_whatever_rank_it_is_asked_for() -> None:
    one, other = make(), make()
    places = [(epoch, index) for epoch in (0, 1, 2) for index in range(one.num_batches(epoch))]
    in_order = {place: one.batch(Position(*place)) for place in places}
    for epoch, index in sorted(places, key=lambda place: (-place[1], place[0])):
        rank = min(index, 2)
        again = other.batch(Position(epoch, index - rank), rank)
        assert torch.equal(again.features, in_order[epoch, index].features)


def test_seed_epoch_and_source_each_give_another_order() -> None:
    sizes = [[5] * 12, [6] * 12]
    orders = [whole_epoch(make(sizes), 1), whole_epoch(make(sizes), 1, epoch=1)]
    orders += [whole_epoch(make(sizes, seed=6), 1), whole_epoch(make(sizes, name="machine"), 1)]
    assert len({tuple(order) for order in orders}) == 4
    companies = [{frozenset(batch) for batch in order} for order in orders]
    assert companies[0] != companies[1]  # not the batches alone are shuffled, but who is in them


@settings(max_examples=50, deadline=None)
@given(sizes=shards, batch_frames=st.integers(1, 70))
def test_padded_frames_never_exceed_the_bound_but_for_one_long_utterance(
    sizes: Sizes, batch_frames: int
) -> None:
    source = make(sizes, batch_frames)
    for index in range(source.num_batches(0)):
        batch = source.batch(Position(0, index))
        rows, longest, _ = batch.features.shape
        assert rows * longest <= batch_frames or rows == 1
        assert longest == batch.lengths[0] == batch.lengths.max()
    equal = make([[10] * 14], batch_frames=40)
    assert sorted(map(len, whole_epoch(equal, 1))) == [2, 4, 4, 4]  # and they are as full as can be


class Counted(list[Shard]):
    """Shards, and how often each was opened."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(shards)
        self.opened: list[int] = []

    def __getitem__(self, number: int) -> Shard:  # type: ignore[override]
        self.opened.append(number)
        return super().__getitem__(number)


def make_counted(sizes: Sizes, batch_frames: int = 25) -> tuple[Source, Counted]:
    features, labels = make_shards(sizes)
    counted = Counted(features)
    return Source("human", counted, labels, make_table(sizes), batch_frames, 5), counted


def test_each_shard_is_opened_once_an_epoch_a_window_at_a_time_and_none_to_find_a_position() -> None:
    num_shards = 2 * WINDOW_SHARDS + 3
    source, shards = make_counted([[3, 4, 5]] * num_shards)
    utterances: list[int] = []
    for index in range(source.num_batches(0)):
        utterances += numbers(source.batch(Position(0, index)))
        assert (
            len(shards.opened) <= WINDOW_SHARDS + len(utterances) // 3
        )  # no later one before all of these are read
    assert sorted(shards.opened) == list(range(num_shards))
    assert [utterance // 3 for utterance in utterances] != sorted(utterance // 3 for utterance in utterances)
    shards.opened.clear()
    position = Position(1, source.num_batches(1) - 1)
    assert source.advance(Position(1, 5), 8) == Position(1, 13)
    assert source.advance(position, 8) == Position(2, 0)
    assert not shards.opened
    source.batch(position)
    assert len(shards.opened) == 3  # those of the last window


def test_shards_without_utterances_are_never_opened_and_whole_windows_of_them_are_passed_over() -> None:
    sizes: list[list[int]] = [[] for _ in range(5 * WINDOW_SHARDS)]
    sizes[7], sizes[70] = [9, 4], [6]
    source, shards = make_counted(sizes, batch_frames=1)
    for world_size in (1, 8):
        assert sorted(whole_epoch(source, world_size)) == [(0,), (1,), (2,)]
    assert set(shards.opened) == {7, 70}


def test_a_source_travels_without_what_it_has_opened_and_makes_the_same_batches(tmp_path: Path) -> None:
    sizes = [[int(n) for n in np.random.default_rng(s).integers(1, 40, 30)] for s in range(40)]
    make_table(sizes).save(tmp_path / "table.npy")
    table = ShardTable.load(tmp_path / "table.npy")
    source = Source("human", *make_shards(sizes), table, 90, 5)
    source = source.hold_out(20)[0]
    expected = [source.batch(Position(1, index)) for index in (0, 77, 12)]
    travelled = pickle.loads(pickle.dumps(source))
    for index, batch in zip((0, 77, 12), expected):
        assert torch.equal(travelled.batch(Position(1, index)).features, batch.features)
    assert travelled.num_batches(3) == source.num_batches(3)
    assert len(pickle.dumps(source.table)) < 40 * 30  # its file's name and the rows that differ


@settings(max_examples=20, deadline=None)
@given(shards, st.integers(1, 40), st.integers(1, 6))
def test_what_is_held_out_is_the_beginning_and_the_rest_is_trained_on(
    sizes: Sizes, batch_frames: int, num_utterances: int
) -> None:
    sizes = [*sizes, [3] * 60]  # at least six are a tenth
    source = make(sizes, batch_frames)
    rest, held = source.hold_out(num_utterances)
    assert sorted(sum(whole_epoch(held, 2), ())) == list(range(num_utterances))
    assert sorted(sum(whole_epoch(rest, 3, 4), ())) == list(range(num_utterances, source.num_utterances))
    assert rest.num_utterances + held.num_utterances == source.num_utterances
    assert rest.total_frames + held.total_frames == source.total_frames == sum(map(sum, sizes))
    assert whole_epoch(source, 1) == whole_epoch(make(sizes, batch_frames), 1)  # it is as it was


def test_the_first_shards_alone_are_a_source_of_their_own() -> None:
    whole, alone = make(SIZES), make(SIZES[:3])
    first = pickle.loads(pickle.dumps(whole.take_first(3)))
    for epoch in range(3):
        assert whole_epoch(first, 2, epoch) == whole_epoch(alone, 2, epoch)
    rest, held = make([*SIZES[:3], [3] * 60, [7] * 9]).take_first(4).hold_out(2)
    assert rest.num_utterances + held.num_utterances == sum(map(len, SIZES[:3])) + 60
    for asked in (0, 6):
        with pytest.raises(ValueError, match=f"machine_shards = {asked}: source 'human' has 5 shards"):
            whole.take_first(asked)
    with pytest.raises(ValueError, match="holds no utterance"):
        make([[], [3]]).take_first(1)


def test_no_more_than_a_tenth_is_held_out_and_that_is_told() -> None:
    with pytest.warns(UserWarning, match="held_out_utterances = 40: that is more than a tenth of the 35"):
        _, held = make([[5] * 35]).hold_out(40)
    assert held.num_utterances == 3
    for sizes, asked in (([[5] * 9], 1), ([[5] * 35], 0)):
        with pytest.raises(ValueError, match=f"got {asked} utterances to hold out of"):
            make(sizes).hold_out(asked)


def test_a_shard_that_is_not_the_one_of_the_table_is_refused() -> None:
    other = [*SIZES[:3], [12, 1, 1, 5, 31], SIZES[4]]
    for wrong in (other, [*SIZES[:3], SIZES[3][:-1], SIZES[4]], [*SIZES[:3], [*SIZES[3], 1], SIZES[4]]):
        source = Source("human", *make_shards(SIZES), make_table(wrong), 20, 5)
        with pytest.raises(
            ValueError, match=r"'human', shard 3: its 5 utterances are not those .* \(in memory\)"
        ):
            source.batch(Position())


def test_fewer_micro_batches_than_workers_make_epochs_of_one_step() -> None:
    source = make([[5, 5]], batch_frames=5)
    batches, position = take(source, Position(), 8, 3)
    assert position == Position(3, 0)
    assert [sorted(batches[step : step + 2]) for step in (0, 2, 4)] == [[(0,), (1,)]] * 3


def test_beyond_the_end_of_the_epoch_a_rank_gets_an_empty_batch() -> None:
    source = make()
    last = Position(0, source.num_batches(0) - 1)
    assert source.batch(last, rank=0).num_frames > 0
    empty = source.batch(last, rank=7).to(torch.device("cpu"))
    assert empty.num_frames == source.batch(last, rank=1).num_frames == 0
    assert empty.senones is empty.ids is empty.probabilities is None
    assert source.advance(last, 1) == source.advance(last, 8) == Position(1, 0)


def test_a_batch_holds_features_and_labels_of_the_same_utterances() -> None:
    source = make()
    for index in range(source.num_batches(0)):
        batch = source.batch(Position(0, index))
        assert batch.senones is not None
        for features, senones, length in zip(batch.features, batch.senones, batch.lengths):
            assert torch.equal(features[:length, 0].long(), senones[:length])
            assert (senones[length:] == PADDING).all()
    assert source.total_frames == sum(map(sum, SIZES))


def test_padding_is_zero_for_features_and_posteriors_and_no_senone_for_labels() -> None:
    features = [np.ones((length, 2), np.float16) for length in (3, 1)]
    ones = [np.ones((length, 2), np.float32) for length in (3, 1)]
    batch = collate(features, [{"ids": one.astype(np.uint16), "probabilities": one} for one in ones])
    for tensor in (batch.features, batch.ids, batch.probabilities):
        assert tensor is not None
        assert tensor.dtype == (torch.int64 if tensor is batch.ids else torch.float32)
        assert tensor[:, :, 0].tolist() == [[1, 1, 1], [1, 0, 0]]
    senones = collate(features, [{"senone": np.ones(n, np.int32)} for n in (3, 1)]).senones
    assert senones is not None and senones.tolist() == [[1, 1, 1], [1, PADDING, PADDING]]


class Unmeasured(Shard):
    """Labels whose lengths only reading them tells."""

    num_frames = None  # type: ignore[assignment]


def label_frames(length: int, kind: type[Shard] = Shard) -> list[list[int]]:
    """Labels 1, 2, … of an utterance with four frames of features, as they come out of a batch."""
    features, _ = make_shards([[4]])
    labels = kind(u0={"senone": np.arange(1, length + 1)})
    batch = Source("human", features, [labels], make_table([[4]]), 20, 1).batch(Position())
    return batch.senones.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [Shard, Unmeasured])
def test_labels_one_frame_off_are_trimmed_or_their_last_is_repeated(kind: type[Shard]) -> None:
    assert label_frames(5, kind) == label_frames(4, kind) == [[1, 2, 3, 4]]
    assert label_frames(3, kind) == [[1, 2, 3, 3]]


@pytest.mark.parametrize(("kind", "what"), [(Shard, "labels"), (Unmeasured, "senone")])
def test_labels_further_off_are_refused_naming_the_utterance(kind: type[Shard], what: str) -> None:
    for length in (0, 2, 6):
        with pytest.raises(
            ValueError, match=rf"'human', shard 0, utterance 'u0': {length} frames of '{what}' for 4"
        ):
            label_frames(length, kind)


def test_utterances_without_labels_are_left_out() -> None:
    features, labels = make_shards(SIZES)
    del labels[3]["u5"], labels[0]["u0"], labels[4]["u9"]
    table = make_table([[3, 9], [], [4], [12, 1, 5, 30], [6]])
    for world_size in (1, 3):
        source = Source("human", features, labels, table, 20, 5)
        assert sorted(sum(whole_epoch(source, world_size), ())) == [1, 2, 3, 4, 6, 7, 8, 10]


def test_features_and_labels_of_different_utterances_are_refused_naming_the_shard() -> None:
    features, labels = make_shards(SIZES)
    with pytest.raises(ValueError, match="'human': 5 feature shards but 4 label shards"):
        Source("human", features, labels[:-1], make_table(SIZES), 20, 1)
    unknown = Shard({"u99" if name == "u5" else name: arrays for name, arrays in labels[3].items()})
    for wrong in (Shard(dict(reversed(labels[3].items()))), unknown):
        source = Source("human", features, [*labels[:3], wrong, labels[4]], make_table(SIZES), 20, 1)
        with pytest.raises(
            ValueError, match="'human', shard 3: features and labels are of different utterances"
        ):
            source.batch(Position())


def test_no_utterances_and_batches_of_no_frames_are_refused() -> None:
    for sizes in ([[], []], []):
        with pytest.raises(ValueError, match="'human' holds no utterance"):
            make(sizes)
    with pytest.raises(ValueError, match="batch_frames = 0"):
        make(batch_frames=0)
