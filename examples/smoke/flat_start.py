"""What a flat start costs: boundaries and teachers from transcripts alone, beside the synthesiser's event times.

    python examples/smoke/flat_start.py [--seeds 3 4 5] [--splits 3 4 3] [--folder experiments/flat-start]

For every seed the smoke experiment is walked up to its teacher twice, on the same features of the same speech: once
with the alignments that the corpus brings, once with those that `align.source = "transcripts"` finds. Runs that are
there are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from teacherstudent.alignment.align_sources import cut_segments
from teacherstudent.alignment.alignment_comparison import compare
from teacherstudent.alignment.alignments import PhoneSegments
from teacherstudent.data.manifests import HUMAN, read_cuts, shard_paths

ROOT = Path(__file__).parent.parent.parent
STEPS = ("corpus", "prepare", "align", "senones", "teacher", "evaluate")


def walk(settings: list[str]) -> dict:
    """The teacher's row of results.json."""
    for step in STEPS:
        command = [sys.executable, "-m", "teacherstudent", step, str(ROOT / "examples/smoke/smoke.toml")]
        subprocess.run([*command, *settings, "decode.only=teacher"], check=True, cwd=ROOT)
    folder = Path(settings[0].partition("=")[2])
    return json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))["systems"][
        "teacher"
    ]


def compare_boundaries(events: Path, flat: Path) -> dict:
    """Of the human-labelled part."""
    theirs = {
        cut.id: cut_segments(cut) for path in shard_paths(events / "corpus", HUMAN) for cut in read_cuts(path)
    }
    lines = [
        json.loads(line)
        for path in sorted((flat / "align" / "flat-start" / HUMAN).glob("segments.*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    pairs = [
        (PhoneSegments.of(zip(row["starts"], row["ends"], row["phones"])), theirs[row["id"]])
        for row in lines
        if "reason" not in row
    ]
    return asdict(compare(pairs)) | {"utterances": len(lines), "aligned": len(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--splits", type=int, nargs="+", default=[3, 4, 3], help="one for each seed")
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments" / "flat-start")
    arguments = parser.parse_args()
    rows = []
    for seed, split in zip(arguments.seeds, arguments.splits, strict=True):
        events, flat = (
            arguments.folder.resolve() / f"{seed}-{split}-{name}" for name in ("events", "transcripts")
        )
        settings = [f"seed={seed}", f"corpus.split={split}", "corpus.dev_minutes=3.0", "decode.beam=12.0"]
        known = walk([f"folder={events}", *settings])
        found = walk(
            [f"folder={flat}", *settings, f"data.folder={events / 'corpus'}", "align.source=transcripts"]
        )
        boundaries = compare_boundaries(events, flat)
        rates = [row["conditions"]["all"]["word_error_rate"] for row in (known, found)]
        rows.append((boundaries["median"], boundaries["within_50_ms"], *rates))
        print(f"seed {seed}, split {split}: {json.dumps(boundaries)}")
        print(
            f"teacher's word error rate: {rates[0]:.2f} % on event times, {rates[1]:.2f} % on a flat start",
            flush=True,
        )
    medians, shares, known_rates, found_rates = zip(*rows)
    worse = [100 * (found - known) / known for known, found in zip(known_rates, found_rates)]
    print(
        f"boundaries: median difference at most {1000 * max(medians):.1f} ms, at least {100 * min(shares):.1f} % "
        "within 50 ms"
    )
    print(
        f"word error rate, mean of {len(rows)}: {statistics.mean(known_rates):.2f} % on event times, "
        f"{statistics.mean(found_rates):.2f} % on a flat start; relative to event times, run by run: "
        + ", ".join(f"{value:+.1f} %" for value in worse)
    )


if __name__ == "__main__":
    main()
