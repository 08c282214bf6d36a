"""The arguments of the `store` command; apart from what they start, which takes seconds to import."""

import argparse
from pathlib import Path

EXPORT_FORMATS = ("shar", "kaldi", "kaldi-text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs of `teacherstudent store`."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    folder_help = "a folder of targets.*.h5, or a URL such as s3://bucket/targets"
    for name, what in (
        ("info", "what it holds: hours, bytes a frame, probability and entropy by k"),
        ("verify", "read every byte; list all damage"),
        ("show", "a picture of one utterance"),
        ("export", "to lhotse Shar fields or Kaldi posteriors"),
    ):
        verb = verbs.add_parser(name, help=what, description=what)
        verb.add_argument("folder", help=folder_help)
        if name == "show":
            verb.add_argument("utterance")
            verb.add_argument("--output", type=Path, help="png, svg or pdf; default UTTERANCE.png")
            verb.add_argument("--features", type=Path, help="default FOLDER/../features/unlabelled")
            verb.add_argument("--inventory", type=Path, help="default FOLDER/../senones/inventory.json")
        if name == "export":
            verb.add_argument("output", type=Path, help="folder of what is written")
            verb.add_argument("--to", choices=EXPORT_FORMATS, default="shar")
            verb.add_argument("--cuts", type=Path, help="shar: folder of the cut shards that were labelled")
    what = "how large a store will be, before anybody labels"
    verb = verbs.add_parser("estimate", help=what, description=what)
    verb.add_argument("--hours", type=float, required=True, help="of audio, such as 1e6")
    verb.add_argument("--k", type=int, default=20, help="senones kept of each frame")
    verb.add_argument("--senones", type=int, default=3000, help="how many there are")
