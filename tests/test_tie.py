"""The `senones` step on shards of made-up features and alignments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacherstudent.config import Config, Senones
from teacherstudent.data.manifests import HUMAN, LABELLED_PARTS
from teacherstudent.data.packed import PackedShard, PackedWriter, open_shards, shard_path
from teacherstudent.experiment import Experiment
from teacherstudent.processes import ProcessMap
from teacherstudent.tying import tie
from teacherstudent.tying.events import Statistics, frame_events, tree_features
from teacherstudent.tying.kaldi_tree import export_kaldi
from teacherstudent.tying.senones import Inventory, build
from teacherstudent.tying.tie import tie_senones

PHONES = ["SIL", "A1_B", "A0_B", "K_B", "K_E", "M_E"]
NUM_SHARDS, UTTERANCES, FEATURES = 3, 12, 192
SETTINGS = Senones(target=40, min_count=10, min_gain=5.0, jobs=1)


def draw_utterance(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (T, F) that the phone and its left neighbour decide, phone (T,), first (T,)."""
    means = np.random.default_rng(1).normal(size=(len(PHONES) + 1, len(PHONES) + 1, FEATURES))
    phones = np.array([1, *generator.integers(1, len(PHONES) + 1, 15), 1])
    durations = generator.integers(1, 4, len(phones))
    first = np.zeros(durations.sum(), bool)
    first[np.cumsum(durations) - durations] = True
    phone = np.repeat(phones, durations)
    left, centre = frame_events(phone, first)[:, :2].T
    return (
        (means[left, centre] + generator.normal(size=(len(phone), FEATURES))).astype("float16"),
        phone,
        first,
    )


KINDS = {
    "values": ("float16", (FEATURES,)),
    "phone": ("int16", ()),
    "first": ("bool", ()),
    "pdf": ("int32", ()),
}


def write_shard(path: Path, header: dict[str, Any], utterances: dict[str, dict[str, Any]]) -> None:
    path.unlink(missing_ok=True)
    names = next(iter(utterances.values()))
    with PackedWriter(path, header, {name: KINDS[name] for name in names}) as writer:
        for utterance, arrays in utterances.items():
            writer.write(
                utterance,
                **{name: np.asarray(array).astype(KINDS[name][0]) for name, array in arrays.items()},
            )


def open_experiment(folder: Path, settings: Senones = SETTINGS, num_pdfs: int = 0) -> Experiment:
    """After `prepare` and `align`, with pdfs if asked; one utterance of every shard has features and no alignment."""
    experiment = Experiment(Config(folder=str(folder), senones=settings))
    experiment.create()
    for part in LABELLED_PARTS:
        for number in range(NUM_SHARDS if part == HUMAN else 1):
            generator = np.random.default_rng([len(part), number])
            drawn = {f"{part}-{number}-{place}": draw_utterance(generator) for place in range(UTTERANCES)}
            values = {name: {"values": utterance[0]} for name, utterance in drawn.items()}
            write_shard(shard_path(experiment.path("features", part), "features", number), {}, values)
            if num_pdfs:
                aligned = {name: {"pdf": phone + first} for name, (_, phone, first) in drawn.items()}
            else:
                aligned = {
                    name: {"phone": phone, "first": first} for name, (_, phone, first) in drawn.items()
                }
            del aligned[f"{part}-{number}-4"]
            header = {"num_pdfs": num_pdfs} if num_pdfs else {"phones": PHONES}
            write_shard(align_path(experiment, part, number), header, aligned)
    return experiment


def align_path(experiment: Experiment, part: str = HUMAN, number: int = 0) -> Path:
    return shard_path(experiment.path("align", part), "phones", number)


def read_aligned(experiment: Experiment, number: int = 0) -> dict[str, dict[str, Any]]:
    """Of one shard of the human-labelled part."""
    return {name: dict(arrays) for name, arrays in PackedShard(align_path(experiment, number=number))}


def shuffle_phones(experiment: Experiment, number: int) -> None:
    """Give the phones of one shard other ids."""
    order = np.array([0, 4, 6, 2, 3, 1, 5])  # the new id of every old one
    names = [PHONES[order.tolist().index(phone) - 1] for phone in range(1, 7)]
    aligned = read_aligned(experiment, number)
    shuffled = {name: arrays | {"phone": order[arrays["phone"]]} for name, arrays in aligned.items()}
    write_shard(align_path(experiment, number=number), {"phones": names}, shuffled)


