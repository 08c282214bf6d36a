"""A store at a URL reads as the local one does, through a cache that never outgrows its limit nor hands out another
shard; and an utterance is found among any number of shards.
"""

import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
import torch

from teacherstudent import store as store_module
from teacherstudent.data.packed import hash_path, shard_path
from teacherstudent.store import TargetStore, TargetWriter
from teacherstudent.targets import shard_folder
from teacherstudent.targets.catalogue import build_catalogue, find_shards

torch.set_num_threads(1)

NUM_SHARDS = 5


def write_store(folder, num_shards=NUM_SHARDS, seed=0):
    for number in range(num_shards):
        draw = torch.Generator().manual_seed(seed + number)
        with TargetWriter(shard_path(folder, "targets", number), 50, 5, {"teacher": "aa"}) as writer:
            for place in range(3):
                writer.write(f"s{number}-u{place}", torch.randn(20 + place, 50, generator=draw))
    return folder


@pytest.fixture(params=["file", "memory"])
def remote(request, tmp_path):
    """A URL with a store behind it, and the same store in a local folder."""
    folder = write_store(tmp_path / "original")
    if request.param == "file":
        return f"file://{folder}", folder
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in folder.iterdir():
        files.pipe_file(f"/bucket/targets/{path.name}", path.read_bytes())
    return "memory://bucket/targets", folder


def read_all(store):
    return {
        utterance_id: [part.tolist() for part in decoded]
        for number in range(store.num_shards)
        for utterance_id, decoded in store.iter_decoded(number)
    }


def cached_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*/*.h5"))


def test_a_store_at_a_url_reads_as_the_local_one_does(tmp_path, remote):
    url, folder = remote
    store = TargetStore(url, {"teacher": "aa"}, tmp_path / "cache")
    local = TargetStore(folder)
    assert store.num_shards == NUM_SHARDS and store.header == local.header
    assert read_all(store) == read_all(local)
    for utterance_id in ("s4-u2", "s0-u0", "s2-u1"):
        np.testing.assert_array_equal(store[utterance_id][1], local[utterance_id][1])
    assert store.info() == local.info()
    store.verify()
    with pytest.raises(ValueError, match="got teacher = 'aa', need 'bb'"):
        TargetStore(url, {"teacher": "bb"}, tmp_path / "cache")


def test_what_was_used_longest_ago_makes_room(tmp_path, remote, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 1)
    url, folder = remote
    size = max(path.stat().st_size for path in folder.glob("*.h5"))
    store = TargetStore(url, None, tmp_path / "cache", cache_bytes=2 * size)
    for number in (1, 0, 2):  # 0 came first, with the header, and was used again after 1
        store.read(number, f"s{number}-u0")
    left = {path.name for path in (tmp_path / "cache").glob("*/*.h5")}
    assert left == {"targets.000000.h5", "targets.000002.h5"}


def test_the_cache_keeps_to_its_limit_whatever_is_read(tmp_path, remote, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 1)
    url, folder = remote
    size = max(path.stat().st_size for path in folder.glob("*.h5"))
    store = TargetStore(url, None, tmp_path / "cache", cache_bytes=2 * size + 100)
    for number in (0, 1, 2, 3, 4, 0, 2):
        store.read(number, f"s{number}-u0")
        assert 0 < cached_bytes(tmp_path / "cache") <= 2 * size + 100
    assert read_all(store) == read_all(TargetStore(folder))
    left = {path.name for path in (tmp_path / "cache").glob("*/*")}
    newest = {shard_path("", "targets", number).name for number in (3, 4)}
    assert left == newest | {f"{name}.sha256" for name in newest}


def test_a_shard_that_the_cache_cannot_hold_is_refused_with_what_to_raise(tmp_path, remote):
    with pytest.raises(
        ValueError, match=r"cache may hold 100 bytes, targets\.000000\.h5 has \d+: raise cache_bytes"
    ):
        TargetStore(remote[0], None, tmp_path / "cache", cache_bytes=100)


def test_a_shard_that_was_damaged_on_its_way_is_refused_and_does_not_stay(tmp_path, remote, monkeypatch):
    url, _ = remote
    files, folder = fsspec.url_to_fs(url)
    name = f"{folder}/targets.000000.h5"
    whole = files.cat_file(name)
    files.pipe_file(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"targets\.000000\.h5 is not what targets\.000000\.h5\.sha256 says"):
        TargetStore(url, None, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*.h5")) and not list(
        (tmp_path / "cache").glob("*/.*.partial")
    )
    files.pipe_file(name, whole)
    TargetStore(url, None, tmp_path / "cache").verify()


def test_a_cache_on_a_file_system_without_locks_is_refused_with_what_to_do(tmp_path, remote, monkeypatch):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        ValueError,
        match=r"cache/\.lock0?\d* cannot be locked \(No locks available\): keep the cache on a local",
    ):
        TargetStore(remote[0], None, tmp_path / "cache")


