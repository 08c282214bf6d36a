"""Micro-batches are a pure function of (seed, epoch, position): first_k + remaining == all, for any workers."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.training.batches import WINDOW_SHARDS, Batch, Position, Source, collate
from teacherstudent.training.losses import PADDING

torch.set_num_threads(1)

Sizes = Sequence[Sequence[int]]  # frames of the utterances of each shard
SIZES = [[7, 3, 9], [], [4], [12, 1, 1, 5, 30], [2, 6]]
shards = st.lists(st.lists(st.integers(1, 30), max_size=6), min_size=1, max_size=20).filter(any)


class Shard(dict[str, dict[str, np.ndarray]]):
    """One shard in memory, by utterance."""

    @property
    def ids(self) -> Sequence[str]:
        return tuple(self)


def make_shards(sizes: Sizes) -> tuple[list[Shard], list[Shard]]:
    """Features and labels: utterance number n of the source has features of n everywhere, and senone n."""
    features, labels = [Shard() for _ in sizes], [Shard() for _ in sizes]
    places = [(shard, length) for shard, lengths in enumerate(sizes) for length in lengths]
    for number, (shard, length) in enumerate(places):
        features[shard][f"u{number}"] = {"values": np.full((length, 2), number, np.float16)}
        labels[shard][f"u{number}"] = {"senone": np.full(length, number, np.int32)}
    return features, labels


def make(sizes: Sizes = SIZES, batch_frames: int = 20, seed: int = 5, name: str = "human") -> Source:
    counts = [np.array(lengths, np.int64) for lengths in sizes]
    return Source(name, *make_shards(sizes), counts, batch_frames, seed)


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
    places = [(epoch, index) for epoch in (0, 1, 2) for index in range(len(one.plan(epoch)))]
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
    for index in range(len(source.plan(0))):
        batch = source.batch(Position(0, index))
        rows, longest, _ = batch.features.shape
        assert rows * longest <= batch_frames or rows == 1
        assert longest == batch.lengths[0] == batch.lengths.max()
    equal = make([[10] * 14], batch_frames=40)
    assert sorted(len(batch) for batch in equal.plan(0)) == [2, 4, 4, 4]  # and they are as full as can be


def test_shards_are_read_a_window_at_a_time() -> None:
    source = make([[3, 4, 5]] * (2 * WINDOW_SHARDS + 3), batch_frames=25)
    places = np.concatenate(source.plan(0))[:, 0]
    for start in range(0, len(source.features), WINDOW_SHARDS):
        window = places[3 * start : 3 * (start + WINDOW_SHARDS)]
        assert len(set(window.tolist())) == min(WINDOW_SHARDS, len(source.features) - start)
        assert not set(window.tolist()) & set(places[3 * (start + WINDOW_SHARDS) :].tolist())


def test_beyond_the_end_of_the_epoch_a_rank_gets_an_empty_batch() -> None:
    source = make()
    last = Position(0, len(source.plan(0)) - 1)
    assert source.batch(last, rank=0).num_frames > 0
    empty = source.batch(last, rank=7).to(torch.device("cpu"))
    assert empty.num_frames == source.batch(last, rank=1).num_frames == 0
    assert empty.senones is empty.ids is empty.probabilities is None
    assert source.advance(last, 1) == source.advance(last, 8) == Position(1, 0)


def test_a_batch_holds_features_and_labels_of_the_same_utterances() -> None:
    source = make()
    for index in range(len(source.plan(0))):
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


def label_frames(length: int) -> list[list[int]]:
    """Labels 1, 2, … of an utterance with four frames of features, as they come out of a batch."""
    features, labels = make_shards([[4]])
    labels[0]["u0"] = {"senone": np.arange(1, length + 1)}
    batch = Source("human", features, labels, [np.array([4])], 20, 1).batch(Position())
    return batch.senones.tolist()  # type: ignore[union-attr]


def test_labels_one_frame_off_are_trimmed_or_their_last_is_repeated() -> None:
    assert label_frames(5) == label_frames(4) == [[1, 2, 3, 4]]
    assert label_frames(3) == [[1, 2, 3, 3]]


def test_labels_further_off_are_refused_naming_the_utterance() -> None:
    for length in (0, 2, 6):
        with pytest.raises(ValueError, match=rf"'human', utterance 'u0': {length} frames of 'senone' for 4"):
            label_frames(length)


def test_features_and_labels_of_different_utterances_are_refused_naming_the_shard() -> None:
    features, labels = make_shards(SIZES)
    counts = [np.array(lengths) for lengths in SIZES]
    with pytest.raises(ValueError, match="'human': 5 feature shards but 4 label shards"):
        Source("human", features, labels[:-1], counts, 20, 1)
    renamed = [*labels[:3], Shard(dict(reversed(labels[3].items()))), labels[4]]
    with pytest.raises(ValueError, match="'human', shard 3: features and labels are of different utterances"):
        Source("human", features, renamed, counts, 20, 1)


def test_no_utterances_and_batches_of_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="'human' holds no utterance"):
        make([[], []])
    with pytest.raises(ValueError, match="batch_frames = 0"):
        make(batch_frames=0)
