"""Whatever the source, an utterance's phones end on the same frames; what cannot be aligned is listed and counted."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from lhotse.utils import fastcopy
from tiny_alignments import (
    NEVER_LOOPED,
    PHONES,
    SAMPLING_RATE,
    make_cut,
    make_experiment,
    model_bytes,
    spell,
    write_archive,
    write_phones_txt,
    write_textgrid,
)
from tiny_speech import tiny_inventory

from teacherstudent.alignment.align import align
from teacherstudent.alignment.align_sources import cut_segments
from teacherstudent.config import Senones
from teacherstudent.data.packed import PackedShard, shard_path
from teacherstudent.tying.kaldi_tree import export_kaldi

SIL, A, B, K = 1, 2, 3, 4
RUNS = {  # (phone, Kaldi's frames of 10 ms)
    "one": [(SIL, 12), (A, 7), (B, 10), (SIL, 5), (B, 9), (A, 6), (SIL, 20)],
    "two": [(A, 6), (A, 8), (A, 5), (K, 7), (A, 6)],
    "three": [(SIL, 40), (K, 30), (A, 31), (SIL, 8)],
    "four": [(SIL, 9), (K, 9), (A, 11), (A, 14), (SIL, 30)],
}
WORDS = {  # over the runs
    "one": [(1, 3), (4, 6)],
    "two": [(0, 1), (1, 2), (2, 3), (3, 5)],
    "three": [(1, 3)],
    "four": [(1, 3), (3, 4)],
}
TEXTS = {"one": "ab ba", "two": "a a a ka", "three": "ka", "four": "ka a"}


def samples_of(name: str) -> int:
    """As many as make the frames with snip_edges, and a few more."""
    return 160 * (sum(frames for _, frames in RUNS[name]) - 1) + 400 + 37


def truth(name: str) -> list[tuple[str, float, float]]:
    """(phone, start, end) in seconds: Kaldi's frames are centred at 12.5 ms, 22.5 ms, …"""
    edges = np.cumsum([0, *(frames for _, frames in RUNS[name])]) * 0.01 + 0.0075
    edges[0], edges[-1] = 0.0, samples_of(name) / SAMPLING_RATE
    return [
        (PHONES[phone - 1], *map(float, span))
        for (phone, _), span in zip(RUNS[name], itertools.pairwise(edges))
    ]


def words_of(name: str) -> list[tuple[str, float, float]]:
    segments = truth(name)
    spans = [(segments[first][1], segments[last - 1][2]) for first, last in WORDS[name]]
    return [(word, *span) for word, span in zip(TEXTS[name].split(), spans, strict=True)]


def cut_of(name: str, *items, **keywords):
    return make_cut(name, samples_of(name), *items, **{"text": TEXTS[name]} | keywords)


def cuts(**keywords):
    return [[cut_of(name, **keywords) for name in names] for names in SHARDS]


SHARDS = (("one", "two"), ("three", "four"))


def write_kaldi(folder, kind="gmm", binary=True, reorder=True, names=tuple(RUNS)) -> dict:
    write_phones_txt(folder)
    (folder / "final.mdl").write_bytes(model_bytes(NEVER_LOOPED[kind], binary))
    for number, name in enumerate(names, 1):
        write_archive(
            folder / f"ali.{number}.gz", {name: spell(NEVER_LOOPED[kind], RUNS[name], reorder)}, binary
        )
    return {"source": "kaldi", "folder": str(folder)}


def write_ctm(folder, kaldi: bool) -> dict:
    """With Kaldi's times, which are frame numbers, and numbers for phones; or with true times and names."""
    write_phones_txt(folder)
    lines = []
    for name in reversed(RUNS):
        now = 0
        for (phone, frames), (symbol, start, end) in zip(RUNS[name], truth(name)):
            if kaldi:
                lines.append(f"{name} 1 {now / 100:.2f} {frames / 100:.2f} {phone}")
            else:
                lines.append(f"{name} A {start:.6f} {end - start:.6f} {symbol} 0.97")
            now += frames
    (folder / "phones.ctm").write_text(";; made by hand\n" + "\n".join(lines) + "\n")
    words = [
        f"{name} 1 {start:.4f} {end - start:.4f} {word}"
        for name in RUNS
        for word, start, end in words_of(name)
    ]
    (folder / "words.ctm").write_text("\n".join(words) + "\n")
    return {"source": "ctm", "folder": str(folder), "snip_edges": kaldi}


