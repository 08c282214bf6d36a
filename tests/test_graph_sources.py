"""Which language model an experiment decodes with."""

from pathlib import Path

import pytest
from lhotse import CutSet, MonoCut, SupervisionSegment
from tiny_speech import LEXICON, tiny_inventory

from teacherstudent.config import Config, Data
from teacherstudent.decoding.graph import Graph
from teacherstudent.decoding.graph_sources import build_graph, language_model_path
from teacherstudent.decoding.language_model import estimate_bigram, word_loop
from teacherstudent.experiment import Experiment


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    LEXICON.write(folder / "lexicon.txt")
    return folder


def open_experiment(data: Path, language_model: str = "") -> Experiment:
    return Experiment(
        Config(folder=str(data.parent / "x"), data=Data(str(data), language_model=language_model))
    )


def test_the_first_that_lies_beside_the_data_unless_one_is_named(data: Path) -> None:
    assert language_model_path(open_experiment(data)) is None
    for name in ("lm_text.txt", "lm.arpa.gz", "lm.arpa"):
        (data / name).touch()
        assert language_model_path(open_experiment(data)) == data / name
    assert language_model_path(open_experiment(data, "other.arpa")) == Path("other.arpa")


def test_without_a_language_model_the_human_transcripts_are_it_each_once(data: Path) -> None:
    """Copies in other conditions do not count."""
    experiment = open_experiment(data)
    folder = experiment.path("features", "human")
    folder.mkdir(parents=True)
    texts = ["to um", "two um tomb", "too", "mmm to"]
    cuts = [
        MonoCut(str(n), 0.0, 1.0, 0, [SupervisionSegment(str(n), "r", 0.0, 1.0, text=text)], custom=custom)
        for n, (text, custom) in enumerate(
            [*((text, None) for text in texts), ("to um", {"copy_of": {"id": "0"}})]
        )
    ]
    CutSet.from_cuts(cuts).to_file(folder / "cuts.000000.jsonl")
    found = build_graph(experiment, tiny_inventory())
    assert found == Graph.build(LEXICON, tiny_inventory(), estimate_bigram(texts, LEXICON.pronunciations))


def test_a_word_list_makes_a_loop(data: Path) -> None:
    (data / "words.txt").write_text("to\ntomb\n")
    with pytest.warns(UserWarning, match="4 of the lexicon's words, which the language model lacks"):
        graph = build_graph(open_experiment(data, str(data / "words.txt")), tiny_inventory())
    assert graph.words == ("to", "tomb")
    with pytest.warns(UserWarning, match="left out: 4"):
        assert graph == Graph.build(LEXICON, tiny_inventory(), word_loop(["to", "tomb"]))
