"""Who works at what, agreed among processes on any machines that share nothing but a folder.

    NAME                  a claim: the token of the worker that holds it; made by O_EXCL, which NFS keeps too
    worker.TOKEN          a worker: its process, and a number that it raises as long as it lives

A claim is given up by whoever held it, or taken over when its worker is dead: a process of this machine that is not
there any more at once, one of another machine when its number has stood still for `lease_seconds`. They are counted on
the watcher's own clock, so clocks need not agree. Whoever removes a claim holds the lock FOLDER.lock, so that it is the
one that was looked at. A worker that was only slow may lose a claim and not know: two may then do the same work, so it
must do no harm to do it twice; nor where the file system has no locks.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from teacherstudent.files import write_text
from teacherstudent.locks import lock_if_possible, remove_abandoned

_BEATS_PER_LEASE = 10  # a few may be lost
_MAX_POLL_SECONDS = 2.0
_SHORT_WAIT = 2  # polls
_WORKER = "worker."


class Claims:
    """One worker's claims in a folder; a context manager, at whose end all of them are given up.

    `clock` gives seconds, for tests.
    """

    def __init__(
        self, folder: Path, lease_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.lease_seconds = folder, lease_seconds
        self._lock = folder.with_name(
            f"{folder.name}.lock"
        )  # beside it: the folder goes with the last worker
        self.poll_seconds = min(lease_seconds / _BEATS_PER_LEASE, _MAX_POLL_SECONDS)
        self._token = secrets.token_hex(8)
        self._clock = clock
        self._held: set[str] = set()
        self._beats = 0
        self._seen: dict[
            str, tuple[tuple[str, str | None], float]
        ] = {}  # by claim: its state, and since when
        self._leaving = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        while not self._arrive():
            pass
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._heart.join()
        for name in list(self._held):
            self.release(name)
        self._path(_WORKER + self._token).unlink(missing_ok=True)
        with suppress(OSError):  # others are still here
            self.folder.rmdir()

    def _arrive(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.beat()
        except (FileExistsError, FileNotFoundError):  # who left last removed the folder this moment
            if self.folder.exists() and not self.folder.is_dir():
                raise
            return False
        return True

    def beat(self) -> None:
        """Say that this worker lives."""
        self._beats += 1
        write_text(self._path(_WORKER + self._token), json.dumps(_this_process() | {"beats": self._beats}))

    def _beat_on(self) -> None:
        while not self._leaving.wait(self.lease_seconds / _BEATS_PER_LEASE):
            with suppress(OSError):  # a folder that is away for a moment; if for longer, others take over
                self.beat()

    def take(self, name: str) -> bool:
        """Whether the claim is this worker's now; not when it, or another that lives, has it already."""
        if self._create(name):
            return True
        owner = _read(self._path(name))
        if owner is None:  # given up this moment
            return self._create(name)
        if not self._is_abandoned(name, owner):
            return False
        self._remove(name, owner)
        return self._create(name)  # unless a third is quicker

    def release(self, name: str) -> None:
        """Give a claim up; one that was taken over is left to its new holder."""
        self._held.discard(name)
        self._remove(name, self._token)

    @contextmanager
    def hold(self, name: str, tell: Callable[[], None] | None = None) -> Iterator[None]:
        """Wait for a claim, and hold it for the length of a `with` block. tell: called when it takes long."""
        num_polls = 0
        while not self.take(name):
            self._leaving.wait(self.poll_seconds)
            num_polls += 1
            if num_polls == _SHORT_WAIT and tell is not None:
                tell()
        try:
            yield
        finally:
            self.release(name)

    def _create(self, name: str) -> bool:
        try:
            with self._path(name).open("x", encoding="utf-8") as file:
                file.write(self._token)
        except FileExistsError:
            return False
        self._held.add(name)
        self._seen.pop(name, None)
        return True

    def _is_abandoned(self, name: str, owner: str) -> bool:
        beat = _read(self._path(_WORKER + owner))
        if beat is not None and _is_dead(beat):
            return True
        state, now = (owner, beat), self._clock()
        seen, since = self._seen.get(name, (None, now))
        if seen != state:
            self._seen[name] = (state, now)
            return False
        return now - since >= self.lease_seconds

    def _remove(self, name: str, owner: str) -> None:
        """The claim, if it is still this owner's."""
        with lock_if_possible(self._lock):
            if _read(self._path(name)) == owner:
                self._path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what workers of this machine left behind that died, when nothing is left to do."""
        remove_abandoned(self.folder, ".*")
        dead = set()
        for path in self.folder.glob(f"{_WORKER}*"):
            beat = _read(path)
            if beat is not None and _is_dead(beat):
                dead.add(path.name.removeprefix(_WORKER))
        for path in self.folder.iterdir():
            owner = None if path.name.startswith(_WORKER) else _read(path)
            if owner in dead:
                self._remove(path.name, owner)
        for owner in dead:  # after their claims, which say whose they are by it
            self._path(_WORKER + owner).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / name


def _read(path: Path) -> str | None:
    """None where there is no such file (any more)."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # also a file that another machine has just replaced: ESTALE
        return None


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"machine": _machine(), "pid": pid, "started": _start_of(pid)}


def _machine() -> str:
    """Within which process numbers mean something: a boot of a machine, and a container on it."""
    boot, space = _read(Path("/proc/sys/kernel/random/boot_id")), ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {(boot or '').strip()} {space}"


def _start_of(pid: int) -> str | None:
    """When a process of this machine started; None where there is none (a zombie is none), or no /proc."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    fields = stat.rpartition(")")[2].split() if stat else []
    return fields[19] if fields and fields[0] not in "ZX" else None


def _is_dead(beat: str) -> bool:
    """Whether that is certain: of another machine it never is."""
    try:
        worker = json.loads(beat)
        local = worker["machine"] == _machine() and worker["started"] is not None
        return local and worker["started"] != _start_of(worker["pid"])
    except (ValueError, KeyError, TypeError):
        return False