def write_textgrids(folder) -> dict:
    for name in RUNS:
        phones = [(start, end, "" if symbol == "SIL" else symbol) for symbol, start, end in truth(name)]
        words = [(start, end, word) for word, start, end in words_of(name)]
        path = folder / "speaker" / f"{name}.TextGrid"
        write_textgrid(
            path, samples_of(name) / SAMPLING_RATE, {"anna - words": words, "anna - phones": phones}
        )
    return {"source": "textgrid", "folder": str(folder)}


def read(experiment, part="human") -> dict[str, dict[str, list]]:
    found = {}
    for number in range(2):
        shard = PackedShard(shard_path(experiment.path("align", part), "phones", number))
        for name, arrays in shard:
            found[name] = {key: values.tolist() for key, values in arrays.items()}
    return found


def skipped(experiment) -> list[dict]:
    return [json.loads(line) for line in experiment.path("align", "skipped.jsonl").read_text().splitlines()]


def report(experiment) -> dict:
    return json.loads(experiment.path("align", "report.json").read_text())


def expected(name: str) -> list[int]:
    """Frame by frame, in half milliseconds: the phone of the Kaldi frame whose centre is nearest."""
    frames = [phone for phone, count in RUNS[name] for _ in range(count)]
    total = -(-round(samples_of(name) / 160) // 3)
    labels = []
    for centre in range(30, 60 * total, 60):
        distances = [abs(25 + 20 * number - centre) for number in range(len(frames))]
        within = centre / 2000 < samples_of(name) / SAMPLING_RATE
        labels.append(frames[distances.index(min(distances))] if within else SIL)
    return labels


@pytest.fixture(scope="module")
def by_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    sources = {
        f"kaldi-{kind}-{'binary' if binary else 'text'}-{reorder}": write_kaldi(
            folder / f"{kind}{binary}{reorder}", kind, binary, reorder
        )
        for kind, binary, reorder in (
            ("gmm", True, True),
            ("gmm", False, False),
            ("chain", True, True),
            ("chain", False, True),
        )
    }
    sources |= {
        "ctm-kaldi": write_ctm(folder / "ctm1", kaldi=True),
        "ctm-true": write_ctm(folder / "ctm2", kaldi=False),
    }
    sources |= {"textgrid": write_textgrids(folder / "textgrid"), "cuts": {"source": "cuts"}}
    found = {}
    for name, settings in sources.items():
        shards = [[cut_of(name, truth(name)) for name in names] for names in SHARDS]
        experiment = make_experiment(folder / f"experiment-{name}", shards, **settings)
        align(experiment)
        found[name] = experiment
    return found


def test_every_source_gives_the_frames_of_the_known_phones(by_source) -> None:
    for source, experiment in by_source.items():
        labels = read(experiment)
        assert list(labels) == list(RUNS), source
        for name, arrays in labels.items():
            assert arrays["phone"] == expected(name), (source, name)
    firsts = {json.dumps(read(experiment)) for experiment in by_source.values()}
    assert len(firsts) == 1, "the frames that open a phone differ"


def test_the_report_tells_coverage_and_how_far_boundaries_moved(by_source) -> None:
    for source, experiment in by_source.items():
        part = report(experiment)["parts"]["dev"]
        assert (part["utterances"], part["aligned"], part["dropped"]) == (4, 4, {}), source
        assert part["seconds"] == pytest.approx(sum(map(samples_of, RUNS)) / SAMPLING_RATE, abs=0.01)
        seconds = sum(end - start for name in RUNS for _, start, end in truth(name))
        spoken = sum(end - start for name in RUNS for phone, start, end in truth(name) if phone != "SIL")
        if source != "textgrid":  # where gaps are silence
            assert part["coverage"] == 1
            assert part["speech_share"] == pytest.approx(spoken / seconds, abs=1e-3)
        assert abs(part["frames_after_alignment"]["median_ms"]) < 8
        assert part["frames_after_alignment"]["median_absolute_ms"] <= 15
        against = part["alignment_after_cuts"]
        if source == "cuts":
            assert against["utterances"] == 0
        else:
            assert (against["utterances"], against["median_ms"], against["median_absolute_ms"]) == (4, 0, 0)
        assert part["offset_ms"] == (7.5 if "kaldi" in source else 0)


def test_a_forgotten_convention_shows_in_the_report(tmp_path) -> None:
    shards = [[cut_of(name, truth(name)) for name in names] for names in SHARDS]
    settings = write_kaldi(tmp_path / "ali")
    experiment = make_experiment(tmp_path / "experiment", shards, **settings, snip_edges=False)
    align(experiment)
    assert report(experiment)["parts"]["human"]["alignment_after_cuts"]["median_ms"] == -7.5


def test_what_a_chain_model_aligned_every_30_ms_keeps_its_frames(tmp_path) -> None:
    frames = {"one": [(SIL, 4), (A, 1), (B, 3), (SIL, 5)], "two": [(A, 1), (A, 1), (K, 2), (A, 1)]}
    folder = tmp_path / "ali"
    write_kaldi(folder, "chain", names=())
    write_archive(
        folder / "ali.1.gz",
        {name: spell(NEVER_LOOPED["chain"], runs, True) for name, runs in frames.items()},
        True,
    )
    texts = {"one": "ab", "two": "a a ka"}
    made = [
        make_cut(name, 480 * sum(count for _, count in runs) + 40, text=texts[name])
        for name, runs in frames.items()
    ]
    experiment = make_experiment(
        tmp_path / "experiment",
        [made, made[:0]],
        source="kaldi",
        folder=str(folder),
        frame_shift_seconds=0.03,
    )
    align(experiment)
    for name, runs in frames.items():
        assert read(experiment)[name]["phone"] == [phone for phone, count in runs for _ in range(count)]


@pytest.mark.parametrize("source", ["cuts", "ctm", "textgrid"])
def test_unmarked_phones_get_their_place_in_the_word_from_the_words(source, tmp_path) -> None:
    settings = {
        "cuts": lambda: {"source": "cuts"},
        "ctm": lambda: write_ctm(tmp_path / "ctm", kaldi=False),
        "textgrid": lambda: write_textgrids(tmp_path / "grids"),
    }[source]()
    names = ("one", "two", "four")
    made = [cut_of(name, truth(name), words_of(name)) for name in names]
    experiment = make_experiment(tmp_path / "experiment", [made, []], word_positions=True, **settings)
    align(experiment)
    shard = PackedShard(shard_path(experiment.path("align", "test"), "phones", 0))
    phones = shard.header["phones"]

    def said(name: str) -> str:
        arrays = shard[name]
        return " ".join(phones[phone - 1] for phone in arrays["phone"][arrays["first"]] if phone > 1)

    assert said("one") == "A_B B_E B_B A_E"
    assert said("two") == "A_S A_S A_S K_B A_E"
    assert said("four") == "K_B A_E A_S"


def test_without_words_the_error_says_what_marks_places_in_words(tmp_path) -> None:
    settings = write_kaldi(tmp_path / "ali")
    experiment = make_experiment(tmp_path / "experiment", cuts(), word_positions=True, **settings)
    with pytest.raises(ValueError, match=r"(?s)4 of 4.*words\.ctm.*word_positions = false.*one, two, three"):
        align(experiment)


def test_pdf_ids_become_the_pdf_of_the_nearest_frame(tmp_path) -> None:
    inventory = tiny_inventory()
    export_kaldi(inventory, tmp_path / "tree")
    generator = np.random.default_rng(3)
    pdfs = {
        name: generator.integers(0, inventory.num_senones, sum(n for _, n in RUNS[name])) for name in RUNS
    }
    folder = tmp_path / "ali"
    write_archive(folder / "ali.1.gz", {name: ids.tolist() for name, ids in pdfs.items()}, binary=True)
    senones = Senones(kaldi_tree=str(tmp_path / "tree"))
    experiment = make_experiment(
        tmp_path / "experiment", cuts(), senones=senones, source="kaldi", folder=str(folder)
    )
    align(experiment)
    found = read(experiment)
    assert PackedShard(shard_path(experiment.path("align", "human"), "phones", 0)).header == {
        "num_pdfs": inventory.num_senones
    }
    for name, ids in pdfs.items():
        total = -(-round(samples_of(name) / 160) // 3)
        centres = 12.5 + 10 * np.arange(len(ids))
        nearest = [int(np.abs(centres - 30 * frame - 15).argmin()) for frame in range(total)]
        assert found[name]["pdf"] == ids[nearest].tolist()


def test_pdf_ids_without_their_tree_are_refused(tmp_path) -> None:
    write_archive(tmp_path / "ali" / "ali.1.gz", {"one": [1]}, binary=True)
    experiment = make_experiment(
        tmp_path / "experiment", cuts(), source="kaldi", folder=str(tmp_path / "ali")
    )
    with pytest.raises(ValueError, match=r"no final\.mdl.*senones\.kaldi_tree"):
        align(experiment)


def test_a_copy_has_the_phones_of_its_original_at_its_speed(tmp_path) -> None:
    original = cut_of("one")
    noisy = fastcopy(original, id="one_snr10", custom={"copy_of": {"id": "one"}})
    fast = original.perturb_speed(1.25, affix_id=False)
    fast = fastcopy(fast, id="one_fast", custom={"copy_of": {"id": "one", "speed": 1.25}})
    settings = write_kaldi(tmp_path / "ali")
    experiment = make_experiment(tmp_path / "experiment", [[original, noisy, fast], []], **settings)
    align(experiment)
    found = read(experiment)
    assert found["one_snr10"] == found["one"]
    spans = [(phone, 800 * start, 800 * end) for phone, start, end in truth("one")]
    for frame, phone in enumerate(found["one_fast"]["phone"]):
        centre = 30 * frame + 15
        said = [name for name, start, end in spans if start <= centre < end]
        assert PHONES[phone - 1] == (said[0] if said else "SIL")


def test_a_copy_of_what_has_no_alignment_has_none_for_the_same_reason(tmp_path) -> None:
    longer = make_cut("one", samples_of("one") + 3200)
    copy = fastcopy(longer, id="one_snr10", custom={"copy_of": {"id": "one"}})
    orphan = fastcopy(longer, id="two_snr10", custom={"copy_of": {"id": "two"}})
    settings = write_kaldi(tmp_path / "ali")
    experiment = make_experiment(
        tmp_path / "experiment", [[longer, copy, orphan], []], **settings, max_dropped_share=1.0
    )
    with pytest.warns(UserWarning):
        align(experiment)
    reasons = {row["id"]: row["reason"] for row in skipped(experiment)}
    assert reasons["one_snr10"] == reasons["one"]
    assert "other audio" in reasons["one"]
    assert "without its original" in reasons["two_snr10"]


def test_a_copy_of_the_cuts_own_phones_is_not_scaled_twice(tmp_path) -> None:
    original = cut_of("one", truth("one"))
    fast = original.perturb_speed(1.25, affix_id=False)
    fast = fastcopy(fast, id="one_fast", custom={"copy_of": {"id": "one", "speed": 1.25}})
    experiment = make_experiment(tmp_path / "experiment", [[original, fast], []])
    align(experiment)
    spoken = [phone for phone in read(experiment)["one_fast"]["phone"] if phone > 1]
    assert len(spoken) == pytest.approx(0.38 / 1.25 / 0.03, abs=1.5)


def bad_cuts():
    """Of each kind of failure one, beside two that are well."""
    unknown = [("A", 0.0, 0.3), ("Q", 0.3, 0.5)]
    overlapping = [("A", 0.0, 0.3), ("B", 0.2, 0.5)]
    return [
        make_cut("good", 16000, [("A", 0.1, 0.3), ("B", 0.3, 0.5)]),
        make_cut("none", 16000),
        make_cut("other-audio", 16000, [("A", 0.1, 0.3), ("B", 0.9, 1.5)]),
        make_cut("unknown", 16000, unknown),
        make_cut("noise", 16000, [("A", 0.0, 0.3), ("spn", 0.3, 0.5)]),
        make_cut("silent", 16000, [("sil", 0.0, 1.0)]),
        make_cut("overlapping", 16000, overlapping),
        make_cut("backwards", 16000, [("A", 0.0, 0.3), ("B", 0.5, 0.4)]),
        make_cut("well", 16000, [("sp", 0.0, 0.3), ("A", 0.3, 1.0)]),
    ]


def test_a_flat_start_s_segments_and_reasons_are_taken_as_they_are(tmp_path, monkeypatch) -> None:
    def written(experiment):
        for part in ("human", "dev", "test"):
            for number, names in enumerate(SHARDS):
                folder = tmp_path / "flat" / part
                folder.mkdir(parents=True, exist_ok=True)
                lines = []
                for name in names:
                    phones, starts, ends = zip(*truth(name))
                    lines.append({"id": name, "starts": starts, "ends": ends, "phones": phones})
                if number == 0:
                    lines[1] = {"id": "two", "reason": "words that are not in the lexicon: zwei"}
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (folder / f"segments.{number:06d}.jsonl").write_text(text)
        return tmp_path / "flat"

    monkeypatch.setattr("teacherstudent.alignment.align_sources.train_and_align", written)
    experiment = make_experiment(tmp_path / "experiment", cuts(), source="transcripts", max_dropped_share=0.3)
    with pytest.warns(UserWarning, match="1 x words that are not in the lexicon: zwei"):
        align(experiment)
    assert {name: arrays["phone"] for name, arrays in read(experiment).items()} == {
        name: expected(name) for name in ("one", "three", "four")
    }
    assert report(experiment)["parts"]["test"]["dropped"] == {"words that are not in the lexicon": 1}


def test_a_folder_that_was_put_right_is_read_anew(tmp_path) -> None:
    settings = write_kaldi(tmp_path / "ali", names=("one", "two"))
    experiment = make_experiment(tmp_path / "experiment", cuts(), **settings)
    with pytest.raises(ValueError, match="2 of 4"):
        align(experiment)
    assert [row["id"] for row in skipped(experiment) if row["part"] == "human"] == ["three", "four"]
    write_kaldi(tmp_path / "ali")
    align(experiment)
    assert list(read(experiment)) == list(RUNS)


def test_what_cannot_be_aligned_is_left_out_listed_and_counted(tmp_path) -> None:
    experiment = make_experiment(tmp_path / "experiment", [bad_cuts(), []], max_dropped_share=0.8)
    with pytest.warns(UserWarning, match=r"(?s)7 of 9 utterances of human.*dev.*test"):
        align(experiment)
    assert list(read(experiment)) == ["good", "well"]
    rows = [row for row in skipped(experiment) if row["part"] == "human"]
    kinds = {row["id"]: row["reason"].partition(":")[0] for row in rows}
    assert kinds == {
        "none": "no phone alignment in the cut",
        "other-audio": "alignment of other audio",
        "unknown": "phones that are not in the lexicon",
        "noise": "phones that are not in the lexicon",
        "silent": "nothing but silence in the alignment",
        "overlapping": "phones that overlap",
        "backwards": "times that are none",
    }
    part = report(experiment)["parts"]["human"]
    assert part["dropped"]["phones that are not in the lexicon"] == 2
    assert sum(part["dropped"].values()) + part["aligned"] == part["utterances"] == 9


def test_more_than_the_allowed_share_is_an_error_that_says_why(tmp_path) -> None:
    experiment = make_experiment(tmp_path / "experiment", [bad_cuts(), []], max_dropped_share=0.7)
    with pytest.raises(
        ValueError, match=r"(?s)7 of 9.*2 x phones that are not in the lexicon: Q \(unknown, noise\)"
    ):
        align(experiment)


def test_utterances_that_the_folder_lacks_and_those_of_other_audio_are_listed(tmp_path) -> None:
    longer = make_cut("three", samples_of("three") + 3200)
    shards = [[cut_of("one"), make_cut("absent", 16000)], [longer]]
    settings = write_kaldi(tmp_path / "ali")
    experiment = make_experiment(tmp_path / "experiment", shards, **settings, max_dropped_share=0.7)
    with pytest.warns(UserWarning):
        align(experiment)
    reasons = {row["id"]: row["reason"] for row in skipped(experiment)}
    assert "no alignment in align.folder" in reasons["absent"]
    assert "other audio" in reasons["three"]
    assert report(experiment)["parts"]["human"]["utterances_in_folder"] == 4


def other_speech(kind, folder):
    """What there is under the ids of "one" and "four" is shorter speech than theirs; "two" and "three" are right."""
    swapped = {"one": [(K, 12), (A, 12)], "four": [(A, 10), (B, 6), (B, 6), (A, 6)]}
    said = {"one": [("ka", 0.0, 0.24)], "four": [("ab", 0.0, 0.16), ("ba", 0.16, 0.28)]}
    spans = {
        name: [(PHONES[phone - 1], *times) for (phone, _), times in
               zip(runs, itertools.pairwise((np.cumsum([0, *(count for _, count in runs)]) / 100).tolist()))]
        for name, runs in swapped.items()
    }  # fmt: skip
    if kind == "kaldi":
        settings = write_kaldi(folder, names=("two", "three"))
        for name, runs in swapped.items():
            rest = sum(frames for _, frames in RUNS[name]) - sum(frames for _, frames in runs)
            ids = spell(NEVER_LOOPED["gmm"], [*runs, (SIL, rest)], True)
            write_archive(folder / f"ali.{name}.gz", {name: ids}, True)
    elif kind == "textgrid":
        settings = write_textgrids(folder)
        for name in swapped:
            tiers = {"phones": [(start, end, symbol) for symbol, start, end in spans[name]],
                     "words": [(start, end, word) for word, start, end in said[name]]}  # fmt: skip
            write_textgrid(folder / "speaker" / f"{name}.TextGrid", samples_of(name) / SAMPLING_RATE, tiers)
    else:
        settings = write_ctm(folder, kaldi=False)
        for stem, rows in (("phones", spans), ("words", said)):
            path = folder / f"{stem}.ctm"
            lines = [line for line in path.read_text().splitlines(True) if line.split()[0] not in swapped]
            lines += [
                f"{name} 1 {start} {end - start} {symbol}\n"
                for name in swapped
                for symbol, start, end in rows[name]
            ]
            path.write_text("".join(lines))
        if kind == "ctm without words":
            (folder / "words.ctm").unlink()
    return settings


@pytest.mark.parametrize("kind", ["kaldi", "ctm", "ctm without words", "textgrid"])
def test_alignments_of_other_speech_of_a_fitting_length_are_listed(kind, tmp_path) -> None:
    settings = other_speech(kind, tmp_path / "ali")
    experiment = make_experiment(tmp_path / "experiment", cuts(), **settings, max_dropped_share=0.5)
    with pytest.warns(UserWarning, match="2 x alignment of other words"):
        align(experiment)
    reasons = {row["id"]: row["reason"] for row in skipped(experiment) if row["part"] == "dev"}
    assert reasons.keys() == {"one", "four"}
    assert "'ab ba'" in reasons["one"]
    assert "'ka a'" in reasons["four"]
    assert report(experiment)["parts"]["dev"]["spelt_as_in_lexicon"] == 1


def test_words_alone_tell_speech_of_the_same_sounds_apart(tmp_path) -> None:
    settings = write_ctm(tmp_path / "ctm", kaldi=False)
    path = tmp_path / "ctm" / "words.ctm"
    path.write_text(path.read_text().replace(" ab\n", " abb\n"))
    experiment = make_experiment(tmp_path / "experiment", cuts(), **settings, max_dropped_share=0.25)
    with pytest.warns(UserWarning, match=r"1 x alignment of other words: 'abb ba'.* 'ab ba' \(one\)"):
        align(experiment)


def test_phones_of_another_lexicon_are_taken_and_counted_and_those_of_a_part_are_not_compared(
    tmp_path,
) -> None:
    settings = write_kaldi(tmp_path / "ali", names=("one", "two", "three"))
    runs = [(SIL, 9), (K, 9), (B, 11), (A, 14), (SIL, 30)]  # "ka a", were it not for B
    write_archive(tmp_path / "ali" / "ali.9.gz", {"four": spell(NEVER_LOOPED["gmm"], runs, True)}, True)
    begun = cut_of("three", text="ab ba ab")
    begun.supervisions[0].start = -0.5  # some of this was said before
    shards = [[cut_of("one"), cut_of("two")], [begun, cut_of("four")]]
    experiment = make_experiment(tmp_path / "experiment", shards, **settings)
    align(experiment)
    assert list(read(experiment)) == list(RUNS)
    assert report(experiment)["parts"]["human"]["spelt_as_in_lexicon"] == 0.5


def test_words_that_the_lexicon_lacks_are_counted(tmp_path) -> None:
    settings = write_ctm(tmp_path / "ctm", kaldi=False)
    (tmp_path / "ctm" / "words.ctm").unlink()
    shards = [[cut_of("one", text="ab um ba"), cut_of("two", text="a a um um")], [cut_of("three")]]
    experiment = make_experiment(tmp_path / "experiment", shards, **settings)
    align(experiment)
    assert report(experiment)["parts"]["human"]["unknown_words"] == 3


def test_users_fields_are_no_conditions(tmp_path) -> None:
    marked = cut_of("one", original="two", speed=1.25)
    experiment = make_experiment(tmp_path / "experiment", [[marked], []], **write_kaldi(tmp_path / "ali"))
    align(experiment)
    assert read(experiment)["one"]["phone"] == expected("one")


def test_a_ctm_and_the_archives_it_was_made_of_have_the_same_times(tmp_path) -> None:
    """Whatever Kaldi's frames are; with those of 10 ms that are not snipped, the times of a CTM are true."""
    texts, runs = {"one": "ab ka"}, {"one": [(SIL, 4), (A, 2), (B, 3), (SIL, 2), (K, 2), (A, 4), (SIL, 3)]}
    for shift, snip_edges in itertools.product((0.01, 0.03), (True, False)):
        folder = tmp_path / f"{shift}-{snip_edges}"
        write_kaldi(folder, "chain", names=())
        write_archive(folder / "ali.1.gz", {"one": spell(NEVER_LOOPED["chain"], runs["one"], True)}, True)
        edges = np.cumsum([0, *(count for _, count in runs["one"])]) * shift
        lines = [
            f"one 1 {start:.2f} {end - start:.2f} {phone}\n"
            for (phone, _), (start, end) in zip(runs["one"], itertools.pairwise(edges))
        ]
        (folder / "phones.ctm").write_text("".join(lines))
        made = make_cut("one", round(20 * shift * SAMPLING_RATE), text=texts["one"])
        found, offsets = [], []
        for source in ("kaldi", "ctm"):
            settings = {
                "source": source,
                "folder": str(folder),
                "snip_edges": snip_edges,
                "frame_shift_seconds": shift,
            }
            experiment = make_experiment(folder / source, [[made], []], **settings)
            align(experiment)
            found.append(read(experiment))
            offsets.append(report(experiment)["parts"]["human"]["offset_ms"])
        assert found[0] == found[1]
        assert (
            offsets[0]
            == offsets[1]
            == {(0.01, True): 7.5, (0.01, False): 0, (0.03, True): -2.5, (0.03, False): -10}[
                shift, snip_edges
            ]
        )


def test_pdf_ids_of_a_part_of_the_cut_cannot_be_taken(tmp_path) -> None:
    inventory = tiny_inventory()
    export_kaldi(inventory, tmp_path / "tree")
    write_archive(tmp_path / "ali" / "ali.1.gz", {"one-said": [1] * 69, "two": [2] * 32}, binary=True)
    half = cut_of("one")
    half.supervisions[0].duration = 0.69  # and the rest of the cut is nobody's
    longer = fastcopy(half, duration=1.2, recording=fastcopy(half.recording, duration=1.2, num_samples=19200))
    experiment = make_experiment(
        tmp_path / "experiment", [[longer, cut_of("two")], []], senones=Senones(kaldi_tree=str(tmp_path / "tree")),
        source="kaldi", folder=str(tmp_path / "ali"), max_dropped_share=0.5,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"a gap in an alignment of pdfs: from 0\.69 to 1\.\d+ s"):
        align(experiment)
    assert list(read(experiment)) == ["two"]


def test_files_may_know_the_supervision_or_the_recording_instead_of_the_cut(tmp_path) -> None:
    folder = tmp_path / "ctm"
    folder.mkdir()
    text = "a-said 1 0.3 0.2 A\nb-rec 1 0.3 0.2 A\nb-rec 1 0.6 0.2 B\n"
    (folder / "all.ctm").write_text(text)
    later = make_cut("b", 8000, start=0.3, text="ab")
    experiment = make_experiment(
        tmp_path / "experiment",
        [[make_cut("a", 8000), later], []],
        source="ctm",
        folder=str(folder),
        snip_edges=False,
    )
    align(experiment)
    found = read(experiment)
    assert found["a"]["phone"] == [SIL] * 10 + [A] * 7
    assert found["b"]["phone"] == [A] * 7 + [SIL] * 3 + [B] * 7


def test_items_of_cuts_count_from_the_recording_whatever_was_cut_off() -> None:
    """lhotse shifts supervisions when it cuts, but not their alignment items."""
    whole = make_cut("one", 32000, [("A", 0.0, 0.9), ("B", 0.9, 1.3), ("A", 1.3, 2.0)])
    later = whole.truncate(offset=0.6, duration=1.0)
    later = later.truncate(offset=0.1)  # 0.7 … 1.6 s of the recording
    segments = cut_segments(later)
    assert segments.phones == ("A", "B", "A")
    assert segments.starts.tolist() == [0.0, 0.2, 0.6]
    assert segments.ends.tolist() == [0.2, 0.6, 0.9]


def contents(experiment) -> dict[str, bytes]:
    folder = experiment.path("align")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_restart_and_another_number_of_jobs_give_the_same_bytes(tmp_path) -> None:
    settings = write_kaldi(tmp_path / "ali", names=("one", "two", "three"))
    experiments = [
        make_experiment(tmp_path / f"experiment{jobs}", cuts(), **settings, jobs=jobs, max_dropped_share=0.3)
        for jobs in (1, 2)
    ]
    for experiment in experiments:
        with pytest.warns(UserWarning):
            outputs = align(experiment)
    whole = contents(experiments[0])
    assert whole == contents(experiments[1])
    assert {path.name for path in outputs} == {name.rpartition("/")[2] for name in whole}
    for lost in ("human/phones.000001.h5", "human/summary.000001.json", "report.json"):
        experiments[0].path("align", lost).unlink()
    kept = experiments[0].path("align", "dev", "phones.000000.h5")
    written = kept.stat().st_mtime_ns
    with pytest.warns(UserWarning):
        align(experiments[0])
    assert whole == contents(experiments[0])
    assert kept.stat().st_mtime_ns == written


def test_parts_may_lie_in_folders_of_their_own(tmp_path) -> None:
    for part in ("human", "dev", "test"):
        settings = write_kaldi(tmp_path / "ali" / part)
    settings["folder"] = str(tmp_path / "ali")
    experiment = make_experiment(tmp_path / "experiment", cuts(), **settings)
    align(experiment)
    assert read(experiment, "test")["one"]["phone"] == expected("one")


@pytest.mark.parametrize(
    "source, message",
    [("kaldi", r"no ali\.\*\.gz"), ("ctm", r"no phones\.ctm"), ("textgrid", r"no \*\.TextGrid")],
)
def test_a_folder_without_alignments_is_refused(source, message, tmp_path) -> None:
    folder = tmp_path / "folder"
    write_kaldi(folder, names=())
    (folder / "final.mdl").unlink()  # what is missing first of all is told
    experiment = make_experiment(tmp_path / "experiment", cuts(), source=source, folder=str(folder))
    with pytest.raises(ValueError, match=message):
        align(experiment)
    there_is_none = dataclasses.replace(experiment.config.align, folder=str(tmp_path / "nowhere"))
    experiment.config = dataclasses.replace(experiment.config, align=there_is_none)
    with pytest.raises(ValueError, match="no such folder"):
        align(experiment)


def test_an_id_that_occurs_twice_is_listed_not_guessed(tmp_path) -> None:
    settings = write_kaldi(tmp_path / "ali")
    write_archive(tmp_path / "ali" / "ali.9.gz", {"two": [1, 2]}, binary=True)
    experiment = make_experiment(tmp_path / "experiment", cuts(), **settings, max_dropped_share=0.5)
    with pytest.warns(UserWarning, match="more than one alignment"):
        align(experiment)
    assert list(read(experiment)) == ["one", "three", "four"]
    assert math.isclose(report(experiment)["parts"]["human"]["coverage"], 0.87, abs_tol=0.1)
