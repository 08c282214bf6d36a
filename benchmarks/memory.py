"""Peaks of this process's resident memory. (The peak that getrusage knows may be that of the parent process.)"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def peak_megabytes() -> float:
    """Since the process began, or the last peak_memory."""
    return _read("VmHWM") / 2**20


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """How many bytes the process's resident memory rises above what it was, at its highest."""
    found: list[float] = []
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _read("VmRSS")
    yield found
    found.append(_read("VmHWM") - before)


def _read(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(name)).split()[1])
