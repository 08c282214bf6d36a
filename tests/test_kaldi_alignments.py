"""Transition ids mean what kaldi-hmm-gmm says they mean, and Kaldi's frames lie where Kaldi took them."""

import gzip

import kaldi_hmm_gmm as khg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_alignments import (
    CHAIN,
    GMM,
    NEVER_LOOPED,
    PHONES,
    TOPOLOGIES,
    model_bytes,
    spell,
    topology_text,
    transition_ids,
    write_archive,
    write_phones_txt,
)

from teacherstudent.alignment.alignments import AlignmentError, frame_labels
from teacherstudent.alignment.kaldi_alignments import (
    KaldiFrames,
    TransitionModel,
    pdf_segments,
    phone_segments,
    read_archives,
    read_phone_names,
    unpack,
)

NAMES = dict(enumerate(PHONES, 1))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, TransitionModel]:
    folder = tmp_path_factory.mktemp("models")
    for kind, topology in NEVER_LOOPED.items():
        (folder / kind).write_bytes(model_bytes(topology, binary=True))
    return {kind: TransitionModel.read(folder / kind) for kind in NEVER_LOOPED}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_a_model_reads_as_kaldi_hmm_gmm_has_it(kind, binary, tmp_path) -> None:
    topology = TOPOLOGIES[kind]
    known = khg.HmmTopology()
    known.read(topology_text(topology))
    tree = khg.monophone_context_dependency(
        phones=known.phones, phone2num_pdf_classes=known.get_phone_to_num_pdf_classes()
    )
    oracle = khg.TransitionModel(tree, known)
    (tmp_path / "final.mdl").write_bytes(model_bytes(topology, binary))
    model = TransitionModel.read(tmp_path / "final.mdl")
    ids = range(1, oracle.num_transition_ids + 1)
    assert len(model.phones) == len(ids) + 1 == len(transition_ids(topology)) + 1
    assert model.phones[1:].tolist() == [oracle.transition_id_to_phone(number) for number in ids]
    assert model.states.tolist() == list(oracle.id2state)
    assert model.loops[1:].tolist() == [oracle.is_self_loop(number) for number in ids]
    assert model.finals[1:].tolist() == [oracle.is_final(number) for number in ids]


@pytest.mark.parametrize("cut", [0, 5, 60, 200, 300])
@pytest.mark.parametrize("binary", [True, False])
def test_a_model_that_ends_early_is_refused_by_name(binary, cut, tmp_path) -> None:
    (tmp_path / "final.mdl").write_bytes(model_bytes(GMM, binary)[:cut])
    with pytest.raises(ValueError, match=r"final\.mdl"):
        TransitionModel.read(tmp_path / "final.mdl")


