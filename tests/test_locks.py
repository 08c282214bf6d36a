"""A lock is one holder's at a time, and nobody's after its process; a file that is being written is not abandoned."""

import errno
import fcntl
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from teacherstudent.files import write_text
from teacherstudent.locks import create_locked, lock_file, lock_if_possible, remove_abandoned


def is_free(path: Path, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        with lock_file(path, kind | fcntl.LOCK_NB):
            return True
    except BlockingIOError:
        return False


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_lock_lasts_as_long_as_its_context(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "lock"
    with lock_file(path, kind):
        assert not is_free(path)
        assert is_free(path, fcntl.LOCK_SH) == (kind == fcntl.LOCK_SH)
    assert is_free(path)


def test_threads_with_a_lock_come_one_after_another(tmp_path: Path) -> None:
    def add(number: int) -> None:
        with lock_file(tmp_path / "lock"):
            total = int((tmp_path / "total").read_text())
            (tmp_path / "total").write_text(str(total + number))

    (tmp_path / "total").write_text("0")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(200)))
    assert (tmp_path / "total").read_text() == str(sum(range(200)))


def _hold(path: Path, theirs: Connection) -> None:
    with lock_if_possible(path):
        theirs.send("held")
        theirs.recv()


def _wait(ours: Connection) -> None:
    ours.recv()


def test_who_waits_for_another_is_told_and_who_need_not_is_not(tmp_path: Path) -> None:
    told: list[str] = []
    lock_if_possible(tmp_path / "lock", lambda: told.append("first")).close()
    with lock_file(tmp_path / "lock") as held, ThreadPoolExecutor(1) as pool:

        def tell() -> None:
            told.append("second")
            held.close()

        pool.submit(lambda: lock_if_possible(tmp_path / "lock", tell).close()).result(60)
    assert told == ["second"] and is_free(tmp_path / "lock")


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path / "lock", theirs))
    child.start()
    assert ours.recv() == "held" and not is_free(tmp_path / "lock")
    child.kill()
    child.join()
    assert is_free(tmp_path / "lock")


def test_a_process_forked_under_a_lock_does_not_keep_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with lock_file(tmp_path / "lock"):
        child = context.Process(target=_wait, args=(theirs,))
        child.start()
    assert is_free(tmp_path / "lock") and child.is_alive()
    ours.send(None)
    child.join()


def test_what_is_open_is_not_abandoned_and_what_nobody_has_open_is(tmp_path: Path) -> None:
    with create_locked(tmp_path / ".a.1.partial") as file:
        (tmp_path / ".a.2.partial").write_text("of a process that was killed")
        (tmp_path / "a").write_text("complete")
        remove_abandoned(tmp_path, ".a.*.partial")
        assert {path.name for path in tmp_path.iterdir()} == {".a.1.partial", "a"}
        file.write(b"half")
    remove_abandoned(tmp_path, ".a.*.partial")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_file_that_is_taken_for_abandoned_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, []

    def lock_late(file: object, kind: int) -> None:
        if kind == fcntl.LOCK_SH and not removed:
            removed.append(kind)
            remove_abandoned(tmp_path, ".a.*")
        lock(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with create_locked(tmp_path / ".a.1") as file:
        assert removed and os.fstat(file.fileno()).st_ino == (tmp_path / ".a.1").stat().st_ino
        remove_abandoned(tmp_path, ".a.*")
        assert (tmp_path / ".a.1").exists()


def test_text_that_is_being_written_is_nobody_elses_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def remove_first(path: Path, target: Path) -> Path:
        remove_abandoned(tmp_path, ".*")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", remove_first)
    write_text(tmp_path / "a.json", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "whole"


def test_where_there_are_no_locks_who_can_do_without_goes_on_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks"), lock_file(tmp_path / "lock"):
        pass
    with lock_if_possible(tmp_path / "lock"):
        create_locked(tmp_path / ".a.1").close()
    remove_abandoned(tmp_path, ".a.*")
    assert (tmp_path / ".a.1").exists()
