"""Whatever form data come in, the same speech gives the same features, and every utterance is accounted for."""

import gzip
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Fbank, FbankConfig, MonoCut
from lhotse.kaldi import load_kaldi_data_dir
from tiny_audio import RATE, contents, make_samples, open_config, write_audio, write_data

from teacherstudent.config import Align, Data, Features
from teacherstudent.data.data_folders import (
    extract_shar,
    list_audio_folder,
    list_kaldi,
    list_shar,
    make_cut,
    read_table,
)
from teacherstudent.data.dataset import prepared_shards, read_prepared, source_shards
from teacherstudent.data.features import stack
from teacherstudent.data.manifests import LABELLED_PARTS, PARTS
from teacherstudent.data.packed import open_shards
from teacherstudent.data.prepare import prepare
from teacherstudent.data.sources import brings_data, import_data
from teacherstudent.experiment import Experiment

TRANSCRIPTS = Align(source="transcripts")

# -- the same speech in every form ---------------------------------------------------------------------------


def utterances(part: str) -> list[tuple[str, np.ndarray, str, str]]:
    """(id, samples of 16 bits, text, speaker)"""
    count = 5 if part == "human" else 2
    return [
        (
            f"{part}-{n}",
            np.round(make_samples(part, n) * 2**15) / np.float32(2**15),
            f"say {part} {n}",
            f"{part}{n % 2}",
        )
        for n in range(count)
    ]


def write_audio_folder(folder: Path, part: str) -> None:
    lines = []
    for name, samples, text, speaker in utterances(part):
        write_audio(folder / "deep" / speaker / f"{name}.wav", samples)
        lines.append(f"{name}  {text}\n")
    if part in LABELLED_PARTS:
        (folder / "transcripts.txt").write_text("".join(lines[::-1]))


def write_kaldi(folder: Path, part: str) -> None:
    """Whole recordings, one utterance each."""
    tables: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": []}
    for name, samples, text, speaker in utterances(part):
        write_audio(folder / "wav" / f"{name}.wav", samples)
        rows = {"wav.scp": str(folder.resolve() / "wav" / f"{name}.wav"), "text": text, "utt2spk": speaker}
        for table, value in rows.items():
            tables[table].append(f"{name} {value}\n")
    for table, lines in tables.items():
        (folder / table).write_text("".join(lines))


def write_kaldi_flac(folder: Path, part: str) -> None:
    """FLAC files that commands unpack, as in Kaldi's recipe for LibriSpeech."""
    write_kaldi(folder, part)
    lines = []
    for name, samples, _, _ in utterances(part):
        path = folder / "wav" / f"{name}.flac"
        soundfile.write(path, samples, RATE, subtype="PCM_16")
        lines.append(f"{name} flac -c -d -s {path.resolve()} |\n")
    (folder / "wav.scp").write_text("".join(lines))


