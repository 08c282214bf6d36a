"""Imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    "settings training_settings data_sections config files features lexicon alignments alignment_comparison mfcc "
    "gaussians tied_states senones events questions tree_roots tree_view decision_tree kaldi_io event_map "
    "kaldi_topology language_model grammar speakers noise losses models posteriors pseudo_words schedule "
    "schedule_drawing progress processes pipeline shard_table shard_pairs shard_sequence table_files claims "
    "lstm masking target_codec store_arguments spelling scoring error_tables results_table "
    "openfst lattice word_times vocabulary wheels locks",
    "conditions extraction feature_reader data_folders prefetch checkpoint packed_index packed manifests "
    "inference shard_folder target_shard catalogue codings store_export experiment dataset store batches model_average "
    "kaldi_tree alignment_index kaldi_alignments ctm textgrid kaldi_inventory training_graphs graph",
    "espeak pronunciation recording corpus sources feature_shards prepare flat_start_shards flat_start "
    "align_sources align tie workers gradient training_log train trainings label decode graph_sources sclite speed "
    "evaluate dry_run report report_data report_errors report_figures report_page report_sections store_commands "
    "store_figures",
    "run cli __main__",
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
PATHS = {
    path.stem: path
    for path in sorted((ROOT / "teacherstudent").rglob("*.py"))
    if path.stem != "__init__" and path.parent.name != "distributed"
}
PACKAGES = {path.parent.name for path in PATHS.values()} - {"teacherstudent"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def own_modules(path: Path) -> set[str]:
    parts = [[part for part in name.split(".") if part not in PACKAGES] for name in imported(path)]
    return {name[1] for name in parts if name[0] == "teacherstudent" and len(name) > 1}


@pytest.mark.parametrize("path", sorted((ROOT / "distributed").glob("*.py")), ids=lambda path: path.stem)
def test_distributed_imports_nothing_of_ours_but_itself(path: Path) -> None:
    assert own_modules(path) <= {"distributed"}
    assert not any(name.split(".")[0] == "distributed" for name in imported(path))


def test_every_module_has_a_layer() -> None:
    assert set(PATHS) == set(LAYER)


@pytest.mark.parametrize("module", PATHS)
def test_a_module_imports_from_its_own_layer_or_below(module: str) -> None:
    for name in own_modules(PATHS[module]) - {"distributed"}:
        assert name in LAYER, f"{module} imports {name}, which is no module"
        assert LAYER[name] <= LAYER[module], f"{module} imports {name}, which is above it"


def test_no_module_imports_another_in_a_circle() -> None:
    graph = {name: own_modules(path) - {"distributed"} for name, path in PATHS.items()}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_nothing_of_the_science_is_named_in_the_train_loop() -> None:
    text = PATHS["train"].read_text(encoding="utf-8").lower()
    assert "gtc" not in text
    assert "bmuf" not in text