def test_a_shard_without_its_hash_is_refused(tmp_path, remote):
    files, folder = fsspec.url_to_fs(remote[0])
    files.rm_file(f"{folder}/targets.000000.h5.sha256")
    with pytest.raises(ValueError, match=r"targets\.000000\.h5 has no targets\.000000\.h5\.sha256 beside it"):
        TargetStore(remote[0], None, tmp_path / "cache")


def test_a_store_that_was_written_anew_is_fetched_anew(tmp_path):
    folder = write_store(tmp_path / "original")
    url, cache = f"file://{folder}", tmp_path / "cache"
    before = read_all(TargetStore(url, None, cache))
    write_store(folder, seed=100)
    after = read_all(TargetStore(url, None, cache))
    assert after == read_all(TargetStore(folder)) != before


def test_stores_of_two_urls_do_not_mix_in_one_cache(tmp_path):
    folders = [write_store(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("two", 50))]
    stores = [TargetStore(f"file://{folder}", None, tmp_path / "cache") for folder in folders]
    for _ in range(2):
        for store, folder in zip(stores, folders):
            assert read_all(store) == read_all(TargetStore(folder))


@pytest.mark.parametrize("was_there", [False, True])
def test_who_opens_a_shard_keeps_it_though_others_want_its_room(tmp_path, remote, monkeypatch, was_there):
    """Two readers of a cache for one shard, the second in the moment between a look at it and its opening."""
    url, folder = remote
    truth = read_all(TargetStore(folder))
    size = max(path.stat().st_size for path in folder.glob("*.h5"))
    stores = [TargetStore(url, None, tmp_path / "cache", cache_bytes=size) for _ in range(3)]
    if was_there:
        stores[2].decode(3, "s3-u0")
    others, open_file = [], h5py.File

    def open_late(path, *arguments, **options):
        if not others and Path(path).name == "targets.000003.h5":
            others.append(ThreadPoolExecutor(1).submit(stores[1].decode, 4, "s4-u0"))
            wait(others, timeout=0.5)  # time enough for what must not happen; it is not waited for otherwise
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(h5py, "File", open_late)
    for found, utterance_id in ((stores[0].decode(3, "s3-u1"), "s3-u1"), (others[0].result(60), "s4-u0")):
        assert [part.tolist() for part in found] == truth[utterance_id]
    assert cached_bytes(tmp_path / "cache") <= size


def test_downloads_under_way_count_against_the_limit(tmp_path, monkeypatch):
    """One that is not there yet takes its room from those that were used longest ago."""
    folder = write_store(tmp_path / "original")
    cache, size = tmp_path / "cache", max(path.stat().st_size for path in folder.glob("*.h5"))
    store = TargetStore(f"file://{folder}", None, cache, cache_bytes=2 * size)
    files = type(fsspec.filesystem("file"))
    get_file, seen = files.get_file, []

    def get_slowly(self, remote, local, **options):
        if "000001" in remote:
            Path(local).write_bytes(b"")  # as any download begins
            ThreadPoolExecutor(1).submit(store.decode, 2, "s2-u0").result(60)
            seen.append(sorted(path.name for path in cache.glob("*/*.h5")))
        return get_file(self, remote, local, **options)

    monkeypatch.setattr(files, "get_file", get_slowly)
    TargetStore(f"file://{folder}", None, cache, cache_bytes=2 * size).decode(1, "s1-u0")
    assert seen == [["targets.000002.h5"]]


def _read_at_once(url, cache, cache_bytes, numbers):
    """Each shard by a thread of its own, all begun before the first is there; the number of downloads."""
    files = type(fsspec.filesystem("file"))
    get_file, begun, start = files.get_file, [], threading.Barrier(len(numbers))

    def get_together(self, remote, local, **options):
        begun.append(remote)
        if len(begun) <= len(numbers):  # not what had made room before it was opened, and is brought again
            with suppress(threading.BrokenBarrierError):
                start.wait(0.5 if len(set(numbers)) < len(numbers) else 60)
        return get_file(self, remote, local, **options)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(numbers)) as pool:
        stores = [TargetStore(url, None, cache, cache_bytes) for _ in numbers]
        patch.setattr(files, "get_file", get_together)
        patch.setattr(shard_folder, "_DOWNLOAD_LOCKS", 1 << 30)  # else two shards might wait for each other
        found = list(pool.map(lambda store, number: store.read(number, f"s{number}-u0"), stores, numbers))
    assert all(len(ids) == 20 for ids, _ in found)
    return len(begun)


def test_a_shard_that_several_want_at_once_is_downloaded_once(tmp_path):
    folder = write_store(tmp_path / "original")
    assert _read_at_once(f"file://{folder}", tmp_path / "cache", 1 << 20, [3] * 4) == 1


def test_downloads_side_by_side_leave_no_more_than_the_limit(tmp_path):
    folder = write_store(tmp_path / "original")
    size = max(path.stat().st_size for path in folder.glob("*.h5"))
    assert _read_at_once(f"file://{folder}", tmp_path / "cache", size, [1, 2, 3, 4]) >= 4
    assert 0 < cached_bytes(tmp_path / "cache") <= size


