"""What an experiment's decoding graph is made of: its lexicon and its language model."""

from collections.abc import Iterator
from pathlib import Path

from teacherstudent.data.dataset import prepared_shards, read_lexicon, read_prepared
from teacherstudent.data.manifests import HUMAN, original_of, transcript_of
from teacherstudent.decoding.graph import Graph
from teacherstudent.decoding.language_model import LanguageModel, estimate_bigram
from teacherstudent.experiment import Experiment
from teacherstudent.tying.senones import Inventory


def build_graph(experiment: Experiment, inventory: Inventory) -> Graph:
    """From the experiment's lexicon and language model."""
    lexicon = read_lexicon(experiment)
    path = language_model_path(experiment)
    if path is None:
        model = estimate_bigram(_human_transcripts(experiment), lexicon.pronunciations)
    else:
        model = LanguageModel.read(path, lexicon.pronunciations)
    return Graph.build(lexicon, inventory, model)


def language_model_path(experiment: Experiment) -> Path | None:
    """data.language_model, or what lies beside the data; None: the human-labelled transcripts are to be used."""
    if named := experiment.config.data.language_model:
        return Path(named)
    found = (experiment.data_folder / name for name in ("lm.arpa", "lm.arpa.gz", "lm_text.txt"))
    return next((path for path in found if path.is_file()), None)


def _human_transcripts(experiment: Experiment) -> Iterator[str]:
    for shard in prepared_shards(experiment, HUMAN):
        for cut in read_prepared(experiment, HUMAN, shard):
            if original_of(cut) is None:  # a copy in another condition says the same again
                yield transcript_of(cut)
