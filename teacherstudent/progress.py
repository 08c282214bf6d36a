"""Progress in hours of audio, on stderr."""

import sys

from tqdm import tqdm

_LOG_SECONDS = 30.0  # from line to line, where stderr is no terminal
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}{postfix}]"


class _Log:
    """For tqdm, which writes over its own line: where that cannot be, a line for each state that is another."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        if text.strip() not in ("", self._last):
            self._last = text.strip()
            sys.stderr.write(f"{self._last}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class HoursBar:
    """A progress bar that is told seconds of audio and shows hours, and the time left.

    done_seconds: of audio, in an earlier run: they say nothing of this one's speed.
    In a log, which is no terminal, a line twice a minute.
    """

    def __init__(self, total_seconds: float, what: str, show: bool = True, done_seconds: float = 0.0) -> None:
        terminal = sys.stderr.isatty()
        interval = 0.5 if terminal else _LOG_SECONDS
        self._bar = tqdm(
            total=max(total_seconds, 1e-9) / 3600,
            initial=min(done_seconds, total_seconds) / 3600,
            desc=f"{what:>22}",
            bar_format=_FORMAT,
            file=sys.stderr if terminal else _Log(),
            disable=not show,
            mininterval=interval,
            maxinterval=max(interval, 10.0),
        )

    def update(self, seconds: float, **figures: str) -> None:
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(
            min(seconds / 3600, max(0.0, self._bar.total - self._bar.n)) if self._bar.total else 0
        )

    def __enter__(self) -> "HoursBar":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:  # an estimate of the whole may have been too high
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()


def hours_bar(total_seconds: float, what: str, show: bool = True, done_seconds: float = 0.0) -> HoursBar:
    return HoursBar(total_seconds, what, show, done_seconds)