def test_what_a_killed_download_of_any_version_left_is_in_nobodys_way(tmp_path):
    folder = write_store(tmp_path / "original")
    size = max(path.stat().st_size for path in folder.glob("*.h5"))
    store = TargetStore(f"file://{folder}", None, tmp_path / "cache", 2 * size)
    place = next(path.parent for path in (tmp_path / "cache").glob("*/*.h5"))
    for name in ("0123456789abcdef.partial", f"0123456789abcdef.{size}.partial"):
        (place / f".targets.000000.h5.{name}").write_bytes(b"half")
        os.utime(place / f".targets.000000.h5.{name}", (0, 0))
    for number in range(NUM_SHARDS):
        store.read(number, f"s{number}-u0")
    assert not list(place.glob(".*")) and cached_bytes(tmp_path / "cache") <= 2 * size


def read_in_process(arguments):
    url, cache, seed = arguments
    store_module._OPEN_SHARDS = 1
    store = TargetStore(url, None, cache, cache_bytes=40_000)  # two shards
    draw, found = np.random.default_rng(seed), {}
    for _ in range(100):
        number, place = draw.integers(NUM_SHARDS), draw.integers(3)
        utterance_id = f"s{number}-u{place}"
        found[utterance_id] = [part.tolist() for part in store.decode(int(number), utterance_id)]
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_cache_that_is_too_small_for_them_and_all_read_the_truth(tmp_path, method):
    folder = write_store(tmp_path / "original")
    truth = read_all(TargetStore(folder))
    work = [(f"file://{folder}", tmp_path / "cache", seed) for seed in range(4)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        for found in pool.map(read_in_process, work):
            assert all(truth[utterance_id] == decoded for utterance_id, decoded in found.items())
    assert not list((tmp_path / "cache").glob("*/.*.partial"))


def _read_inherited(store, answers):
    answers.put([store[utterance_id][0].tolist() for utterance_id in ("s0-u0", "s4-u2")])


def test_a_store_that_is_open_reads_the_same_after_a_fork(tmp_path):
    store = TargetStore(f"file://{write_store(tmp_path / 'original')}", None, tmp_path / "cache")
    needed = [store[utterance_id][0].tolist() for utterance_id in ("s0-u0", "s4-u2")]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_read_inherited, args=(store, answers))
    child.start()
    assert answers.get() == needed
    child.join()
    assert [store[utterance_id][0].tolist() for utterance_id in ("s0-u0", "s4-u2")] == needed


def test_a_url_that_needs_another_package_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"s3://bucket/targets: .*s3fs"):
        TargetStore("s3://bucket/targets", None, tmp_path)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_large_store_finds_utterances_by_a_catalogue_that_is_made_once(tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    folder = write_store(tmp_path / "original")
    built = []
    monkeypatch.setattr(
        store_module, "build_catalogue", lambda path, ids: built.append(build_catalogue(path, ids))
    )
    for _ in range(2):
        store = TargetStore(f"{scheme}{folder}", None, tmp_path / "cache")
        for number in (3, 0, 4, 4, 1, 2):
            for place in range(3):
                assert store[f"s{number}-u{place}"][0].shape == (20 + place, 5)
            assert len(store._open) <= 2
        with pytest.raises(KeyError, match="no targets for utterance 'nobody'"):
            store["nobody"]
    assert len(built) == 1
    write_store(folder, num_shards=NUM_SHARDS + 1, seed=7)  # another store now: another catalogue
    assert TargetStore(f"{scheme}{folder}", None, tmp_path / "cache")["s5-u1"][0].shape == (21, 5)
    assert len(built) == 2


def test_the_catalogue_names_the_shards_of_every_utterance_and_of_no_other(tmp_path):
    path = tmp_path / "catalogue.sqlite"
    build_catalogue(path, [[f"{shard}-{place}" for place in range(50)] + ["twice"] for shard in range(20)])
    for shard in range(20):
        for place in range(50):
            assert find_shards(path, f"{shard}-{place}") == [shard]
    assert find_shards(path, "twice") == list(range(20)) and find_shards(path, "nobody") == []
    with sqlite3.connect(path) as connection:
        plan = connection.execute("EXPLAIN QUERY PLAN SELECT shard FROM utterances WHERE hash = 1").fetchall()
    assert re.search("USING COVERING INDEX by_hash", str(plan))
    assert list(tmp_path.iterdir()) == [path]


def test_a_gap_among_the_shards_is_an_error_at_a_url_too(tmp_path):
    folder = write_store(tmp_path / "original")
    shutil.copytree(folder, tmp_path / "copy")
    for path in (shard_path(folder, "targets", 2), hash_path(shard_path(folder, "targets", 2))):
        os.remove(path)
    for place in (folder, f"file://{folder}"):
        with pytest.raises(ValueError, match=r"targets\.000002\.h5 is missing"):
            TargetStore(place, None, tmp_path / "cache")
