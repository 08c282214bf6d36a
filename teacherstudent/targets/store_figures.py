"""The picture of `store show`: what the teacher heard in one utterance. Drawn by matplotlib without a display."""
# T10 frames of 10 ms, T frames of 30 ms, M mel bands, K kept

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacherstudent import wheels
from teacherstudent.targets.target_codec import Decoded

_SHOWN_SENONES = 28
_FORMATS = (".png", ".svg", ".pdf")


def draw_targets(
    path: Path,
    title: str,
    decoded: Decoded,
    shift_seconds: float,
    log_mel: NDArray[np.float32] | None = None,
    names: Mapping[int, str] | None = None,
) -> None:
    """Write a picture: log-mel (T10, M) where there is one, the posteriors of the most active senones, with the best
    of each frame as a line, and the probability kept. `names` are those of senones.
    """
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path}: got a picture {path.suffix!r}, need one of {', '.join(_FORMATS)}")
    if not len(decoded.ids):
        raise ValueError(f"{title} has no frames: there is nothing to show")
    figure = wheels.load("matplotlib.figure", "report").Figure((9, 6.4), layout="constrained")
    ratios = [2.2, 4, 0.9] if log_mel is not None else [4, 0.9]
    panels = list(figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios))
    figure.suptitle(title)
    if log_mel is not None:
        _draw_log_mel(panels.pop(0), log_mel, shift_seconds * len(decoded.ids))
    _draw_posteriors(figure, panels[0], decoded, shift_seconds, names or {})
    kept = 1 - decoded.dropped
    panels[1].plot(shift_seconds * (np.arange(len(kept)) + 0.5), kept, drawstyle="steps-mid", linewidth=1.2)
    panels[1].set(ylabel="kept", xlabel="seconds", ylim=(min(0.9, float(kept.min())) - 0.02, 1.01))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{path.name}")
    figure.savefig(partial, dpi=150)
    partial.replace(path)


def _draw_log_mel(axes: Any, log_mel: NDArray[np.float32], seconds: float) -> None:
    low, high = np.percentile(log_mel, [1, 99.5])
    place = (0, seconds, 0, log_mel.shape[1])
    axes.imshow(log_mel.T, aspect="auto", origin="lower", cmap="magma", vmin=low, vmax=high, extent=place)
    axes.set_ylabel("mel band")


def _draw_posteriors(
    figure: Any, axes: Any, decoded: Decoded, shift_seconds: float, names: Mapping[int, str]
) -> None:
    rows = most_active(decoded)
    posteriors = np.exp(decoded.log_posteriors) * (1 - decoded.dropped[:, None])
    shown = np.stack([(posteriors * (decoded.ids == senone)).sum(axis=1) for senone in rows])
    place = (0, shift_seconds * len(posteriors), len(rows), 0)
    picture = axes.imshow(
        shown, aspect="auto", interpolation="none", cmap="magma", norm="linear", extent=place
    )
    picture.set_clim(0, 1)
    best = [rows.index(senone) + 0.5 if senone in rows else np.nan for senone in decoded.ids[:, 0].tolist()]
    centres = shift_seconds * (np.arange(len(best)) + 0.5)
    axes.plot(centres, best, color="cyan", linewidth=0.7, label="best senone")
    axes.set_yticks(np.arange(len(rows)) + 0.5, [names.get(row, str(row)) for row in rows], fontsize=6.5)
    axes.legend(loc="upper right", fontsize=7)
    axes.set_ylabel("most active senones")
    figure.colorbar(picture, ax=axes, pad=0.01, aspect=30)


def most_active(decoded: Decoded) -> list[int]:
    """The senones with the largest sum of posteriors, in the order in which they are active."""
    senones, place = np.unique(decoded.ids, return_inverse=True)
    posteriors = np.exp(decoded.log_posteriors.astype(np.float64))
    mass = np.bincount(place.ravel(), posteriors.ravel())
    times = np.broadcast_to(np.arange(len(posteriors))[:, None], posteriors.shape)
    moments = np.bincount(place.ravel(), (posteriors * times).ravel())
    chosen = np.argsort(-mass, kind="stable")[:_SHOWN_SENONES]
    chosen = chosen[mass[chosen] > 0]
    order = np.argsort(moments[chosen] / mass[chosen], kind="stable")
    return senones[chosen[order]].tolist()
