"""Damage of any kind is reported, or does no harm: no read gives other targets than were written."""
# T frames, S senones, K kept

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from teacherstudent import store
from teacherstudent.data.packed import PackedWriter, hash_path, shard_number, shard_path
from teacherstudent.store import TargetStore, TargetWriter
from teacherstudent.targets.codings import CODINGS

torch.set_num_threads(1)

PROVENANCE = {"teacher": "aa", "inventory": "bb", "numeric_mode": "fp32"}
NUM_SENONES, KEPT = 40, 5
LENGTHS = ((9, 0, 30), (25, 4, 1))


def write_store(folder, coding, provenance=PROVENANCE, num_senones=NUM_SENONES, seed=0):
    for number, lengths in enumerate(LENGTHS):
        draw = torch.Generator().manual_seed(seed + number)
        path = shard_path(folder, "targets", number)
        with TargetWriter(path, num_senones, KEPT, provenance, coding) as writer:
            for place, length in enumerate(lengths):
                writer.write(f"s{number}-u{place}", 3 * torch.randn(length, num_senones, generator=draw))
    return folder


def read(folder):
    """Header and everything by id and in order, or what was raised, shard by shard."""
    try:
        opened = TargetStore(folder, expect=PROVENANCE | {"num_senones": NUM_SENONES})
    except ValueError as error:
        return None, {}, [str(error)]
    found, errors = {}, []
    for number in range(opened.num_shards):
        try:
            for utterance_id, decoded in opened.iter_decoded(number):
                found[number, utterance_id] = decoded
        except ValueError as error:
            errors.append(str(error))
    for number, lengths in enumerate(LENGTHS):
        utterance_id = f"s{number}-u{len(lengths) - 1}"
        try:
            found[number, utterance_id + " by id"] = opened.decode(opened.find(utterance_id), utterance_id)
        except (ValueError, KeyError) as error:
            errors.append(str(error))
    return opened.header, found, errors


def assert_true(found, truth):
    for key, decoded in found.items():
        for got, needed in zip(decoded, truth[key], strict=True):
            np.testing.assert_array_equal(got, needed)
            assert got.dtype == needed.dtype


def verify(folder):
    """What is reported; nothing if the store is said to be whole."""
    try:
        store.verify(folder, expect=PROVENANCE | {"num_senones": NUM_SENONES})
    except ValueError as error:
        return str(error)
    TargetStore(folder).verify()
    return ""


def flip_bits(folder, draw, others):
    path = draw_file(folder, draw)
    data = bytearray(path.read_bytes())
    for _ in range(draw.integers(1, 4)):
        data[draw.integers(len(data))] ^= 1 << draw.integers(8)
    path.write_bytes(data)
    return path.name


def truncate(folder, draw, others):
    path = draw_file(folder, draw)
    path.write_bytes(path.read_bytes()[: draw.integers(path.stat().st_size)])
    return path.name


def overwrite(folder, draw, others):
    path = draw_file(folder, draw)
    data = bytearray(path.read_bytes())
    start, length = draw.integers(len(data)), draw.integers(1, 600)
    data[start : start + length] = draw.bytes(len(data[start : start + length]))
    path.write_bytes(data)
    return path.name


def swap(folder, draw, others):
    """Two shards, with their hashes or without."""
    one, two = (shard_path(folder, "targets", number) for number in draw.permutation(len(LENGTHS))[:2])
    pairs = [(one, two)] + ([(hash_path(one), hash_path(two))] if draw.random() < 0.5 else [])
    for first, second in pairs:
        os.replace(first, folder / "elsewhere")
        os.replace(second, first)
        os.replace(folder / "elsewhere", second)
    return "targets"


def mix(folder, draw, others):
    """One shard, or all, with their hashes, of a store with another teacher or another inventory."""
    other = others[draw.integers(len(others))]
    numbers = range(len(LENGTHS)) if draw.random() < 0.3 else [draw.integers(len(LENGTHS))]
    for number in numbers:
        for path in (shard_path(folder, "targets", number), hash_path(shard_path(folder, "targets", number))):
            shutil.copy(other / path.name, path)
    return "targets"


def remove(folder, draw, others):
    path = draw_file(folder, draw)
    path.unlink()
    return path.name


def draw_file(folder, draw):
    path = shard_path(folder, "targets", int(draw.integers(len(LENGTHS))))
    return path if draw.random() < 0.9 else hash_path(path)


