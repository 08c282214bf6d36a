"""Laws of the packed shards: what is written is read, and damage is never read."""
# N utterances, T frames

import multiprocessing
import os
import pickle
import re

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.data.packed import PackedShard, PackedWriter, open_shards, shard_number, shard_path

LAYOUT = {"values": ("float16", (3,)), "label": ("int32", ()), "first": ("bool", ())}


def make_utterances(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return {
        f"utterance-{number}": {
            "values": draw.normal(size=(length, 3)).astype("float16"),
            "label": draw.integers(-5, 1 << 30, length, dtype="int32"),
            "first": draw.random(length) < 0.3,
        }
        for number, length in enumerate(lengths)
    }


def write(path, utterances, header=None, block_frames=4):
    with PackedWriter(path, header or {}, LAYOUT, block_frames) as writer:
        for utterance_id, arrays in utterances.items():
            writer.write(utterance_id, **arrays)
    return path


def assert_same(got, needed):
    assert got.keys() == needed.keys()
    for name, values in needed.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values)


@given(st.lists(st.integers(0, 40), max_size=8), st.sampled_from([1, 3, 4, 256]))
@settings(max_examples=40, deadline=None)
def test_every_utterance_is_read_as_written_by_id_and_in_order(tmp_path_factory, lengths, block_frames):
    utterances = make_utterances(lengths)
    path = tmp_path_factory.mktemp("packed") / "a.000000.h5"
    shard = PackedShard(write(path, utterances, {"who": ["é", 1.5, None]}, block_frames))
    assert shard.header == {"who": ["é", 1.5, None]}
    assert shard.ids == tuple(utterances)
    assert shard.num_frames.tolist() == lengths
    assert len(shard) == len(lengths)
    for utterance_id, arrays in utterances.items():
        assert utterance_id in shard
        assert_same(shard[utterance_id], arrays)
    in_order = list(shard)
    assert [utterance_id for utterance_id, _ in in_order] == list(utterances)
    for utterance_id, arrays in in_order:
        assert_same(arrays, utterances[utterance_id])
    shard.verify()


