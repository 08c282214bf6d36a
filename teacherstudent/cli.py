"""The command line: `teacherstudent STEP conf.toml [section.key=value …]`, also `python -m teacherstudent`."""

import argparse
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from teacherstudent import config as configuration
from teacherstudent.config import Config
from teacherstudent.targets import store_arguments

STEPS = {
    "corpus": "make speech with espeak-ng, or check the data that you brought along",
    "prepare": "features of every part",
    "align": "the phone of every frame of the labelled parts",
    "senones": "tie triphone states, label every frame",
    "teacher": "train the bidirectional teacher on human labels",
    "label": "the teacher's highest posteriors for the unlabelled part",
    "student": "train the students (one of them with student.only=NAME)",
    "evaluate": "decode the test speakers, word error rates with intervals",
    "report": "one HTML page of it all",
    "run": "all of the above, skipping what is done",
}
_TRAINING_STEPS = ("teacher", "student", "run")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after an error that the user can mend."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = _format_warning
    try:
        return _store(options) if options.step == "store" else _run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("TEACHERSTUDENT_TRACEBACK"):
            traceback.print_exc()
        print(f"teacherstudent: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("teacherstudent: interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        return 130


def _format_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """Ours are sentences for users; where in the program they come from is not for them."""
    kind = "" if category is UserWarning else f"{category.__name__}: "
    return f"teacherstudent: warning: {kind}{message}\n"


def parse(words: list[str]) -> argparse.Namespace:
    """Overrides may stand anywhere; argparse itself takes none after an option."""
    if words[:1] == ["store"]:
        return _parser().parse_args(words)
    overrides = [word for word in words if re.match(r"\w+(\.[\w-]+)*=", word)]
    options = _parser().parse_args([word for word in words if word not in overrides])
    options.overrides = [*options.overrides, *overrides]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="teacherstudent",
        description="Semi-supervised acoustic-model training: a teacher labels, a student learns.",
        epilog="Start with: teacherstudent run examples/smoke/smoke.toml",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, what in STEPS.items():
        step = steps.add_parser(name, help=what, description=what)
        step.add_argument("config", metavar="CONF.TOML", help="one experiment's settings")
        step.add_argument(
            "overrides",
            nargs="*",
            default=[],  # without it argparse calls them required
            metavar="section.key=value",
            help="settings that take the place of the file's",
        )
        if name in _TRAINING_STEPS:
            step.add_argument(
                "--dry-run",
                action="store_true",
                help="print the resolved configuration, the parameters, the schedule and the plan; start nothing",
            )
            step.add_argument(
                "--draw", metavar="FILE", help="with --dry-run: draw the schedule as .png, .svg or .pdf, too"
            )
        if name == "senones":
            step.add_argument("--show", metavar="PHONE", help="draw a phone's tree, its questions in words")
            step.add_argument("--kaldi", metavar="FOLDER", help="write tree, topo and phones.txt for Kaldi")
    store = steps.add_parser("store", help="look into a target store", description="look into a target store")
    store_arguments.add_arguments(store)
    return parser


def _run(options: argparse.Namespace) -> int:
    config = configuration.load(options.config, options.overrides)
    if getattr(options, "dry_run", False) or getattr(options, "draw", None):
        return _run_dry(config, options)
    if getattr(options, "show", None) or getattr(options, "kaldi", None):
        return _look_at_senones(config, options)
    return _run_steps(config, options)


def _run_dry(config: Config, options: argparse.Namespace) -> int:
    from teacherstudent.dry_run import describe, draw

    if options.draw and not options.dry_run:
        raise ValueError("--draw belongs to --dry-run: it draws what would be trained; add --dry-run")
    print(describe(config, options.step))
    if options.draw:
        draw(config, options.step, Path(options.draw))
    return 0


def _look_at_senones(config: Config, options: argparse.Namespace) -> int:
    """Of an experiment whose `senones` step is done; starts nothing."""
    from teacherstudent.tying.kaldi_tree import export_kaldi
    from teacherstudent.tying.senones import Inventory
    from teacherstudent.tying.tree_view import show

    inventory = Inventory.load(Path(config.folder, "senones", "inventory.json"))
    if options.show:
        print(show(inventory, options.show))
    if options.kaldi:
        for path in export_kaldi(inventory, Path(options.kaldi)):
            print(path)
    return 0


def _run_steps(config: Config, options: argparse.Namespace) -> int:
    import torch

    from teacherstudent.distributed import connect
    from teacherstudent.experiment import Experiment
    from teacherstudent.run import find_steps, run_steps

    torch.set_num_threads(config.distributed.threads_per_worker)
    comm = connect(timeout_seconds=config.distributed.timeout_seconds)
    experiment = Experiment(config)
    steps = find_steps(experiment, options.step)
    comm.barrier()  # every rank has looked at the folder before one of them writes to it
    if comm.rank == 0:
        try:
            experiment.create()
        except OSError as error:
            what = f"folder = {config.folder!r} cannot be written: {error.strerror}"
            raise ValueError(f"{what}. Name another (folder=OTHER)") from None
    run_steps(experiment, comm, steps)
    if comm.rank == 0 and options.step in ("evaluate", "report", "run"):
        _say_results(experiment.folder)
    comm.close()
    return 0


def _say_results(folder: Path) -> None:
    from teacherstudent.decoding.results_table import summary

    results = folder / "evaluate" / "results.json"
    if results.is_file():
        print(summary(results))
    if (folder / "report.html").is_file():
        print(f"report: {(folder / 'report.html').resolve()}")


def _store(options: argparse.Namespace) -> int:
    from teacherstudent.targets import store_commands

    store_commands.run(options)
    return 0
