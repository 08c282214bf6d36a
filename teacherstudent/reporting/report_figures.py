"""The figures of the report, as SVG that takes its colours and its typeface from the page.

Drawn by matplotlib without a display; the same data give the same text: no date, no random ids.
"""
# T10 frames of 10 ms, T frames of 30 ms, M mel bands, S senones

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from teacherstudent.reporting.report_data import Curves, Posteriorgram
from teacherstudent.reporting.report_page import LIGHT
from teacherstudent.training.schedule import HUMAN, MACHINE, Plan

ZOOM_STEPS = 40
_MAX_POINTS = 800  # of a curve: more cannot be seen
_WIDTH_INCHES = 8.6
_SHOWN_SENONES = 28
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["soft"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_styled = matplotlib.rc_context(_STYLE)


@dataclass(frozen=True)
class Row:
    """A system in the figure of word error rates: (rate, low, high) in percent for every condition."""

    label: str
    colour: str
    rates: list[tuple[float, float, float]]


@_styled
def draw_error_rates(rows: Sequence[Row], conditions: Sequence[str]) -> str:
    """A dot and its interval for each system, side by side for the conditions."""
    figure = Figure((_WIDTH_INCHES, 0.75 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(conditions), sharex=True, sharey=True, squeeze=False)[0]
    places = np.arange(len(rows))
    highest = max(1e-3, *(high for row in rows for _, _, high in row.rates if high == high))
    for number, (axes, condition) in enumerate(zip(panels, conditions, strict=True)):
        axes.grid(axis="y", visible=False)
        for place, row in zip(places, rows, strict=True):
            rate, low, high = row.rates[number]
            axes.plot(
                [low, high], [place, place], color=LIGHT[row.colour], linewidth=2, solid_capstyle="round"
            )
            axes.plot(rate, place, "o", color=LIGHT[row.colour], markersize=5.5)
        axes.set_title(condition)
        axes.set_xlim(0, 1.05 * highest)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(places, [row.label for row in rows], color=LIGHT["ink"])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel("word error rate, %", fontsize=9, color=LIGHT["soft"])
    return _svg(figure, "Word error rates of all systems with their intervals; the table has the numbers.")


@_styled
def draw_losses(trainings: Sequence[Curves], colours: dict[str, str]) -> str:
    """Loss on both sources and on the development speakers, a panel each; then everybody's frame errors."""
    num_rows = len(trainings) // 2 + 1
    figure = Figure((_WIDTH_INCHES, 2.3 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 2, squeeze=False).ravel()
    for axes, curves in zip(panels, trainings):
        for source in (HUMAN, MACHINE):
            if source in curves.train:
                columns = curves.train[source]
                axes.plot(
                    *_thin(columns["step"], columns["loss"]), color=LIGHT[source], label=f"{source} labels"
                )
        axes.plot(
            curves.dev["step"],
            curves.dev["dev_loss"],
            "o-",
            color=LIGHT["ink"],
            markersize=3,
            linewidth=1,
            label="development speakers",
        )
        _finish(axes, curves.name, "loss, nats a frame")
    last = panels[len(trainings)]
    for curves in trainings:
        colour = LIGHT[colours[curves.name]]
        last.plot(
            curves.dev["step"],
            curves.dev["dev_frame_error"],
            "o-",
            color=colour,
            markersize=3,
            label=curves.name,
        )
    _finish(last, "Frame error, development speakers", "senones wrong, %")
    for axes in panels[len(trainings) + 1 :]:
        axes.set_axis_off()
    return _svg(figure, "Curves of loss by step for every training, and of frame error for all of them.")


@_styled
def draw_schedules(plans: Sequence[tuple[str, Plan]]) -> str:
    """Learning rate by step, coloured by source: the first steps one by one, then all of them."""
    return _svg(_schedules(plans), "Learning rate by step, for human and machine labels.")


@_styled
def save_schedules(plans: Sequence[tuple[str, Plan]], path: Path) -> None:
    """As draw_schedules, in a file: .png, .svg or .pdf. Raises ValueError for another suffix."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: a picture is written as .png, .svg or .pdf; give it one of these suffixes")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "schedules"}):
        dateless = (
            None if path.suffix == ".png" else {"Date" if path.suffix == ".svg" else "CreationDate": None}
        )
        _schedules(plans).savefig(path, metadata=dateless, facecolor="white", dpi=150)


def _schedules(plans: Sequence[tuple[str, Plan]]) -> Figure:
    figure = Figure((_WIDTH_INCHES, 2.2 * len(plans)), layout="constrained")
    for axes, (name, plan) in zip(figure.subplots(len(plans), 2, squeeze=False), plans, strict=True):
        shown = min(max(ZOOM_STEPS, plan.round_steps), len(plan))
        for part, places in zip(axes, (range(shown), _spread(len(plan))), strict=True):
            for source in (HUMAN, MACHINE):
                steps = places if part is axes[0] else sorted({plan.next_step(source, at) for at in places})
                within = [step for step in steps if step < len(plan)]
                portions = [(step, portion) for step in within for portion in plan[step].portions]
                chosen = [(step, each.learning_rate) for step, each in portions if each.source == source]
                if not chosen:
                    continue
                where, rates = np.array(chosen).T
                label = f"{source} labels"
                if part is axes[0]:
                    part.bar(where, rates, width=0.75, color=LIGHT[source], label=label)
                else:
                    part.plot(where, rates, color=LIGHT[source], label=label)
        _finish(axes[0], f"{name}: the first {shown:,} steps", "learning rate", legend=False)
        _finish(axes[1], f"all {len(plan):,} steps", "")
        for part in axes:
            part.set_ylim(bottom=0)
    return figure


@_styled
def draw_communication(trainings: Sequence[Curves], colours: dict[str, str]) -> str:
    """Bytes sent a step, from the start (some methods send in blocks), and the share of elements sent."""
    figure = Figure((_WIDTH_INCHES, 2.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curves in trainings:
        sent, colour = curves.sent, LIGHT[colours[curves.name]]
        left.plot(*_thin(sent["step"], sent["bytes_sent"] / sent["step"]), color=colour, label=curves.name)
        if np.isfinite(sent["density"]).any():
            right.plot(*_thin(sent["step"], sent["density"]), color=colour, label=curves.name)
    _finish(left, "Bytes sent a step, mean so far", "bytes")
    _logarithmic(left)
    _finish(right, "Share of gradient elements sent", "density", legend=bool(right.lines))
    if right.lines:
        _logarithmic(right)
    return _svg(figure, "Bytes sent a step by every training, and the density of the messages.")


@_styled
def draw_posteriorgram(shown: Posteriorgram) -> str:
    """Log-mel energies above, the posteriors of the most active senones below, and what was kept of them."""
    rows = _most_active(shown)
    figure = Figure((_WIDTH_INCHES, 5.6), layout="constrained")
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[2.2, 4, 0.9])
    seconds = 0.03 * len(shown.posteriors)
    low, high = np.percentile(shown.log_mel, [1, 99.5])
    num_mels = shown.log_mel.shape[1]
    above.imshow(
        shown.log_mel.T,
        aspect="auto",
        origin="lower",
        interpolation="none",
        cmap="magma",
        vmin=low,
        vmax=high,
        extent=(0, 0.01 * len(shown.log_mel), 0, num_mels),
    )
    above.set_title("Log-mel energies")
    above.set_ylabel("mel band")
    picture = middle.imshow(
        shown.posteriors[:, rows].T,
        aspect="auto",
        interpolation="none",
        cmap="magma",
        norm=PowerNorm(0.5, 0, 1),
        extent=(0, seconds, len(rows), 0),
    )
    middle.set_title(f"The teacher's posteriors, {len(rows)} most active senones")
    middle.set_yticks(np.arange(len(rows)) + 0.5, [shown.names[row] for row in rows], fontsize=6.5)
    middle.tick_params(axis="y", length=0)
    figure.colorbar(picture, ax=middle, pad=0.01, aspect=30, ticks=[0, 0.1, 0.5, 1]).outline.set_visible(
        False
    )
    centres = 0.03 * np.arange(len(shown.kept)) + 0.015
    below.plot(centres, shown.kept, color=LIGHT["machine"], drawstyle="steps-mid", linewidth=1.2)
    below.set_ylim(min(0.9, float(shown.kept.min())) - 0.02, 1.01)
    below.set_title("Probability kept")
    below.set_xlabel("seconds")
    for axes in (above, middle):
        axes.grid(visible=False)
    return _svg(figure, f"Log-mel energies and teacher's posteriors of the utterance {shown.utterance_id}.")


def _most_active(shown: Posteriorgram) -> list[int]:
    """Those with the largest sum of posteriors, in the order in which they are active."""
    mass = shown.posteriors.sum(axis=0)
    rows = np.argsort(-mass, kind="stable")[:_SHOWN_SENONES]
    rows = rows[mass[rows] > 0]
    times = np.arange(len(shown.posteriors)) @ shown.posteriors[:, rows] / mass[rows]
    return rows[np.argsort(times, kind="stable")].tolist()


def _finish(axes: Axes, title: str, label: str, legend: bool = True) -> None:
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    for line in axes.lines:
        if np.size(line.get_xdata()) == 1:  # a line of one point would not be seen
            line.set_marker("o")
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _spread(num_steps: int) -> list[int]:
    """At most _MAX_POINTS runs of neighbouring steps: of each run all steps of a turn, so that no source is lost."""
    if num_steps <= 4 * _MAX_POINTS:
        return list(range(num_steps))
    starts = np.linspace(0, num_steps - 1, _MAX_POINTS).astype(int)
    return sorted({int(step) for start in starts for step in range(start, min(start + 16, num_steps))})


def _thin(x: Any, y: Any) -> tuple[Any, Any]:
    """Means of neighbours where there are too many points to see."""
    size = -(-len(x) // _MAX_POINTS)
    if size <= 1:
        return x, y
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _svg(figure: Figure, description: str) -> str:
    """As an element of a page: its colours are the page's variables, its ids its own."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    head, body = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    used = set(re.findall(r"#([\w.-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    return f'<svg {box[0]} role="img" aria-label="{escape(description)}">{body}'