KINDS = [flip_bits] * 12 + [truncate] * 4 + [overwrite] * 2 + [swap, mix, mix, remove]


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("seed", "damages"), [(0, 260), *(pytest.param(s, 4000, marks=pytest.mark.soak) for s in range(1, 5))]
)
def test_no_damage_gives_other_targets_and_verify_reports_every_one(tmp_path, coding, seed, damages):
    whole = write_store(tmp_path / "whole", coding)
    others = [
        write_store(tmp_path / "teacher", coding, PROVENANCE | {"teacher": "cc"}, seed=9),
        write_store(tmp_path / "inventory", coding, num_senones=NUM_SENONES + 1, seed=9),
    ]
    header, truth, errors = read(whole)
    assert not errors and len(truth) == 6 + 2 and not verify(whole)
    draw = np.random.default_rng(seed)
    folder = tmp_path / "damaged"
    num_refused = 0
    for _ in range(damages):
        shutil.copytree(whole, folder)
        damage = KINDS[draw.integers(len(KINDS))]
        name = damage(folder, draw, others)
        if unchanged(folder, whole):  # such as bits that were flipped twice
            shutil.rmtree(folder)
            continue
        got, found, errors = read(folder)
        assert got in (None, header)
        assert_true(found, truth)
        assert all("targets.00000" in error or "damaged" in error for error in errors), errors
        assert name.removesuffix(".sha256") in verify(folder), f"{damage.__name__} of {name} is not reported"
        num_refused += bool(errors)
        shutil.rmtree(folder)
    assert num_refused > damages // 3


def unchanged(folder, whole):
    names = {path.name for path in whole.iterdir()}
    same = {path.name for path in folder.iterdir()} == names
    return same and all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_verify_reports_a_change_of_any_byte_of_a_shard_and_of_its_hash(tmp_path):
    """One bit of every 41st byte, and of every byte of the hash; what is not in a block is found by the hash."""
    path = shard_path(tmp_path, "targets", 0)
    with TargetWriter(path, NUM_SENONES, KEPT, PROVENANCE) as writer:
        writer.write("u", torch.randn(9, NUM_SENONES, generator=torch.Generator().manual_seed(0)))
    for file, step in ((path, 41), (hash_path(path), 1)):
        whole = file.read_bytes()
        for place in range(0, len(whole), step):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            assert path.name in verify(tmp_path)
        file.write_bytes(whole)
    assert not verify(tmp_path)


def test_a_damaged_block_is_reported_with_its_utterances_and_the_rest_still_reads(tmp_path):
    write_store(tmp_path, "compact")
    path = shard_path(tmp_path, "targets", 0)
    _, truth, _ = read(tmp_path)
    data = bytearray(path.read_bytes())
    with TargetStore(tmp_path)._shards.open(0)._open_file() as file:
        start = file["arrays/records"].id.get_chunk_info(0).byte_offset
    data[start + 50] ^= 4
    path.write_bytes(data)
    assert "targets.000000.h5: utterances 's0-u0' … 's0-u2': block 0 of 'records' is damaged" in verify(
        tmp_path
    )
    damaged = TargetStore(tmp_path)
    with pytest.raises(ValueError, match="'s0-u0' … 's0-u2'"):
        damaged["s0-u1"]
    for utterance_id in ("s1-u0", "s1-u1"):
        np.testing.assert_array_equal(damaged[utterance_id][0], truth[int(utterance_id[1]), utterance_id].ids)


# None: HDF5's own bytes
@pytest.mark.parametrize("name", [None, "header", "seal", "ids", "num_frames", "checksums/records"])
def test_the_first_shard_may_be_too_damaged_to_open_the_store_and_all_damage_is_listed(tmp_path, name):
    """Also of other shards, which are compared with the first one that can be read."""
    write_store(tmp_path, "compact")
    paths = [shard_path(tmp_path, "targets", number) for number in range(3)]
    with TargetWriter(paths[2], NUM_SENONES, KEPT, PROVENANCE | {"features": "of another"}) as writer:
        writer.write("s2-u0", torch.zeros(3, NUM_SENONES))
    with h5py.File(paths[0]) as first, h5py.File(paths[1]) as second:
        place = first[name].id.get_offset() if name else 0
        block = second["arrays/records"].id.get_chunk_info(0).byte_offset
    for path, byte in ((paths[0], place), (paths[1], block)):
        data = bytearray(path.read_bytes())
        data[byte] ^= 1
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"targets\.000000\.h5"):
        TargetStore(tmp_path)
    reported = verify(tmp_path).splitlines()
    assert [shard_number(line.split(": ")[0].split()[0]) for line in reported] == [0, 0, 1, 1, 2]
    assert "block 0 of 'records' is damaged" in reported[2]
    assert "provenance is" in reported[4] and "as in targets.000001.h5" in reported[4]


def test_a_store_of_version_1_is_refused_with_what_to_do(tmp_path):
    with PackedWriter(Path(tmp_path) / "targets.000000.h5", {"store_version": 1}, {"ids": ("uint16", (2,))}):
        pass
    with pytest.raises(ValueError, match=r"got store version 1, this reader knows version 2\. Label again"):
        TargetStore(tmp_path)