def write_kaldi_segments(folder: Path, part: str) -> None:
    """All utterances in one recording, with a tenth of a second between them."""
    pieces, segments, texts, speakers, start = [], [], [], [], 0
    for name, samples, text, speaker in utterances(part):
        pieces += [samples, np.full(RATE // 10, 0.5, np.float32)]
        segments.append(f"{name} tape {start / RATE:.6f} {(start + len(samples)) / RATE:.6f}\n")
        texts.append(f"{name} {text}\n")
        speakers.append(f"{name} {speaker}\n")
        start += len(samples) + RATE // 10
    write_audio(folder / "tape.wav", np.concatenate(pieces))
    (folder / "wav.scp").write_text("tape tape.wav\n")
    for table, lines in (("segments", segments), ("text", texts), ("utt2spk", speakers)):
        (folder / table).write_text("".join(lines))


def make_cuts(folder: Path, part: str) -> list[MonoCut]:
    write_audio_folder(folder, part)
    return [make_cut(folder, row) for row in list_audio_folder(folder, part in LABELLED_PARTS).rows]  # type: ignore


def write_sharded_cuts(folder: Path, part: str) -> None:
    cuts = make_cuts(folder, part)
    CutSet.from_cuts(cuts[:1]).to_file(folder / "cuts.000000.jsonl")
    CutSet.from_cuts(cuts[1:]).to_file(folder / "cuts.000001.jsonl.gz")


def write_single_manifest(folder: Path, part: str) -> None:
    CutSet.from_cuts(make_cuts(folder, part)).to_file(folder / "cuts.jsonl.gz")


def write_shar(folder: Path, part: str) -> None:
    cuts = CutSet.from_cuts(make_cuts(folder / "source", part)).with_recording_path_prefix(
        str(folder / "source")
    )
    cuts.to_shar(folder, fields={"recording": "wav"}, shard_size=2)
    shutil.rmtree(folder / "source")


FORMS: dict[str, Callable[[Path, str], None]] = {
    "sharded cuts": write_sharded_cuts,
    "one manifest": write_single_manifest,
    "shar": write_shar,
    "kaldi": write_kaldi,
    "kaldi flac": write_kaldi_flac,
    "kaldi segments": write_kaldi_segments,
    "audio folder": write_audio_folder,
}


def bring(folder: Path, write: Callable[[Path, str], None]) -> Experiment:
    data = folder / "data"
    for part in PARTS:
        (data / part).mkdir(parents=True)
        write(data / part, part)
    (data / "lexicon.txt").write_text("say S\n")
    return reopen(folder)


def reopen(folder: Path, name: str = "experiment", max_left_out_share: float = 0.05) -> Experiment:
    settings = Features(num_mels=10, jobs=1, max_left_out_share=max_left_out_share)
    return open_config(
        folder / name,
        data=Data(folder=str(folder / "data"), shard_utterances=2),
        features=settings,
        align=TRANSCRIPTS,
    )


def run(experiment: Experiment) -> list[Path]:
    """Both steps, recorded as the command line does."""
    outputs = []
    for name, after, step in (("corpus", (), import_data), ("prepare", ("corpus",), prepare)):
        experiment.begin(name, after, ("features",) if name == "prepare" else ())
        outputs = step(experiment)
        experiment.finish(name, outputs)
    return outputs


@pytest.mark.parametrize("form", FORMS)
def test_the_same_speech_in_any_form_gives_the_same_features_and_texts(tmp_path: Path, form: str) -> None:
    experiment = bring(tmp_path, FORMS[form])
    run(experiment)
    for part in PARTS:
        expected = {name: (samples, text, speaker) for name, samples, text, speaker in utterances(part)}
        features = extract(expected)
        found = {}
        shards = zip(
            prepared_shards(experiment, part), open_shards(experiment.path("features", part), "features")
        )
        for path, shard in shards:
            for cut, (name, arrays) in zip(read_prepared(experiment, part, path), shard, strict=True):
                assert cut.id == name
                found[name] = arrays["values"].copy()
                _, text, speaker = expected[name]
                assert cut.supervisions[0].speaker == speaker
                assert cut.supervisions[0].text == (text if part in LABELLED_PARTS else None)
                assert np.array_equal(cut.load_audio()[0], expected[name][0])
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert np.array_equal(values, features[name]), name


def extract(expected: dict[str, tuple[np.ndarray, str, str]]) -> dict[str, np.ndarray]:
    fbank = Fbank(FbankConfig(num_filters=10))
    return {
        name: stack(fbank.extract(samples[None], RATE)).astype(np.float16)
        for name, (samples, *_) in expected.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_artefacts_name_no_place_outside_of_the_data_and_a_second_run_makes_the_same(
    tmp_path: Path, form: str
) -> None:
    experiment = bring(tmp_path, FORMS[form])
    before = contents(run(experiment))
    assert contents(run(experiment)) == before
    other = reopen(tmp_path, "other")
    assert contents(run(other)) == before
    assert other.hashes() == experiment.hashes()
    if form not in ("kaldi", "kaldi flac"):  # whose wav.scp holds absolute paths
        for path in experiment.folder.rglob("*.json*"):
            assert str(tmp_path) not in path.read_text(), path
    assert experiment.is_done("corpus")
    assert experiment.is_done("prepare", ("corpus",))


@pytest.mark.parametrize(("form", "changed"), [("kaldi", "text"), ("audio folder", "transcripts.txt"),
                                              ("one manifest", "cuts.jsonl.gz"), ("shar", "cuts.000000.jsonl.gz"),
                                              ("sharded cuts", "cuts.000000.jsonl")])  # fmt: skip
def test_data_that_change_are_noticed_and_imported_anew(tmp_path: Path, form: str, changed: str) -> None:
    experiment = bring(tmp_path, FORMS[form])
    run(experiment)
    path = tmp_path / "data" / "human" / changed
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = text.replace(b"say human", b"said human")
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    experiment.begin("corpus", ())
    experiment.finish("corpus", import_data(experiment))
    assert not experiment.is_done("prepare", ("corpus",))
    run(experiment)
    cuts = [
        cut
        for path in prepared_shards(experiment, "human")
        for cut in read_prepared(experiment, "human", path)
    ]
    assert any(cut.supervisions[0].text.startswith("said human") for cut in cuts)


def test_shards_hold_the_utterances_of_all_places_of_the_part(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "human"
    lines = []
    for number in range(40):
        write_audio(folder / f"u{number:02}.wav", np.zeros(10))
        lines.append(f"u{number:02} yes\n")
    (folder / "transcripts.txt").write_text("".join(lines))
    for part in PARTS[1:]:
        write_audio_folder(tmp_path / "data" / part, part)
    (tmp_path / "data" / "lexicon.txt").write_text("yes Y\n")
    experiment = open_config(
        tmp_path / "e", data=Data(folder=str(tmp_path / "data"), shard_utterances=11), align=TRANSCRIPTS
    )
    import_data(experiment)
    shards = [
        [json.loads(line)["id"] for line in path.read_text().splitlines()]
        for path in source_shards(experiment, "human")
    ]
    assert [len(shard) for shard in shards] == [10, 10, 10, 10]
    assert sorted(name for shard in shards for name in shard) == [f"u{number:02}" for number in range(40)]
    for shard in shards:
        halves = [name < "u20" for name in shard]
        assert 0 < sum(halves) < 10
        assert shard == sorted(shard)


def test_parts_may_lie_in_different_places_and_have_different_forms(tmp_path: Path) -> None:
    for part, form in zip(PARTS, ("kaldi segments", "audio folder", "one manifest", "sharded cuts")):
        (tmp_path / form / part).mkdir(parents=True)
        FORMS[form](tmp_path / form / part, part)
    (tmp_path / "words.txt").write_text("say S\n")
    data = Data(
        human=str(tmp_path / "kaldi segments" / "human"),
        unlabelled=str(tmp_path / "audio folder" / "unlabelled"),
        dev=str(tmp_path / "one manifest" / "dev" / "cuts.jsonl.gz"),
        test=str(tmp_path / "sharded cuts" / "test"),
        lexicon=str(tmp_path / "words.txt"),
    )
    experiment = open_config(
        tmp_path / "e", data=data, features=Features(num_mels=10, jobs=1), align=TRANSCRIPTS
    )
    assert brings_data(experiment.config)
    run(experiment)
    assert experiment.is_done("prepare", ("corpus",))
    assert {name for name in experiment.hashes() if name.startswith("data/")} == {
        "data/test/cuts.000000.jsonl", "data/test/cuts.000001.jsonl.gz"}  # fmt: skip
    report = json.loads(experiment.path("features", "report.json").read_text())
    assert [report[part]["utterances"] for part in PARTS] == [5, 2, 2, 2]


# -- Kaldi beside lhotse -------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_kaldi, write_kaldi_segments])
def test_a_kaldi_folder_is_read_as_lhotse_reads_it(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    folder = tmp_path / "human"
    folder.mkdir()
    write(folder, "human")
    text = (folder / "wav.scp").read_text()
    (folder / "wav.scp").write_text(text.replace(" tape.wav", f" {folder / 'tape.wav'}"))
    _, supervisions, _ = load_kaldi_data_dir(folder, RATE)
    assert supervisions is not None
    cuts = {row.id: make_cut(folder, row) for row in list_kaldi(folder, True).rows}
    assert cuts.keys() == {supervision.id for supervision in supervisions}
    for theirs in supervisions:
        ours = cuts[theirs.id]
        assert (ours.supervisions[0].text, ours.supervisions[0].speaker) == (theirs.text, theirs.speaker)
        assert ours.recording.id == theirs.recording_id
        assert ours.start == pytest.approx(theirs.start, abs=1e-6)
        assert ours.duration == pytest.approx(theirs.duration, abs=1e-3)  # lhotse's are cut to milliseconds


def test_a_shar_is_unpacked_to_the_samples_that_were_packed(tmp_path: Path) -> None:
    (tmp_path / "shar").mkdir()
    write_shar(tmp_path / "shar", "human")
    found = {}
    for number, (cuts, recordings) in enumerate(list_shar(tmp_path / "shar")):
        for name, cut in extract_shar(cuts, recordings, tmp_path / "out" / "audio" / f"{number:06d}"):
            assert cut.custom is None
            found[name] = soundfile.read(tmp_path / "out" / cut.recording.sources[0].source, dtype="float32")[
                0
            ]
    for name, samples, *_ in utterances("human"):
        assert np.array_equal(found[name], samples)


# -- what cannot be used -------------------------------------------------------------------------------------


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def drop_line(path: Path, start: str) -> None:
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(start)))


SKIPS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "a transcript without audio": ("audio folder", lambda f: append(f / "transcripts.txt", "x yes\n"), "x",
                                   "a transcript without audio"),
    "audio without a transcript": ("audio folder", lambda f: drop_line(f / "transcripts.txt", "human-3 "), "human-3",
                                   "no transcript"),
    "an empty transcript": ("kaldi", lambda f: (drop_line(f / "text", "human-3 "), append(f / "text", "human-3\n")),
                            "human-3", "no transcript"),
    "no sound file": ("audio folder", lambda f: next(f.rglob("human-1.wav")).write_bytes(b"no"), "human-1",
                      "the audio cannot be read: deep/human1/human-1.wav"),
    "kaldi: text without audio": ("kaldi", lambda f: append(f / "text", "x yes\n"), "x", "a transcript without audio"),
    "kaldi: audio without text": ("kaldi segments", lambda f: drop_line(f / "text", "human-3 "), "human-3",
                                  "no transcript"),
    "kaldi: missing audio": ("kaldi", lambda f: (f / "wav" / "human-2.wav").unlink(), "human-2",
                             "the audio is missing"),
    "kaldi: no recording": ("kaldi segments", lambda f: (append(f / "segments", "x reel 0 1\n"),
                                                         append(f / "text", "x yes\n")), "x",
                            "no recording: reel is not in wav.scp"),
    "kaldi: a segment beyond": ("kaldi segments", lambda f: (append(f / "segments", "x tape 0 99\n"),
                                                             append(f / "text", "x yes\n")), "x",
                                "a segment beyond its recording"),
    "kaldi: an empty segment": ("kaldi segments", lambda f: (append(f / "segments", "x tape 1 1\n"),
                                                             append(f / "text", "x yes\n")), "x",
                                "a segment of no duration"),
}  # fmt: skip


@pytest.mark.parametrize("problem", SKIPS)
def test_what_cannot_be_imported_is_listed_and_counted_with_what_cannot_be_prepared(
    tmp_path: Path, problem: str
) -> None:
    form, break_data, name, reason = SKIPS[problem]
    bring(tmp_path, FORMS[form])
    break_data(tmp_path / "data" / "human")
    experiment = reopen(tmp_path, "e", max_left_out_share=0.3)
    with pytest.warns(UserWarning, match=r"1 of [56] utterances of the part 'human' are left out"):
        run(experiment)
    lines = experiment.path("features", "skipped.jsonl").read_text().splitlines()
    [entry] = map(json.loads, lines)
    assert (entry["part"], entry["id"]) == ("human", name)
    assert entry["reason"].startswith(reason)
    used = [n for shard in open_shards(experiment.path("features", "human"), "features") for n in shard.ids]
    assert sorted([*used, name]) == sorted({n for n, *_ in utterances("human")} | {name})
    with pytest.raises(ValueError, match=rf"1 x {re.escape(reason)}(.|\n)*for instance {name}"):
        run(reopen(tmp_path, "strict"))


def test_a_segment_that_ends_just_after_its_recording_ends_with_it_and_this_is_told(tmp_path: Path) -> None:
    experiment = bring(tmp_path, write_kaldi_segments)
    seconds = soundfile.info(str(tmp_path / "data" / "human" / "tape.wav")).duration
    append(tmp_path / "data" / "human" / "segments", f"x tape {seconds - 0.1} {seconds + 0.3}\n")
    append(tmp_path / "data" / "human" / "text", "x yes\n")
    with pytest.warns(UserWarning, match="1 segments end after their recording"):
        import_data(experiment)
    cuts = {json.loads(line)["id"]: json.loads(line) for path in source_shards(experiment, "human")
            for line in path.read_text().splitlines()}  # fmt: skip
    assert cuts["x"]["duration"] == pytest.approx(0.1, abs=1e-4)


def test_a_line_ends_where_the_file_says_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("a one\u2028two\x85three\r\nb\x0bfour five\x0c\n".encode())
    assert read_table(tmp_path / "text") == {"a": "one\u2028two\x85three", "b": "four five"}


def test_audio_in_folders_that_are_links_is_found(tmp_path: Path) -> None:
    experiment = bring(tmp_path, write_audio_folder)
    whole = contents(run(experiment))
    for part in PARTS:
        deep, elsewhere = tmp_path / "data" / part / "deep", tmp_path / part
        deep.rename(elsewhere)
        deep.symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(tmp_path / "data" / part)  # a circle
    assert contents(run(reopen(tmp_path, "other"))) == whole


def test_a_data_folder_that_is_a_link_leads_to_the_audio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "far" / "away" / "human"
    folder.mkdir(parents=True)
    write_kaldi(folder, "human")
    (folder / "wav").rename(tmp_path / "wav")
    (folder / "wav.scp").write_text("".join(f"{name} wav/{name}.wav\n" for name, *_ in utterances("human")))
    (tmp_path / "human").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for given in (folder, tmp_path / "human", Path("human")):
        rows = list_kaldi(given, True).rows
        assert [row.id for row in rows] == [name for name, *_ in utterances("human")]
        for row in rows:
            assert make_cut(given, row).num_samples > 0
            assert not Path(row.audio).is_absolute()


def test_audio_that_comes_back_is_imported(tmp_path: Path) -> None:
    experiment = bring(tmp_path, write_kaldi)
    audio = tmp_path / "data" / "human" / "wav" / "human-2.wav"
    audio.rename(tmp_path / "lost.wav")
    import_data(experiment)
    assert "human-2" in experiment.path("corpus", "human", "skipped.jsonl").read_text()
    (tmp_path / "lost.wav").rename(audio)
    import_data(experiment)
    assert experiment.path("corpus", "human", "skipped.jsonl").read_text() == ""


def test_a_cut_of_a_shar_without_a_recording_is_listed(tmp_path: Path) -> None:
    experiment = bring(tmp_path, write_shar)
    path = tmp_path / "data" / "human" / "cuts.000000.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    lost = lines[1]["id"]
    del lines[1]["recording"]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    tar = path.with_name("recording.000000.tar")
    with tarfile.open(tar) as old:
        members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as new:
        for member, data in members:
            name, suffix = member.name.rsplit(".", 1)
            if name == lost:  # as lhotse writes what is not there
                member.name, member.size = f"{name}.{'nometa' if suffix == 'json' else 'nodata'}", 0
            new.addfile(member, io.BytesIO(data[: member.size]))
    import_data(experiment)
    [entry] = map(json.loads, experiment.path("corpus", "human", "skipped.jsonl").read_text().splitlines())
    assert entry == {"id": lost, "reason": "no audio of its own in the tar file"}


def hide_audio(data: Path) -> None:
    for name in ("wav.scp", "tape.wav"):
        (data / "dev" / name).rename(data / "dev" / f"{name}.old")


ERRORS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "commands": ("kaldi", lambda d: (d / "human" / "wav.scp").write_text("human-0 sox a.flac -t wav - |\n"),
                 ["human-0", "sox a.flac -t wav - |", "command", "not run", "scp:wav.scp scp:files.scp"]),
    "archives": ("kaldi", lambda d: (d / "human" / "wav.scp").write_text("human-0 a.ark:17\n"),
                 ["human-0", "archive", "a.ark:17"]),
    "an id twice": ("kaldi", lambda d: append(d / "human" / "wav.scp", "human-0 x.wav\n"),
                    ["wav.scp, line 6", "'human-0'", "twice"]),
    "a name alone": ("kaldi", lambda d: append(d / "human" / "wav.scp", "x\n"), ["wav.scp, line 6", "'x'"]),
    "a transcript twice": ("audio folder", lambda d: append(d / "human" / "transcripts.txt", "human-0 yes\n"),
                           ["transcripts.txt, line 6", "twice"]),
    "a segment from nowhere": ("kaldi segments", lambda d: append(d / "human" / "segments", "x tape nan 1\n"),
                               ["segments", "x tape nan 1", "UTTERANCE RECORDING START END"]),
    "a strange segment": ("kaldi segments", lambda d: append(d / "human" / "segments", "x tape zero 1\n"),
                          ["segments", "x tape zero 1", "UTTERANCE RECORDING START END"]),
    "no text": ("kaldi", lambda d: (d / "human" / "text").unlink(), ["/human/text", "transcripts"]),
    "no transcripts": ("audio folder", lambda d: (d / "human" / "transcripts.txt").unlink(),
                       ["/human/transcripts.txt"]),
    "no words": ("audio folder", lambda d: (d / "human" / "transcripts.txt").write_text(""),
                 ["5 x no transcript, for instance human-0"]),
    "two files of one name": ("audio folder", lambda d: write_audio(d / "human" / "other" / "human-0.flac",
                                                                    np.zeros(99), subtype="PCM_16"),
                              ["'human-0'", "human-0.flac", "human-0.wav"]),
    "a broken line": ("one manifest", lambda d: (d / "human" / "cuts.jsonl.gz").write_bytes(gzip.compress(b'{"id')),
                      ["/human/cuts.jsonl.gz, line 1"]),
    "a missing tar": ("shar", lambda d: (d / "human" / "recording.000001.tar").unlink(), ["recording.000001.tar"]),
    "nothing": ("kaldi segments", hide_audio, ["/dev", "wav.scp", "cuts.*.jsonl"]),
    "no folder": ("kaldi", lambda d: (d / "dev").rename(d / "development"), ["no folder", "/dev", "data.folder"]),
    "no lexicon": ("kaldi", lambda d: (d / "lexicon.txt").unlink(), ["lexicon.txt", "data.lexicon"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("problem", ERRORS)
def test_data_that_cannot_be_understood_are_refused_with_the_place_and_what_to_do(
    tmp_path: Path, problem: str
) -> None:
    form, break_data, words = ERRORS[problem]
    bring(tmp_path, FORMS[form])
    break_data(tmp_path / "data")
    with pytest.raises(ValueError) as error:
        import_data(reopen(tmp_path, "e"))
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "e" / "corpus" / "human").exists() or problem in ("nothing", "no folder")


@pytest.mark.parametrize("form", FORMS)
def test_only_cuts_may_be_where_alignments_are_looked_for(tmp_path: Path, form: str) -> None:
    config = bring(tmp_path, FORMS[form]).config
    experiment = open_config(tmp_path / "cuts", data=config.data)
    if form in ("sharded cuts", "one manifest", "shar"):
        import_data(experiment)
        return
    with pytest.raises(
        ValueError, match=r"hold no alignments: human, dev, test.*source = \"transcripts\" makes them"
    ):
        import_data(experiment)
    assert not experiment.path("corpus").exists()


def test_a_byte_order_mark_is_part_of_no_id(tmp_path: Path) -> None:
    path = tmp_path / "transcripts.txt"
    path.write_bytes(b"\xef\xbb\xbfone yes\ntwo no\n")
    assert read_table(path) == {"one": "yes", "two": "no"}


def test_a_part_that_is_not_named_is_missed(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    experiment = open_config(tmp_path / "e", data=Data(human=str(data / "human")))
    with pytest.raises(ValueError, match=r"data.unlabelled is not set"):
        import_data(experiment)


def test_an_interrupted_import_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = bring(tmp_path, write_audio_folder)
    whole = contents(import_data(reopen(tmp_path, "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(
            "teacherstudent.data.sources.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            import_data(experiment)
    assert not experiment.path("corpus", "human").exists()
    assert contents(import_data(experiment)) == whole
