"""Locks on files, which the kernel gives up for a process however it ends, and files that are locked while written.

Some file systems have none. What is only tidied up then stays, and what is only made rarer by a lock is as rare as
without; who cannot do without one says so.
"""

import contextlib
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def lock_file(path: Path, kind: int = fcntl.LOCK_EX) -> contextlib.ExitStack:
    """Locked when this returns, until the context that it returns ends. Raises OSError where there are no locks."""
    with contextlib.ExitStack() as stack:
        # For reading too: a shared lock on NFS asks for it. An exclusive one asks for writing.
        file = stack.enter_context(path.open("a+"))
        fcntl.flock(file, kind)
        stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a process forked meanwhile has the file open too
        return stack.pop_all()


def lock_if_possible(path: Path, tell: Callable[[], None] = lambda: None) -> contextlib.ExitStack:
    """As lock_file; where there are no locks, without one. tell: called when somebody else has it."""
    with contextlib.suppress(OSError):
        try:
            return lock_file(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell()
            return lock_file(path)
    return contextlib.ExitStack()


def create_locked(path: Path) -> BinaryIO:
    """An empty file at `path`, which nobody takes for abandoned as long as this is open.

    Its lock is shared, so that the file can be read at once where locks bind (some network file systems).
    """
    while True:
        file = path.open("x+b")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        if path.exists():
            return file
        file.close()  # it was taken for abandoned in the moment before it was locked


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Those of the files that `pattern` names which no process holds open and locked, as it does by create_locked."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError), path.open("r+b") as file:  # locked, or gone meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
