"""The report's section on word error rates."""

from collections.abc import Mapping, Sequence
from typing import Any

from teacherstudent.decoding.results_table import format_p, format_share
from teacherstudent.reporting import report_figures as figures
from teacherstudent.reporting import report_page as html
from teacherstudent.reporting.report_data import Findings
from teacherstudent.reporting.report_page import Html


def error_rates(findings: Findings, command: str) -> Html:
    """The section; command: what makes the results where there are none."""
    results = findings.results
    if results is None:
        return html.missing("No system has been evaluated yet.", command)
    systems, conditions = findings.systems, findings.conditions
    rows = [_table_row(row, conditions) for row in systems.values()]
    fields = ["all test speakers", *conditions[1:]]
    head = ["System", "Learning rate", *fields, "Frame error", "Cross-entropy", "Parameters"]
    caption = (
        "Word error rate in percent, with its 95 % bootstrap interval over sentences. Frame error: share of "
        "frames whose best senone is another than the aligned one, on test and on development speakers; "
        "cross-entropy: of the aligned senones, in nats a frame. The acoustic scale and the word penalty of each "
        "system were chosen on the development speakers; test speakers choose nothing. The student with the fewest "
        "errors is marked."
    )
    students = [name for name, row in systems.items() if row["kind"] == "student"]
    best = min(students, key=lambda name: systems[name]["conditions"]["all"]["word_error_rate"], default=None)
    table = html.table(head, rows, caption, None if best is None else list(systems).index(best))
    drawn = [
        figures.Row(
            row["label"],
            findings.system_colour(name),
            [_rate(row["conditions"].get(each)) for each in conditions],
        )
        for name, row in systems.items()
    ]
    picture = html.figure(figures.draw_error_rates(drawn, fields), "The same word error rates and intervals.")
    more = [_by_field(systems, name) for name in next(iter(systems.values())).get("by", {})]
    rest = [_missing(results), _compared(results), _kinds_of_errors(systems), *more, _speeds(findings)]
    return html.join([table, picture, *rest])


def _table_row(row: Mapping[str, Any], conditions: list[str]) -> list[html.Text]:
    method = html.element("small", str(row["method"]))
    cells: list[html.Text] = [row["label"], html.join([f"{row['learning_rate']:g}", method])]
    for condition in conditions:
        score = row["conditions"].get(condition)
        if score is None:
            cells.append("–")
            continue
        rate = html.element("strong" if condition == "all" else "span", f"{score['word_error_rate']:.1f}")
        cells.append(html.join([rate, html.element("small", format_interval(score["interval"], 1))]))
    cells += [_test_and_dev(row.get("frame_error"), 1), _test_and_dev(row.get("frame_cross_entropy"), 2)]
    cells.append(_number(row["parameters"]))
    return cells


def _test_and_dev(values: Mapping[str, float] | None, digits: int) -> html.Text:
    if not values or "test" not in values:
        return "–"
    dev = [html.element("small", f"dev {values['dev']:.{digits}f}")] if "dev" in values else []
    return html.join([f"{values['test']:.{digits}f}", *dev])


def _missing(results: Mapping[str, Any]) -> Html:
    """What no figure, or no frame error, counts."""
    left_out, without = (results.get(key, {}).get("test", 0) for key in ("left_out", "without_labels"))
    said = [f"{left_out} test utterances could not be used and are in no figure."] if left_out else []
    said += [f"{without} test utterances have no alignment and are in no frame error."] if without else []
    return html.paragraph(" ".join(said), "note") if said else Html("")


def _compared(results: Mapping[str, Any]) -> Html:
    if not results["comparisons"]:
        return Html("")
    systems = results["systems"]
    rows = [
        [
            systems[each["system"]]["label"],
            systems[each["baseline"]]["label"],
            f"{format_share(each['relative_reduction'])} %",
            f"{format_interval(each['interval'], 1)} %",
            format_p(each["p_value"]).removeprefix("= "),
            format_p(each["matched_pairs"]["p_value"]).removeprefix("= "),
        ]
        for each in results["comparisons"]
    ]
    head = ["System", "Baseline", "Fewer word errors", "95 % interval", "p", "p, matched pairs"]
    caption = (
        "Paired bootstrap over the same test sentences; below zero: more errors than the baseline. p: how often as "
        "large a difference comes about between systems that are equally good, by the bootstrap and by the matched-"
        "pairs test."
    )
    return html.join([html.element("h3", "Against human labels alone"), html.table(head, rows, caption)])


def _kinds_of_errors(systems: Mapping[str, Any]) -> Html:
    names = ("words", "substitutions", "insertions", "deletions")
    weights = ("acoustic_scale", "word_penalty")
    rows = [
        [
            row["label"],
            *(f"{row['conditions']['all'][name]:,}" for name in names),
            *(f"{row[name]:g}" if name in row else "–" for name in weights),
        ]
        for row in systems.values()
    ]
    table = html.table(["System", *names, "acoustic scale", "word penalty"], rows, "All test speakers.")
    return html.element("details", html.join([html.element("summary", "Kinds of errors"), table]))


def _by_field(systems: Mapping[str, Any], name: str) -> Html:
    """Of a further field of decode.score_by: a row for each of its values."""
    values = next(iter(systems.values()))["by"][name]
    rows = [
        [
            value,
            f"{cell['words']:,}",
            *(f"{row['by'][name][value]['word_error_rate']:.1f}" for row in systems.values()),
        ]
        for value, cell in values.items()
    ]
    head = [name, "words", *(row["label"] for row in systems.values())]
    table = html.table(head, rows, f"Word error rate in percent by {name}.")
    return html.element("details", html.join([html.element("summary", f"By {name}"), table]))


def _speeds(findings: Findings) -> Html:
    if findings.speeds is None:
        return Html("")
    rows = [
        [
            findings.systems[name]["label"],
            _number(row["parameters"]),
            f"{row['network_frames_per_second']:,.0f}",
            f"{row['times_faster_than_teacher']:.1f}" if "times_faster_than_teacher" in row else "–",
            f"{row['network_real_time_factor']:.4f}",
            f"{row['real_time_factor']:.4f}",
        ]
        for name, row in findings.speeds["systems"].items()
        if name in findings.systems
    ]
    head = ["System", "Parameters", "Frames a second", "× teacher", "Network", "With search"]
    caption = (
        "On one core, one utterance after the other. Network, with search: real-time factor, seconds of work a "
        "second of audio. Measured when the systems were evaluated; another run measures something else."
    )
    table = html.table(head, rows, caption)
    return html.element("details", html.join([html.element("summary", "Speed on one core"), table]))


def _rate(score: Mapping[str, Any] | None) -> tuple[float, float, float]:
    nothing = (float("nan"),) * 3
    return nothing if score is None else (score["word_error_rate"], *score["interval"])


def format_interval(interval: Sequence[float | None], digits: int) -> str:
    """None, what has no finite value, is a dash."""
    low, high = interval
    if low is None or high is None:
        ends = ("–" if end is None else _signed(end, digits) for end in interval)
        return " to ".join(ends)
    if low < 0:
        return f"{_signed(low, digits)} to {_signed(high, digits)}"
    return f"{low:.{digits}f}–{high:.{digits}f}"


def _signed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _number(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
