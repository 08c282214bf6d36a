"""The results of `evaluate` as tables for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def summary(results_path: Path) -> str:
    """Word error rates, what they are made of, the comparison, and the speeds that lie beside the results."""
    results = json.loads(results_path.read_text(encoding="utf-8"))
    blocks = [_error_rates(results), _comparisons(results), _kinds(results["systems"])]
    blocks += _by_field(results["systems"])
    speeds = results_path.with_name("speed.json")
    if speeds.is_file():
        blocks.append(_speeds(results["systems"], json.loads(speeds.read_text(encoding="utf-8"))))
    blocks.append(_missing(results))
    return "\n\n".join(filter(None, blocks))


def _error_rates(results: Mapping[str, Any]) -> str:
    systems = results["systems"]
    conditions = list(next(iter(systems.values()))["conditions"])
    rows = [["", "learning rate", *conditions]]
    for system in systems.values():
        rates = [
            "{:.1f} [{:.1f}, {:.1f}]".format(cell["word_error_rate"], *cell["interval"])
            for cell in (system["conditions"][condition] for condition in conditions)
        ]
        rows.append([system["label"], f"{system['learning_rate']:g} {system['method']}", *rates])
    return "word error rate, % [95 % interval over sentences]\n" + _table(rows)


def _comparisons(results: Mapping[str, Any]) -> str:
    systems = results["systems"]
    lines = []
    for found in results["comparisons"]:
        label, baseline = (systems[found[key]]["label"] for key in ("system", "baseline"))
        reduction, low, high = map(format_share, (found["relative_reduction"], *found["interval"]))
        chances = format_p(found["p_value"]), format_p(found["matched_pairs"]["p_value"])
        lines.append(
            f"{label}: {reduction} % [{low}, {high}] fewer word errors than {baseline} "
            "(p {}; matched pairs p {})".format(*chances)
        )
    return "\n".join(lines)


def format_share(value: float | None) -> str:
    """Per cent; None, what no finite number says, is a dash."""
    return "–" if value is None else f"{value:.1f}"


def format_p(value: float) -> str:
    """ "= 0.012", or "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _kinds(systems: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["", "scale", "penalty", "substituted", "inserted", "deleted", "frame error", "nats a frame"]
    rows = [head]
    for system in systems.values():
        total = system["conditions"]["all"]
        kinds = [
            f"{total[kind] / total['words']:.1%}" for kind in ("substitutions", "insertions", "deletions")
        ]
        frames = [system[key].get("test") for key in ("frame_error", "frame_cross_entropy")]
        shown = ["-" if value is None else f"{value:.{digits}f}" for value, digits in zip(frames, (1, 3))]
        weights = [f"{system[key]:g}" for key in ("acoustic_scale", "word_penalty")]
        rows.append([system["label"], *weights, *kinds, *shown])
    return (
        "test speakers, at the acoustic scale and word penalty chosen on the development speakers\n"
        + _table(rows)
    )


def _by_field(systems: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table for each further field of decode.score_by: a row for each of its values."""
    tables = next(iter(systems.values()))["by"]
    found = []
    for name, values in tables.items():
        rows = [[name, "words", *(system["label"] for system in systems.values())]]
        for value, cell in values.items():
            rates = [f"{system['by'][name][value]['word_error_rate']:.1f}" for system in systems.values()]
            rows.append([value, str(cell["words"]), *rates])
        found.append(f"word error rate by {name}, %\n" + _table(rows))
    return found


def _speeds(systems: Mapping[str, Mapping[str, Any]], speeds: Mapping[str, Any]) -> str:
    rows = [["", "parameters", "frames a second", "times teacher", "network RTF", "with search"]]
    for name, row in speeds["systems"].items():
        faster = row.get("times_faster_than_teacher")
        rows.append(
            [
                systems[name]["label"] if name in systems else name,
                f"{row['parameters']:,}",
                f"{row['network_frames_per_second']:,.0f}",
                "" if faster is None else f"{faster:.1f}",
                f"{row['network_real_time_factor']:.4f}",
                f"{row['real_time_factor']:.4f}",
            ]
        )
    return "speed on one core, one utterance after the other (RTF: seconds a second of audio)\n" + _table(
        rows
    )


def _missing(results: Mapping[str, Any]) -> str:
    left_out, without = results["left_out"]["test"], results["without_labels"]["test"]
    lines = []
    if left_out:
        lines.append(
            f"{left_out} test utterances could not be used and are in no figure: features/skipped.jsonl"
        )
    if without:
        lines.append(f"{without} test utterances have no alignment: they are in no frame error")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
