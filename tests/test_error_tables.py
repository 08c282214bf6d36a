"""Word errors by the fields of the cuts."""

import json

import pytest
from lhotse import MonoCut, SupervisionSegment

from teacherstudent.config import Decode
from teacherstudent.decoding.error_tables import Utterance, compare_systems, score_system
from teacherstudent.decoding.results_table import _comparisons, format_p
from teacherstudent.files import write_json


def make_cut(custom=None, supervised=None, **supervision):
    segment = SupervisionSegment("s", "r", 0.0, 1.5, text="a b", custom=supervised, **supervision)
    return MonoCut("u", 0.0, 1.5, 0, [segment], custom=custom)


def test_a_field_is_found_in_the_cut_then_in_its_supervision():
    cut = make_cut(
        {"condition": "snr5", "speaker": "anne"}, {"room": 7, "condition": "x"}, gender="f", speaker="b"
    )
    found = Utterance.of(cut, ("condition", "room", "gender", "planet", "speaker"))
    assert found == Utterance(
        "u", ("a", "b"), "anne", 1.5, {"condition": "snr5", "room": "7", "gender": "f", "speaker": "anne"}
    )
    assert Utterance.of(make_cut(speaker="bo"), ()).speaker == "bo"


def test_a_cut_without_supervisions_says_nothing_and_is_its_own_speaker():
    found = Utterance.of(MonoCut("u", 0.0, 1.0, 0, []), ("condition",))
    assert (found.words, found.speaker, dict(found.fields)) == ((), "u", {"speaker": "u"})


def made(values, field="condition"):
    test = [
        Utterance(str(n), ("a", "b"), f"speaker{n % 2}", 1.0, {} if value is None else {field: value})
        for n, value in enumerate(values)
    ]
    return test, [("a",) if n % 3 else ("a", "b") for n in range(len(test))]


def test_conditions_come_from_clean_to_loud():
    names = ["5dB", "car", "snr10", "1.2.3dB", "-2.5dB", "clean", "20dB", "bus"]
    rows = score_system(*made(names), Decode(bootstrap_samples=10), 0)
    assert list(rows["conditions"]) == [
        "all",
        "clean",
        "20dB",
        "snr10",
        "5dB",
        "-2.5dB",
        "1.2.3dB",
        "bus",
        "car",
    ]
    assert rows["by"] == {}


def test_the_rows_of_a_field_add_up_to_all_of_the_test():
    test, hypotheses = made(["x", "y", None, "x", "y", None, "y"], "room")
    rows = score_system(test, hypotheses, Decode(bootstrap_samples=50, score_by=("room", "planet")), 0)
    assert list(rows["by"]) == ["room"]
    assert list(rows["by"]["room"]) == ["unmarked", "x", "y"]
    assert list(rows["conditions"]) == ["all"]
    for key in ("utterances", "words", "errors", "deletions"):
        assert sum(cell[key] for cell in rows["by"]["room"].values()) == rows["conditions"]["all"][key]
    low, high = rows["conditions"]["all"]["speaker_interval"]
    assert low <= rows["conditions"]["all"]["word_error_rate"] <= high


def test_what_has_no_finite_value_is_none_in_the_json_and_a_dash_in_the_table(tmp_path):
    test = [Utterance(str(n), ("a", "b"), f"s{n}") for n in range(3)]
    right, wrong = [("a", "b")] * 3, [("a", "c")] * 3
    settings = Decode(bootstrap_samples=20)
    words = {"human": right, "machine": wrong}
    found = compare_systems(["machine"], ["human"], test, words, {"human": 0, "machine": 3}, settings, 0)
    write_json(tmp_path / "results.json", found)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    (row,) = found["comparisons"]
    assert (row["relative_reduction"], row["interval"]) == (None, [None, None])
    assert row["matched_pairs"] == {"statistic": None, "p_value": pytest.approx(2 / 2**3)}
    table = _comparisons(found | {"systems": {name: {"label": name} for name in words}})
    assert table.startswith("machine: – % [–, –] fewer word errors than human (p ")


def test_p_values_are_printed_alike():
    assert [format_p(value) for value in (0.0, 0.00099, 0.001, 0.25)] == [
        "< 0.001", "< 0.001", "= 0.001", "= 0.250"
    ]  # fmt: skip


def test_what_was_said_is_read_in_the_order_in_which_it_was_said():
    late = SupervisionSegment("s", "r", 2.0, 1.0, text="b c", speaker="cy")
    early = SupervisionSegment("t", "r", 0.0, 1.0, text="a", speaker="dee")
    found = Utterance.of(MonoCut("u", 0.0, 3.0, 0, [late, early]), ())
    assert (found.words, found.speaker) == (("a", "b", "c"), "cy")
