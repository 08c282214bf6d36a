"""The sections of the report's page, each from what of it is there."""

import math
import shlex
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from teacherstudent.data.manifests import HUMAN, UNLABELLED
from teacherstudent.data.sources import brings_data
from teacherstudent.reporting import report_figures as figures
from teacherstudent.reporting import report_page as html
from teacherstudent.reporting.report_data import Findings
from teacherstudent.reporting.report_errors import error_rates, format_interval
from teacherstudent.reporting.report_page import Html
from teacherstudent.training.schedule import Plan

_TITLE = "A student taught by a teacher and by people"
_PACKAGES = ("teacherstudent", "torch", "numpy", "lhotse", "h5py")


def build_page(findings: Findings) -> str:
    """The whole page as text."""
    errors = error_rates(findings, _command(findings, "evaluate"))
    sections = [
        ("errors", "Word error rates", errors),
        ("training", "Training", _training(findings)),
        ("schedule", "Schedule", _schedule(findings)),
        ("labels", "Machine labels", _labels(findings)),
        ("communication", "Communication", _communication(findings)),
        ("next", "Going on", _commands(findings)),
        ("provenance", "Provenance", _provenance(findings)),
    ]
    built = [(key, name, html.section(key, name, content)) for key, name, content in sections]
    return html.page(_TITLE, [_headline(findings), html.tiles(_facts(findings))], built)


# -- what came out -------------------------------------------------------------------------------------------


def _headline(findings: Findings) -> Html:
    """By how much each student with machine labels beats the better human-only one; or that it does not."""
    results = findings.results
    if results is None:
        text = "The students have not been evaluated yet: there are no word error rates."
        return html.paragraph(text, "headline open")
    taught = [name for name in findings.systems if findings.system_colour(name) not in ("teacher", "human")]
    comparisons = [comparison for comparison in results["comparisons"] if comparison["system"] in taught]
    if not comparisons:
        text = (
            "Nothing to compare yet: it takes a student of human labels alone, and one with machine labels."
        )
        return html.paragraph(text, "headline open")
    baseline = findings.systems[results["baseline"]]
    than = (
        f"the better of those trained on human labels alone (“{baseline['label']}”, {_error_rate(baseline)})"
    )
    amounts = "; ".join(_amount(results, comparison) for comparison in comparisons)
    better = [_shown_value(comparison["relative_reduction"]) > 0 for comparison in comparisons]
    who = "students trained with machine labels"
    if not any(better):
        text = f"Machine labels do not help here. On the test speakers {who} do no better than {than}: {amounts}."
    elif all(better):
        text = f"On the test speakers {who} make fewer word errors than {than}: {amounts}."
    else:
        text = (
            f"On the test speakers some {who} make fewer word errors than {than}, and some do not: {amounts}."
        )
    ends = [tuple(map(_shown_value, comparison["interval"])) for comparison in comparisons]
    certain = not any(low <= 0 <= high for low, high in ends)
    if not certain:
        text += " Where an interval holds zero, these test speakers cannot tell the two apart."
    return html.paragraph(
        text.replace(" %", "\N{NO-BREAK SPACE}%"), "headline" if certain and all(better) else "headline open"
    )


def _shown_value(percent: float | None) -> float:
    """As it is printed, so that words and figures agree; None: more errors than a baseline that makes none."""
    return -math.inf if percent is None else round(percent, 1)


