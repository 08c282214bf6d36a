"""Files that are being written under a temporary name: locked by their writer, removed when it was killed."""

import contextlib
import fcntl
from pathlib import Path
from typing import BinaryIO


def remove_abandoned(path: Path) -> None:
    """What killed writers of this shard left behind; not what another one is writing now, which holds a lock on it.

    Where the file system has no locks nothing is removed.
    """
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(OSError), partial.open("rb") as file:  # locked, or gone meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def lock(path: Path) -> BinaryIO:
    """Until it is closed, or the process ends however it does. Shared, so that the renamed file can be read at once."""
    file = path.open("rb")
    with contextlib.suppress(OSError):  # no locks here
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file