def test_the_bytes_depend_on_the_contents_alone(tmp_path):
    utterances = make_utterances([300, 0, 1, 700])
    one = write(tmp_path / "one" / "a.000000.h5", utterances, {"b": 1, "a": 2})
    other = write(tmp_path / "two" / "b.000007.h5", utterances, {"a": 2, "b": 1})
    assert one.read_bytes() == other.read_bytes()
    with h5py.File(one) as file:
        datasets = []
        file.visititems(lambda _, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        assert len(datasets) == 10
        assert not any(item.id.get_create_plist().get_obj_track_times() for item in datasets)


def test_no_file_appears_when_writing_fails(tmp_path):
    with (
        pytest.raises(RuntimeError, match="halfway"),
        PackedWriter(tmp_path / "a.000000.h5", {}, LAYOUT) as writer,
    ):
        writer.write("one", **make_utterances([5])["utterance-0"])
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_there_stays_whole_until_the_new_one_is_complete(tmp_path):
    path = write(tmp_path / "a.000000.h5", make_utterances([5]))
    before = path.read_bytes()
    with PackedWriter(path, {}, LAYOUT) as writer:
        writer.write("new", **make_utterances([2])["utterance-0"])
        assert path.read_bytes() == before
    assert PackedShard(path).ids == ("new",)
    assert list(tmp_path.iterdir()) == [path]


def test_the_writer_keeps_no_hold_on_the_arrays_it_is_given(tmp_path):
    arrays = make_utterances([6])["utterance-0"]
    with PackedWriter(tmp_path / "a.000000.h5", {}, LAYOUT) as writer:
        writer.write("one", **arrays)
        arrays["label"][:] = 0
    assert PackedShard(tmp_path / "a.000000.h5")["one"]["label"].any()


@pytest.mark.parametrize(
    ("utterance_id", "changes", "message"),
    [
        ("a\nb", {}, "line break"),
        ("", {}, "must not be empty"),
        ("first", {}, "'first' was written already"),
        ("b", {"label": None}, "got arrays"),
        ("b", {"label": np.zeros(4, "int32")}, "same number"),
        ("b", {"label": np.zeros(5, "int64")}, "int64, which int32 cannot hold"),
        ("b", {"values": np.zeros((5, 2), "float16")}, re.escape("shape (5, 2), need (frames, 3)")),
    ],
)
def test_what_does_not_fit_is_refused_naming_the_utterance(tmp_path, utterance_id, changes, message):
    good = make_utterances([5])["utterance-0"]
    bad = {name: value for name, value in (good | changes).items() if value is not None}
    with PackedWriter(tmp_path / "a.000000.h5", {}, LAYOUT) as writer:
        writer.write("first", **good)
        with pytest.raises(ValueError, match=message) as caught:
            writer.write(utterance_id, **bad)
        assert repr(utterance_id) in str(caught.value) and "a.000000.h5" in str(caught.value)
    assert PackedShard(tmp_path / "a.000000.h5").ids == (
        "first",
    )  # a refused utterance leaves nothing behind


@pytest.mark.parametrize(
    ("seed", "damages"),
    [(0, 120), (1, 120), *(pytest.param(s, 1000, marks=pytest.mark.soak) for s in range(2, 6))],
)
def test_no_flipped_bit_and_no_truncation_changes_what_is_read(tmp_path, seed, damages):
    utterances = make_utterances([9, 0, 30])
    path = write(tmp_path / "a.000000.h5", utterances, {"teacher": "abc"})
    whole = path.read_bytes()
    draw = np.random.default_rng(seed)
    num_noticed = 0
    for _ in range(damages):
        damaged = bytearray(whole)
        if draw.random() < 0.2:
            del damaged[draw.integers(len(damaged)) :]
        else:
            damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
        path.write_bytes(damaged)
        shard = PackedShard(path)
        try:
            assert shard.header == {"teacher": "abc"}
            read = list(shard)
        except ValueError as error:
            assert str(path) in str(error)
            num_noticed += 1
        else:
            assert [utterance_id for utterance_id, _ in read] == list(utterances)
            for utterance_id, arrays in read:
                assert_same(arrays, utterances[utterance_id])
        finally:
            shard.close()
    assert num_noticed > 10


def test_damaged_frames_are_reported_with_their_utterances_and_the_others_still_read(tmp_path):
    utterances = make_utterances([8, 8, 8])
    path = write(tmp_path / "a.000000.h5", utterances)
    with h5py.File(path, "r+") as file:
        file["arrays/label"][9] += 1
        file["arrays/label"][21] += 1
    shard = PackedShard(path)
    assert_same(shard["utterance-0"], utterances["utterance-0"])
    with pytest.raises(ValueError, match=r"a\.000000\.h5: utterance 'utterance-1'.*block 2 of 'label'"):
        shard["utterance-1"]
    with pytest.raises(ValueError) as caught:
        shard.verify()
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "utterance 'utterance-1'",
        "utterance 'utterance-2'",
    ]


def test_a_size_that_cannot_be_is_refused_before_it_is_allocated(tmp_path):
    path = write(tmp_path / "a.000000.h5", make_utterances([8]))
    with h5py.File(path, "r+") as file:
        del file["ids"]
        file.create_dataset("ids", shape=(1 << 50,), maxshape=(None,), chunks=(1024,), dtype="u1")
    with pytest.raises(ValueError, match="'ids' is damaged: got type and shape"):
        PackedShard(path)["utterance-0"]