def inventory_of(experiment: Experiment) -> Inventory:
    return Inventory.load(experiment.path("senones", "inventory.json"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, list[Path]]:
    experiment = open_experiment(tmp_path_factory.mktemp("tied") / "experiment")
    return experiment, tie_senones(experiment)


def test_every_aligned_frame_has_the_senone_of_its_triphone_state(
    tied: tuple[Experiment, list[Path]],
) -> None:
    experiment, outputs = tied
    inventory, written = inventory_of(experiment), [outputs[0]]
    for part in LABELLED_PARTS:
        labels = open_shards(experiment.path("senones", part), "labels")
        aligned = open_shards(experiment.path("align", part), "phones")
        assert len(labels) == len(aligned)
        for ours, theirs in zip(labels, aligned):
            written.append(ours.path)
            assert ours.ids == theirs.ids
            assert len(ours.ids) == UTTERANCES - 1
            assert ours.header["num_senones"] == inventory.num_senones
            for name, arrays in theirs:
                expected = inventory.label(arrays["phone"], arrays["first"])
                np.testing.assert_array_equal(ours[name]["senone"], expected)
    assert outputs == written


def test_tree_and_priors_are_those_of_the_human_labelled_frames_alone(
    tied: tuple[Experiment, list[Path]],
) -> None:
    experiment, _ = tied
    inventory, statistics = inventory_of(experiment), Statistics(len(PHONES))
    features, aligned = (open_shards(experiment.path(step, HUMAN), stem) for step, stem in
                         (("features", "features"), ("align", "phones")))  # fmt: skip
    for values, shard in zip(features, aligned):
        for name, arrays in shard:
            statistics.accumulate(tree_features(values[name]["values"]), arrays["phone"], arrays["first"])
    expected = build(statistics, PHONES, SETTINGS)
    assert inventory.nodes == expected.nodes
    assert inventory.num_senones > 20
    counts = sum(
        np.bincount(arrays["senone"], minlength=inventory.num_senones)
        for shard in open_shards(experiment.path("senones", HUMAN), "labels")
        for _, arrays in shard
    )
    np.testing.assert_allclose(inventory.priors, expected.with_priors(counts).priors)
    assert inventory.provenance["frames"] == counts.sum() == statistics.num_frames


def test_the_number_of_processes_changes_no_byte(
    tied: tuple[Experiment, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tie, "PROCESS_SECONDS", 1.0)
    started = []
    monkeypatch.setattr(
        tie, "ProcessMap", lambda jobs, *rest: started.append(jobs) or ProcessMap(jobs, *rest)
    )
    parallel = open_experiment(
        tmp_path / "experiment", Senones(target=40, min_count=10, min_gain=5.0, jobs=2)
    )
    for one, other in zip(tied[1], tie_senones(parallel), strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()
    assert started == [2]


def test_phones_are_joined_by_name_whatever_their_ids_in_a_shard(
    tied: tuple[Experiment, list[Path]], tmp_path: Path
) -> None:
    experiment = open_experiment(tmp_path / "experiment")
    shuffle_phones(experiment, number=1)
    for one, other in zip(tied[1], tie_senones(experiment), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_questions_from_a_file_are_asked_and_their_hash_is_kept(tmp_path: Path) -> None:
    (tmp_path / "sets.txt").write_text("A\nK\nM_E\n")
    settings = Senones(target=40, min_count=10, min_gain=5.0, jobs=1, questions=str(tmp_path / "sets.txt"))
    experiment = open_experiment(tmp_path / "experiment", settings)
    tie_senones(experiment)
    inventory = inventory_of(experiment)
    assert set(inventory.questions) <= {(0,), (0, 1), (1,), (2, 3), (4, 5), (6,)}
    assert len(inventory.provenance["questions_sha256"]) == 64
    assert str(tmp_path) not in experiment.path("senones", "inventory.json").read_text()


# -- a tree from Kaldi -----------------------------------------------------------------------------------------------


def kaldi_folder(tied: tuple[Experiment, list[Path]], folder: Path) -> Senones:
    """The tree of `tied`, its phones in another order."""
    export_kaldi(inventory_of(tied[0]), folder)
    return Senones(kaldi_tree=str(folder), jobs=1)


def test_with_kaldis_tree_phones_are_labelled_by_it_whatever_their_ids(
    tied: tuple[Experiment, list[Path]], tmp_path: Path
) -> None:
    experiment = open_experiment(tmp_path / "experiment", kaldi_folder(tied, tmp_path / "kaldi"))
    shuffle_phones(experiment, number=0)
    tie_senones(experiment)
    for part in LABELLED_PARTS:
        pairs = zip(*(open_shards(one.path("senones", part), "labels") for one in (tied[0], experiment)))
        for theirs, ours in pairs:
            for name, arrays in theirs:
                np.testing.assert_array_equal(ours[name]["senone"], arrays["senone"])
    np.testing.assert_array_equal(inventory_of(experiment).priors, inventory_of(tied[0]).priors)


def test_pdfs_of_a_kaldi_alignment_are_taken_as_senones(
    tied: tuple[Experiment, list[Path]], tmp_path: Path
) -> None:
    settings = kaldi_folder(tied, tmp_path / "kaldi")
    num_senones = inventory_of(tied[0]).num_senones
    experiment = open_experiment(tmp_path / "experiment", settings, num_pdfs=num_senones)
    with pytest.warns(UserWarning, match=r"senones are in no aligned frame"):
        tie_senones(experiment)
    for ours, theirs in zip(*(open_shards(experiment.path(*where), stem) for where, stem in
                              ((("senones", HUMAN), "labels"), (("align", HUMAN), "phones")))):  # fmt: skip
        for name, arrays in theirs:
            np.testing.assert_array_equal(ours[name]["senone"], arrays["pdf"])
    write_shard(align_path(experiment), {"num_pdfs": num_senones}, {"human-0-0": {"pdf": [3, num_senones]}})
    with pytest.raises(
        ValueError, match=rf"phones.000000.h5: utterance 'human-0-0': pdf {num_senones}, where"
    ):
        tie_senones(experiment)
    write_shard(align_path(experiment), {"num_pdfs": 9}, {"human-0-0": {"pdf": [3, 4]}})
    with pytest.raises(
        ValueError, match=r"phones.000000.h5 holds pdfs of a model with 9 of them.* of one model"
    ):
        tie_senones(experiment)


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_pdfs_without_their_tree_are_refused(tmp_path: Path) -> None:
    experiment = open_experiment(tmp_path / "experiment", num_pdfs=9)
    with pytest.raises(ValueError, match=r"Set senones\.kaldi_tree"):
        tie_senones(experiment)


@pytest.mark.parametrize(
    ("name", "phone", "first", "what"),
    [
        (
            "human-0-0",
            [1] * 9,
            [True] + 8 * [False],
            r"'human-0-0' has 9 aligned frames and \d+ frames of features",
        ),
        ("human-0-99", [1, 1], [True, False], "'human-0-99' has no features"),
        ("human-0-0", None, None, "'human-0-0': the phone changes at frame 2"),
    ],
)
def test_an_alignment_of_other_audio_is_refused_naming_the_utterance(
    tmp_path: Path, name: str, phone: list[int] | None, first: list[bool] | None, what: str
) -> None:
    experiment = open_experiment(tmp_path / "experiment")
    if phone is None:
        num_frames = len(open_shards(experiment.path("features", HUMAN), "features")[0][name]["values"])
        phone, first = [1, 1] + (num_frames - 2) * [2], [True] + (num_frames - 1) * [False]
    write_shard(align_path(experiment), {"phones": PHONES}, {name: {"phone": phone, "first": first}})
    with pytest.raises(ValueError, match=what):
        tie_senones(experiment)


@pytest.mark.parametrize("change", [-1, 1])
def test_an_alignment_one_frame_longer_or_shorter_is_taken(tmp_path: Path, change: int) -> None:
    experiment = open_experiment(tmp_path / "experiment")
    aligned = read_aligned(experiment)
    last = aligned["human-0-2"]
    end = len(last["phone"]) + min(change, 0)
    last["phone"] = np.append(last["phone"][:end], last["phone"][-1:] if change > 0 else [])
    last["first"] = np.append(last["first"][:end], [False] if change > 0 else [])
    write_shard(align_path(experiment), {"phones": PHONES}, aligned)
    tie_senones(experiment)
    assert len(open_shards(experiment.path("senones", HUMAN), "labels")[0]["human-0-2"]["senone"]) == len(
        last["phone"]
    )


def test_a_phone_that_the_tree_lacks_and_a_missing_shard_are_refused(tmp_path: Path) -> None:
    experiment = open_experiment(tmp_path / "experiment")
    one = {"human-1-0": {"phone": [1, 1], "first": [True, False]}}
    write_shard(align_path(experiment, number=1), {"phones": [*PHONES, "XX"]}, one)
    with pytest.raises(ValueError, match=r"phones.000001.h5 is aligned with phone 'XX'"):
        tie_senones(experiment)
    shard_path(experiment.path("features", HUMAN), "features", 2).unlink()
    with pytest.raises(ValueError, match="2 shards of features and 3 of alignments"):
        tie_senones(experiment)