def _amount(results: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    system = results["systems"][comparison["system"]]
    reduction = _shown_value(comparison["relative_reduction"])
    if math.isinf(reduction):
        return f"“{system['label']}” more ({_error_rate(system)})"
    amount = f"{abs(reduction):.1f} % {'more' if reduction < 0 else 'fewer'}" if reduction else "as many"
    interval = format_interval(comparison["interval"], 1)
    return (
        f"“{system['label']}” {amount} ({_error_rate(system)}; 95 % interval of the reduction {interval} %)"
    )


def _error_rate(system: Mapping[str, Any]) -> str:
    return f"{system['conditions']['all']['word_error_rate']:.1f} %"


def _facts(findings: Findings) -> list[tuple[str, str]]:
    """(figure, what it counts)"""
    facts = []
    for part, what in ((HUMAN, "with human labels"), (UNLABELLED, "without")):
        hours = findings.hours(part)
        if hours is not None:
            facts.append((_duration(hours), f"of speech {what}"))
    if findings.store is not None:
        header, info = findings.store.header, findings.store.info(num_shards=1)
        facts.append((f"{header['k']} of {header['num_senones']:,}", "posteriors kept in each frame"))
        facts.append((f"{100 * info.kept[header['k']]:.1f} %", "of the probability kept by them"))
        facts.append((f"{info.bytes_per_frame:.0f} bytes", "a frame of 30 ms in the store"))
    workers = findings.config.distributed.workers
    facts.append((str(workers), "worker configured" if workers == 1 else "workers configured"))
    return facts


# -- how it came about ---------------------------------------------------------------------------------------


def _training(findings: Findings) -> Html:
    parts: list[Html] = []
    if findings.curves:
        caption = (
            "Machine labels are distributions, not single senones, so their loss has their entropy as its floor "
            "and does not compare with that on human labels."
        )
        parts.append(html.figure(figures.draw_losses(findings.curves, findings.colours), caption))
    there = {curves.name for curves in findings.curves}
    if "teacher" not in there:
        parts.append(html.missing("The teacher has not been trained yet.", _command(findings, "teacher")))
    students = [name for name in findings.config.student_variants() if name not in there]
    if students:
        what = f"Not trained yet: {', '.join(students)}."
        parts.append(html.missing(what, _command(findings, "student")))
    return html.join(parts)


def _schedule(findings: Findings) -> Html:
    plans: dict[tuple[Any, float], tuple[list[str], Plan]] = {}
    for name, student in findings.config.student_variants().items():
        key = (student.schedule, student.optimisation.learning_rate)
        names, _ = plans.setdefault(key, ([], Plan(*key)))
        names.append(name)
    drawn = [(", ".join(names), plan) for names, plan in plans.values()]
    words = [
        html.element("li", html.join([html.element("strong", name), f" – {plan.describe()}"]))
        for name, plan in drawn
    ]
    caption = "Every worker is on the same source in the same step."
    picture = html.figure(figures.draw_schedules(drawn), caption)
    return html.join([html.element("ul", html.join(words)), picture])


def _labels(findings: Findings) -> Html:
    if findings.store is None:
        return html.missing("The teacher has not labelled anything yet.", _command(findings, "label"))
    shown = findings.posteriorgram()
    if shown is None:
        return html.paragraph(
            "No utterance to show: features are not stored, or none of the first shard is labelled.", "note"
        )
    caption = (
        f"The unlabelled utterance {shown.utterance_id}: what the microphone gave, and what the teacher made of it. "
        "Of each frame only the highest posteriors are kept. Senones are named after their phones (₀ the first "
        "frame of a phone, ₁ later ones) and listed in the order in which they are active."
    )
    return html.figure(figures.draw_posteriorgram(shown), caption)


def _communication(findings: Findings) -> Html:
    optimisations = {"teacher": findings.config.teacher.optimisation} | {
        name: student.optimisation for name, student in findings.config.student_variants().items()
    }
    sending = [curves for curves in findings.curves if len(curves.sent["step"])]
    if not sending:
        return html.missing("There is no training log yet.", _command(findings, "student"))
    rows = []
    for curves in sending:
        sent, optimisation = curves.sent, optimisations[curves.name]
        density = sent["density"][sent["density"] == sent["density"]]  # NaN: the method has none
        total = sent["bytes_sent"][-1]
        rows.append(
            [
                curves.name,
                optimisation.method,
                f"{curves.num_steps:,}",
                _bytes(total),
                _bytes(total / sent["step"][-1]),
                f"{density.mean():.2g}" if len(density) else "–",
            ]
        )
    head = ["Training", "Method", "Steps", "Bytes sent", "A step", "Mean density"]
    caption = "Payload that the first worker sent for gradients or model updates, validation aside."
    parts = [html.table(head, rows, caption)]
    busy = [curves for curves in sending if curves.sent["bytes_sent"][-1] > 0]
    if busy:
        picture = figures.draw_communication(busy, findings.colours)
        parts.append(
            html.figure(picture, "Bytes are averaged from the start: some methods send once in a block.")
        )
    else:
        parts.append(html.paragraph("One worker has nobody to send to.", "note"))
    return html.join(parts)


# -- going on ------------------------------------------------------------------------------------------------


def _commands(findings: Findings) -> Html:
    corpus, folder = findings.config.corpus, _shown(findings.folder)
    seed, split = findings.config.seed, corpus.split
    evaluated = shlex.quote(f"{folder}/steps/evaluate.json")
    more = [f"corpus.unlabelled_minutes={10 * corpus.unlabelled_minutes:g}"]
    launched = {name: _run(findings, f"{folder}-{name}") for name in ("torchrun", "mpirun")}
    commands = [
        (
            "Other speakers and another seed, to see how far these figures depend on them",
            [
                f"teacherstudent {_run(findings, f'{folder}-other', f'seed={seed + 1}', f'corpus.split={split + 1}')}"
            ],
        ),
        ("Ten times the unlabelled speech", [f"teacherstudent {_run(findings, f'{folder}-10x', *more)}"]),
        (
            "The same on four processes, by torchrun or by MPI, from a checkout; the processes are the workers",
            [f"launch/torchrun.sh 4 {launched['torchrun']}", f"launch/mpirun.sh 4 {launched['mpirun']}"],
        ),
        (
            "Decode and score again",
            [f"rm -f {evaluated}", _command(findings, "evaluate"), _command(findings, "report")],
        ),
        ("Look into the target store", [f"teacherstudent store info {shlex.quote(f'{folder}/targets')}"]),
    ]
    if brings_data(findings.config):
        del commands[1]
    return html.join(html.join([html.paragraph(what + ":"), html.code(lines)]) for what, lines in commands)


def _run(findings: Findings, folder: str, *settings: str) -> str:
    config = f"{_shown(findings.folder)}/config.toml"
    return shlex.join(["run", config, f"folder={folder}", *settings])


def _command(findings: Findings, step: str) -> str:
    folder = _shown(findings.folder)
    return shlex.join(["teacherstudent", step, f"{folder}/config.toml", f"folder={folder}"])


def _shown(folder: Path) -> str:
    """As short as it can be from where the report is made."""
    here, there = Path.cwd(), folder.resolve()
    return (there.relative_to(here) if there.is_relative_to(here) else there).as_posix()


def _provenance(findings: Findings) -> Html:
    rows: list[list[html.Text]] = [["config.toml", "1", _hash(findings.config_hash())]]
    rows += [[step, f"{count:,}", _hash(digest)] for step, count, digest in findings.hashes()]
    caption = (
        "SHA-256 of the configuration, and of the list of hashes of all files that each finished step wrote."
    )
    parts = [html.element("div", html.table(["Step", "Files", "SHA-256"], rows, caption), "text")]
    if findings.store is not None:
        named: list[list[html.Text]] = [
            [name, _hash(str(value))] for name, value in sorted(findings.store.header["provenance"].items())
        ]
        caption = "What the target store says it was made with."
        parts.append(html.element("div", html.table(["Machine labels", "Value"], named, caption), "text"))
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    parts.append(html.paragraph(f"Seed {findings.config.seed}. Reported with {versions}.", "note"))
    return html.join(parts)


# -- small things --------------------------------------------------------------------------------------------


def _bytes(count: float) -> str:
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(int(math.log(max(count, 1), 1000)), len(units) - 1)
    return f"{count / 1000**power:.3g} {units[power]}"


def _duration(hours: float) -> str:
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def _hash(text: str) -> Html:
    return html.element("span", text, "hash")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