def _write_and_wait(path, begun, end):
    with PackedWriter(path, {}, LAYOUT):
        begun.set()
        end.wait(60)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path, spawn = tmp_path / "a.000000.h5", multiprocessing.get_context("spawn")
    events = [(spawn.Event(), spawn.Event()) for _ in range(2)]
    writers = [spawn.Process(target=_write_and_wait, args=(path, *both)) for both in events]
    for writer, (begun, _) in zip(writers, events):
        writer.start()
        assert begun.wait(60)
    other = tmp_path / ".a.000001.h5.0123456789abcdef.partial"
    other.write_text("of another shard")
    assert len(list(tmp_path.iterdir())) == 3
    writers[0].kill()
    writers[0].join()
    with PackedWriter(path, {}, LAYOUT):  # in a process where one is at work
        assert len(list(tmp_path.iterdir())) == 3  # the living one's, ours and the other shard's
        write(path, make_utterances([1, 2]))
        assert PackedShard(path).ids == ("utterance-0", "utterance-1")
    assert len(PackedShard(path)) == 0
    events[1][1].set()
    writers[1].join()
    assert writers[1].exitcode == 0
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_another_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.000000.h5"
    path.write_text("not HDF5")
    with pytest.raises(ValueError, match=r"a\.000000\.h5 is damaged, or not a shard"):
        len(PackedShard(path))
    with pytest.raises(ValueError, match=r"b\.000000\.h5: no such shard"):
        len(PackedShard(tmp_path / "b.000000.h5"))


def test_an_unknown_utterance_is_a_key_error_naming_file_and_utterance(tmp_path):
    shard = PackedShard(write(tmp_path / "a.000000.h5", make_utterances([1])))
    with pytest.raises(KeyError, match=r"a\.000000\.h5 has no utterance 'x'"):
        shard["x"]


def _read_label(shard):
    return shard["utterance-1"]["label"].tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_opened_shard_may_be_used_in_forked_and_spawned_processes(tmp_path, method):
    utterances = make_utterances([5, 6])
    shard = PackedShard(write(tmp_path / "a.000000.h5", utterances))
    needed = _read_label(shard)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read_label, [shard] * 4) == [needed] * 4
    assert (
        _read_label(pickle.loads(pickle.dumps(shard)))
        == needed
        == utterances["utterance-1"]["label"].tolist()
    )


def _read_inherited(shard, answers):
    answers.put((_read_label(shard), shard._process_id == os.getpid()))


def test_a_handle_inherited_through_a_fork_is_opened_again_and_reads_the_same(tmp_path):
    shard = PackedShard(write(tmp_path / "a.000000.h5", make_utterances([5, 6])))
    needed = _read_label(shard)
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=_read_inherited, args=(shard, answers))
    child.start()
    assert answers.get() == (needed, True)
    child.join()
    assert _read_label(shard) == needed


def test_shards_open_in_the_order_of_their_numbers_and_a_gap_is_an_error(tmp_path):
    for number in (0, 2, 1):
        write(shard_path(tmp_path, "a", number), make_utterances([number]))
    assert [shard_number(shard.path) for shard in open_shards(tmp_path, "a")] == [0, 1, 2]
    shard_path(tmp_path, "a", 1).unlink()
    with pytest.raises(ValueError, match=r"a\.000001\.h5 is missing"):
        open_shards(tmp_path, "a")
    with pytest.raises(ValueError, match=r"b\.000000\.h5 is missing"):
        open_shards(tmp_path, "b")


def test_few_files_are_open_however_many_shards_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("teacherstudent.data.packed._OPEN_FILES", 3)
    utterances = make_utterances([5, 9])
    for number in range(10):
        write(shard_path(tmp_path, "a", number), utterances)
    shards = open_shards(tmp_path, "a")
    for _ in range(2):
        for shard in shards:
            assert_same(shard["utterance-1"], utterances["utterance-1"])
            assert sum(shard._loaded is not None for shard in shards) <= 3  # whose ids are held
            opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
            assert sum(path.startswith(os.path.realpath(tmp_path)) for path in opened) <= 3
