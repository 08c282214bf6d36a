"""Laws of the `store` command: what it says is true, and what it exports reads the same elsewhere."""
# T frames, S senones, K kept

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut
from PIL import Image

from teacherstudent import cli
from teacherstudent.data.packed import PackedWriter, shard_path
from teacherstudent.store import TargetStore, TargetWriter
from teacherstudent.targets.codings import CODINGS
from teacherstudent.targets.store_commands import estimate, show
from teacherstudent.targets.store_export import export_kaldi, export_shar
from teacherstudent.targets.store_figures import most_active

torch.set_num_threads(1)

NUM_SENONES = 60
LENGTHS = ((40, 1, 7), (25,))


def write_store(folder, lengths=LENGTHS, num_senones=NUM_SENONES, k=20, coding="compact", spread=3.0):
    """Logits that wander: more than half of a frame's best were the best of the one before, as a teacher's are."""
    draw = torch.Generator().manual_seed(0)
    for number, frames in enumerate(lengths):
        with TargetWriter(
            shard_path(folder, "targets", number), num_senones, k, {"teacher": "aa"}, coding
        ) as writer:
            for place, length in enumerate(frames):
                logits = torch.randn(length, num_senones, generator=draw)
                for frame in range(1, length):
                    logits[frame] = 0.9 * logits[frame - 1] + 0.19**0.5 * logits[frame]
                writer.write(f"s{number}-u{place}", spread * logits)
    return TargetStore(folder)


def run(*words):
    assert cli.main(["store", *map(str, words)]) == 0


def test_info_prints_sizes_mass_and_entropy_by_k_and_provenance(tmp_path, capsys):
    write_store(tmp_path)
    run("info", tmp_path)
    text = capsys.readouterr().out
    assert re.search(r"^frames +73$", text, re.MULTILINE) and re.search(r"^teacher +aa$", text, re.MULTILINE)
    best = re.findall(
        r"^the best (\d+) +([\d.]+) of the probability, ([\d.]+) nats of entropy$", text, re.MULTILINE
    )
    assert [int(k) for k, *_ in best] == [1, 5, 10, 20]
    for column in (1, 2):
        values = [float(row[column]) for row in best]
        assert values == sorted(values)