runs = st.lists(st.tuples(st.integers(1, 4), st.integers(3, 9)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(runs, st.booleans(), st.sampled_from(["gmm", "chain"]))
def test_phones_are_split_where_they_were_put_together_even_two_of_one_in_a_row(
    models, said, reorder, kind
) -> None:
    ids = np.array(spell(NEVER_LOOPED[kind], said, reorder), np.int32)
    starts, phones = models[kind].split(ids)
    assert phones.tolist() == [phone for phone, _ in said]
    assert np.diff(np.append(starts, len(ids))).tolist() == [frames for _, frames in said]


@pytest.mark.parametrize("reorder", [True, False])
def test_a_model_of_one_state_splits_one_phone_from_the_next_of_the_same(models, reorder) -> None:
    ids = np.array(spell(CHAIN, [(1, 2), (2, 1), (2, 3), (2, 1), (2, 1)], reorder), np.int32)
    starts, _ = models["chain"].split(ids)
    assert starts.tolist() == [0, 2, 3, 6, 7]
    starts, _ = models["chain"].split(
        ids[2:]
    )  # without silence both readings are possible: Kaldi's usual one is taken
    assert starts.tolist() == ([0, 1, 4, 5] if reorder else [0, 3, 4, 5])


def test_ids_of_another_model_are_refused(models) -> None:
    for ids in ([999], [0], spell(NEVER_LOOPED["gmm"], [(2, 4), (3, 4)], True)[1:-3]):
        with pytest.raises(AlignmentError, match="another model"):
            models["gmm"].split(np.array(ids, np.int32))


@st.composite
def recordings(draw: st.DrawFn) -> tuple[int, bool, float, int]:
    """Kaldi's frames, snip_edges, shift, and samples of 16 kHz audio that makes so many."""
    num_frames, snip_edges = draw(st.integers(1, 12)), draw(st.booleans())
    odd = draw(st.integers(0, 159))
    samples = 400 + 160 * (num_frames - 1) + odd if snip_edges else 160 * num_frames - 80 + odd
    if draw(st.booleans()):
        return -(-num_frames // 3), snip_edges, 0.03, samples
    return num_frames, snip_edges, 0.01, samples


def nearest(centre_ms: float, num_frames: int, snip_edges: bool, shift: float) -> int:
    """The Kaldi frame whose centre is nearest, one by one."""
    first = 12.5 if snip_edges else 5.0
    distances = [abs(1000 * shift * frame + first - centre_ms) for frame in range(num_frames)]
    return distances.index(min(distances))


@settings(max_examples=300, deadline=None)
@given(recordings(), st.data())
def test_a_30_ms_frame_has_the_phone_of_the_kaldi_frame_centred_nearest_to_its_centre(
    models, recording, data
) -> None:
    num_frames, snip_edges, shift, samples = recording
    phones = data.draw(st.lists(st.integers(1, 4), min_size=num_frames, max_size=num_frames))
    ids = np.array(spell(CHAIN, [(phone, 1) for phone in phones], True), np.int32)
    duration = samples / 16000
    segments = phone_segments(ids, models["chain"], NAMES, KaldiFrames(shift, snip_edges), duration)
    assert (segments.starts[0], segments.ends[-1]) == (0, round(duration, 8))
    assert (segments.starts[1:] == segments.ends[:-1]).all()
    numbers = [PHONES.index(phone) + 1 for phone in segments.phones]
    total = -(-round(samples / 160) // 3)
    labels, _ = frame_labels(segments.starts, segments.ends, numbers, total)
    expected = [
        phones[nearest(30 * frame + 15, num_frames, snip_edges, shift)]
        if 0.03 * frame + 0.015 < duration
        else 1
        for frame in range(total)
    ]
    assert labels.tolist() == expected


def test_snip_edges_moves_boundaries_by_three_quarters_of_a_frame() -> None:
    times = KaldiFrames(0.01, snip_edges=True).boundaries(98, 1.0)
    assert times[:3].tolist() == [0.0, 0.0175, 0.0275]
    assert times[-1] == 1.0
    assert KaldiFrames(0.01, snip_edges=False).boundaries(100, 1.0)[:3].tolist() == [0.0, 0.01, 0.02]
    assert KaldiFrames(0.01, snip_edges=True).offset_seconds == 0.0075 == 0.75 * 0.01


def test_a_known_boundary_comes_back_within_half_a_kaldi_frame_and_without_bias(models) -> None:
    """A phone begins at a known time; Kaldi gives each frame to the phone at its centre."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    for boundary_ms in np.arange(300, 400, 0.37):
        centres = 12.5 + 10 * np.arange(98)
        said = int((centres < boundary_ms).sum())
        ids = np.array(spell(CHAIN, [(2, said), (3, 98 - said)], True), np.int32)
        for snip_edges in (True, False):
            found = phone_segments(ids, models["chain"], NAMES, KaldiFrames(0.01, snip_edges), 1.0)
            errors[snip_edges].append(1000 * found.starts[1] - boundary_ms)
    assert abs(np.mean(errors[True])) < 0.2
    assert max(map(abs, errors[True])) <= 5.001
    assert np.mean(errors[False]) == pytest.approx(-7.5, abs=0.2)  # what forgetting the convention costs


def test_frames_that_do_not_make_the_audio_are_of_other_audio() -> None:
    frames = KaldiFrames(0.01, snip_edges=True)
    with pytest.raises(AlignmentError, match="other audio"):
        frames.boundaries(98, 1.1)
    with pytest.raises(AlignmentError, match="other audio"):
        frames.boundaries(0, 0.05)
    frames.boundaries(98, 1.03)


def test_pdf_ids_keep_their_numbers() -> None:
    segments = pdf_segments(np.array([7, 7, 12, 0, 0], np.int32), KaldiFrames(0.01, False), 0.05)
    assert segments.phones == ("7", "12", "0")
    assert segments.starts.tolist() == [0.0, 0.02, 0.03]


@pytest.mark.parametrize("binary", [True, False])
def test_archives_are_read_utterance_by_utterance_also_empty_ones(binary, tmp_path) -> None:
    wanted = {"one": [3, 1, 2], "none": [], "zwei-ü": [2147483647, 5]}
    write_archive(tmp_path / "ali.1.gz", wanted, binary)
    write_archive(tmp_path / "ali.2.gz", {"last": [9]}, binary)
    read = {key: unpack(ids).tolist() for key, ids in read_archives(sorted(tmp_path.iterdir()))}
    assert read == {**wanted, "last": [9]}


@pytest.mark.parametrize("binary", [True, False])
def test_a_damaged_archive_is_an_error_that_names_it_never_a_shorter_corpus(binary, tmp_path) -> None:
    path = tmp_path / "ali.1.gz"
    write_archive(path, {f"u{n}": list(range(50)) for n in range(20)}, binary)
    whole = path.read_bytes()
    inside = gzip.decompress(whole)
    for damaged in (whole[:-20], gzip.compress(inside[:-7]), gzip.compress(inside[:-7] + b"!" * 7)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ali\.1\.gz"):
            list(read_archives([path]))


def test_a_number_that_is_none_of_an_archive_is_an_error_that_names_it(tmp_path) -> None:
    for text in ("u 1 99999999999 2 \n", "u 1 2147483648 \n", "u 1 214748364700 \n", "u 1 two \n"):
        (tmp_path / "ali.1.gz").write_bytes(gzip.compress(text.encode()))
        with pytest.raises(ValueError, match=r"ali\.1\.gz"):
            list(read_archives([tmp_path / "ali.1.gz"]))


def test_empty_lines_of_a_text_archive_are_nothing(tmp_path) -> None:
    (tmp_path / "ali.1.gz").write_bytes(gzip.compress(b"\nu 1 2 \n\nv 3 \n\n\n"))
    assert {key: unpack(ids).tolist() for key, ids in read_archives([tmp_path / "ali.1.gz"])} == {
        "u": [1, 2],
        "v": [3],
    }


def test_names_of_phones_are_read_and_bad_lines_named(tmp_path) -> None:
    write_phones_txt(tmp_path)
    assert read_phone_names(tmp_path / "phones.txt")[2] == "A"
    (tmp_path / "phones.txt").write_text("<eps> 0\nA 1\x0c\nB 2\n", newline="\r\n")
    assert read_phone_names(tmp_path / "phones.txt") == {0: "<eps>", 1: "A", 2: "B"}
    (tmp_path / "phones.txt").write_text("<eps> 0\x85A 1\n")
    with pytest.raises(ValueError, match="line 1"):
        read_phone_names(tmp_path / "phones.txt")
    (tmp_path / "phones.txt").write_text("<eps> 0\nA one\n")
    with pytest.raises(ValueError, match="line 2"):
        read_phone_names(tmp_path / "phones.txt")


@pytest.mark.parametrize("binary", [True, False])
def test_an_archive_reads_the_same_wherever_a_buffer_ends(tmp_path, binary):
    """The mark of binary data lies before, across and behind the end of a buffer of 8,192 bytes."""
    for length in range(8192 - 4, 8192 + 1):
        write_archive(tmp_path / "ali.1.gz", {"u" * length: [1, 2, 300]}, binary)
        ((key, packed),) = read_archives([tmp_path / "ali.1.gz"])
        assert (len(key), unpack(packed).tolist()) == (length, [1, 2, 300])