def test_verify_is_silent_about_a_whole_store_and_fails_with_the_file_of_a_damaged_one(tmp_path, capsys):
    write_store(tmp_path)
    run("verify", tmp_path)
    assert "every byte is as it was written" in capsys.readouterr().out
    path = shard_path(tmp_path, "targets", 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert cli.main(["store", "verify", str(tmp_path)]) == 2
    assert "targets.000001.h5" in capsys.readouterr().err


@pytest.mark.parametrize("coding", CODINGS)
def test_the_estimate_is_near_the_size_of_a_store_that_is_written(tmp_path, coding):
    store = write_store(tmp_path, ((400,) * 30, (250,) * 48), 3000, coding=coding, spread=2.2)
    sizes = estimate(store.info().hours, 20, 3000)
    assert sizes.num_frames == 24_000
    assert sizes.bytes_per_frame[coding] == pytest.approx(store.info().bytes_per_frame, rel=0.15)


def test_the_estimate_of_a_million_hours_is_printed_without_a_store(capsys):
    run("estimate", "--hours", "1e6", "--k", "20", "--senones", "3183")
    text = capsys.readouterr().out
    assert "frames" in text and "120,000,000,000" in text
    assert float(re.search(r"^compact +([\d.]+) bytes a frame, [\d.]+ TB$", text, re.MULTILINE)[1]) <= 40
    assert "12,732.0 bytes a frame, 1.528 PB" in text


@pytest.mark.parametrize(("hours", "k"), [(0, 20), (float("inf"), 20), (1, 0), (1, 3001)])
def test_an_estimate_of_nothing_possible_is_refused(hours, k):
    with pytest.raises(ValueError, match=r"got .* hours|got k ="):
        estimate(hours, k, 3000)


def test_show_writes_a_picture_with_and_without_the_experiment_beside_the_store(tmp_path, capsys):
    folder = tmp_path / "targets"
    write_store(folder)
    lacks = show(folder, "s0-u0", tmp_path / "bare.png")
    assert len(lacks) == 2 and "--features" in lacks[0] and "--inventory" in lacks[1]
    features = shard_path(tmp_path / "features" / "unlabelled", "features", 0)
    with PackedWriter(features, {}, {"values": ("float16", (192,))}) as writer:
        writer.write("s0-u0", values=np.random.default_rng(0).normal(size=(40, 192)).astype("float16"))
    run("show", folder, "s0-u0", "--output", tmp_path / "whole.png")
    for name in ("bare.png", "whole.png"):
        picture = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert picture.shape[1] > 1000 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    with pytest.raises(ValueError, match=r"need one of \.png"):
        show(folder, "s0-u0", tmp_path / "picture.doc")


def test_the_most_active_senones_come_in_the_order_in_which_they_are_active(tmp_path):
    logits = torch.full((30, 9), -8.0)
    for frame in range(30):
        logits[frame, (5, 2, 7)[frame // 10]] = 4
    with TargetWriter(shard_path(tmp_path, "targets", 0), 9, 3) as writer:
        writer.write("u", logits)
    assert [
        senone for senone in most_active(TargetStore(tmp_path).decode(0, "u")) if senone in (2, 5, 7)
    ] == [5, 2, 7]


def write_cuts(path, ids, start=1.0):
    cuts = [MonoCut(name, start, length * 0.03, 0) for name, length in ids]
    CutSet.from_cuts(cuts).to_file(path)
    return str(path)


def test_shar_fields_load_beside_the_cuts_and_a_cut_without_targets_has_none(tmp_path):
    store = write_store(tmp_path / "targets")
    ids = [("s0-u0", 40), ("unlabelled", 9), ("s0-u1", 1), ("s0-u2", 7)]
    shards = [ids, [("s1-u0", 25)]]
    cuts = [write_cuts(tmp_path / f"cuts.{number:06d}.jsonl", pairs) for number, pairs in enumerate(shards)]
    run("export", tmp_path / "targets", tmp_path / "shar", "--cuts", tmp_path)
    fields = {
        name: [str(tmp_path / "shar" / f"{name}.{number:06d}.tar") for number in range(2)]
        for name in ("senones", "log_posteriors", "dropped")
    }
    read = {cut.id: cut for cut in CutSet.from_shar({"cuts": cuts, **fields})}
    assert set(read) == {"s0-u0", "s0-u1", "s0-u2", "s1-u0", "unlabelled"}
    assert "senones" not in (read["unlabelled"].custom or {})
    for name in set(read) - {"unlabelled"}:
        decoded = store.decode(store.find(name), name)
        np.testing.assert_array_equal(read[name].load_senones(), decoded.ids)
        np.testing.assert_array_equal(read[name].load_log_posteriors(), decoded.log_posteriors)
        np.testing.assert_array_equal(read[name].load_dropped(), decoded.dropped)
        assert read[name].senones.frame_shift == 0.03
    part = read["s0-u0"].senones.load(start=1.3, duration=0.6)
    np.testing.assert_array_equal(part, store["s0-u0"][0][10:30])


def test_shar_of_cuts_that_lack_labelled_utterances_is_refused(tmp_path):
    store = write_store(tmp_path / "targets")
    write_cuts(tmp_path / "cuts.000000.jsonl", [("s0-u0", 40)])
    with pytest.raises(ValueError, match="shard 0 has no cuts for 2 utterances, 's0-u1' among them"):
        export_shar(store, tmp_path / "shar", tmp_path)


def read_kaldi(data, place):
    """As ReadPosterior of Kaldi's hmm/posterior.cc does in binary mode."""

    def number(kind):
        nonlocal place
        assert data[place] == 4
        (value,) = struct.unpack_from(kind, data, place + 1)
        place += 5
        return value

    assert data[place : place + 2] == b"\0B"
    place += 2
    return [[(number("<i"), number("<f")) for _ in range(number("<i"))] for _ in range(number("<i"))]


def test_kaldi_posteriors_read_back_in_binary_and_in_text(tmp_path):
    store = write_store(tmp_path / "targets")
    binary, text = export_kaldi(store, tmp_path / "binary"), export_kaldi(store, tmp_path / "text", text=True)
    assert [path.name for path in binary[:2]] == ["targets.000000.ark", "targets.000000.scp"]
    read = {}
    for path in binary[1::2]:
        for line in path.read_text().splitlines():
            name, where = line.split()
            ark, place = where.rsplit(":", 1)
            read[name] = read_kaldi(Path(ark).read_bytes(), int(place))
    in_text = {}
    for path in text:
        for line in path.read_text().splitlines():
            name, rest = line.split(" ", 1)
            frames = [frame.split() for frame in re.findall(r"\[ (.*?) ?\]", rest)]
            in_text[name] = [[(int(a), float(b)) for a, b in zip(x[::2], x[1::2])] for x in frames]
    assert read.keys() == in_text.keys() == {"s0-u0", "s0-u1", "s0-u2", "s1-u0"}
    for name, frames in read.items():
        ids, log_posteriors = store[name]
        for got in (frames, in_text[name]):
            assert [[senone for senone, _ in frame] for frame in got] == ids.tolist()
            np.testing.assert_allclose(
                [[x for _, x in frame] for frame in got], np.exp(log_posteriors), rtol=1e-5
            )


def test_an_id_that_kaldi_cannot_hold_is_refused_by_name(tmp_path):
    with TargetWriter(shard_path(tmp_path, "targets", 0), 9, 3) as writer:
        writer.write("two words", torch.zeros(2, 9))
    with pytest.raises(ValueError, match="utterance 'two words': a key of Kaldi must not hold white space"):
        export_kaldi(TargetStore(tmp_path), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_utterance_that_is_not_there_is_an_error_that_names_it(tmp_path, capsys):
    write_store(tmp_path)
    assert cli.main(["store", "show", str(tmp_path), "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
