"""One worker at a time has a claim; the claims of the dead are taken over, those of the living never."""

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from teacherstudent import claims as claims_module
from teacherstudent.claims import Claims

LEASE = 1000.0  # seconds of the clock below


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def write_stranger(folder: Path, token: str, beats: int) -> None:
    """A worker of another machine, as it says that it lives."""
    stranger = {"machine": "another", "pid": os.getpid(), "started": "1", "beats": beats}
    (folder / f"worker.{token}").write_text(json.dumps(stranger))


@pytest.mark.parametrize("num_workers", [2, 8])
def test_each_claim_is_taken_by_exactly_one_of_many_workers(tmp_path: Path, num_workers: int) -> None:
    names = [str(number) for number in range(50)]
    taken: list[str] = []
    start, end = threading.Barrier(num_workers), threading.Barrier(num_workers)

    def work() -> None:
        with Claims(tmp_path / "claims", LEASE) as claims:
            start.wait()
            taken.extend([name for name in names if claims.take(name)])
            end.wait()  # else what one gives up is taken again

    threads = [threading.Thread(target=work) for _ in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(names)


def test_what_is_given_up_can_be_taken_and_nothing_is_left_of_those_who_leave(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with Claims(folder, LEASE) as first, Claims(folder, LEASE) as second:
        assert first.take("a") and first.take("b")
        assert not first.take("a") and not second.take("a")
        first.release("a")
        assert second.take("a")
        assert not first.take("a")
    assert not folder.exists()


def test_a_claim_outlives_an_error_of_its_worker_no_longer_than_the_worker(tmp_path: Path) -> None:
    with Claims(tmp_path, LEASE) as other:
        with pytest.raises(KeyError), Claims(tmp_path, LEASE) as claims:
            assert claims.take("a")
            raise KeyError
        assert other.take("a")


def test_the_claim_of_another_machine_is_taken_over_when_its_worker_stood_still_for_the_lease(
    tmp_path: Path,
) -> None:
    clock = Clock()
    write_stranger(tmp_path, "stranger", beats=1)
    (tmp_path / "a").write_text("stranger")
    with Claims(tmp_path, LEASE, clock) as claims:
        assert not claims.take("a")  # seen for the first time
        clock.seconds += LEASE - 1
        assert not claims.take("a")
        write_stranger(tmp_path, "stranger", beats=2)  # it lives
        clock.seconds += 2
        assert not claims.take("a")
        clock.seconds += LEASE - 1
        assert not claims.take("a")
        clock.seconds += 1
        assert claims.take("a")
        assert (tmp_path / "a").read_text() != "stranger"


@pytest.mark.parametrize("owner", ["gone", ""])
def test_a_claim_whose_worker_is_not_to_be_found_is_taken_over_after_the_lease(
    tmp_path: Path, owner: str
) -> None:
    clock = Clock()
    (tmp_path / "a").write_text(owner)  # nobody's: who made it died before writing its name
    with Claims(tmp_path, LEASE, clock) as claims:
        assert not claims.take("a")
        clock.seconds += LEASE
        assert claims.take("a")


def test_a_claim_that_changed_hands_is_another_one(tmp_path: Path) -> None:
    clock = Clock()
    for token in ("one", "two"):
        write_stranger(tmp_path, token, beats=1)
    (tmp_path / "a").write_text("one")
    with Claims(tmp_path, LEASE, clock) as claims:
        assert not claims.take("a")
        clock.seconds += LEASE
        (tmp_path / "a").write_text("two")
        assert not claims.take("a")


def test_who_lost_a_claim_does_not_give_up_that_of_its_successor(tmp_path: Path) -> None:
    with Claims(tmp_path, LEASE) as claims:
        assert claims.take("a")
        (tmp_path / "a").write_text("successor")  # it was taken for dead
        claims.release("a")
        assert (tmp_path / "a").read_text() == "successor"


def test_a_newer_claim_is_not_removed_for_an_older_one(tmp_path: Path) -> None:
    with Claims(tmp_path, LEASE) as claims:
        (tmp_path / "a").write_text("newer")
        claims._remove("a", "older")
        assert (tmp_path / "a").read_text() == "newer"


def test_of_two_that_take_over_at_the_same_time_one_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, others = claims_module._read, []

    def read_late(path: Path) -> str | None:
        """The second comes when the first has seen for the last time whose the claim is."""
        found = read(path)
        if found == "dead" and inspect.stack()[1].function == "_remove" and not others:
            others.append(pool.submit(second.take, "a"))
            wait(others, timeout=0.5)  # time enough for what must not happen; it is not waited for otherwise
        return found

    monkeypatch.setattr(claims_module, "_read", read_late)
    monkeypatch.setattr(Claims, "_is_abandoned", lambda claims, name, owner: owner == "dead")
    with ThreadPoolExecutor(1) as pool, Claims(tmp_path, LEASE) as first, Claims(tmp_path, LEASE) as second:
        (tmp_path / "a").write_text("dead")
        taken = [first.take("a"), others[0].result(60)]
        assert sorted(taken) == [False, True]
        assert (tmp_path / "a").read_text() == (first if taken[0] else second)._token


def test_who_comes_when_the_last_one_leaves_comes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, refused = Path.mkdir, []

    def refuse_once(path: Path, *arguments: Any, **options: Any) -> None:
        if not refused:  # the folder was there, and when mkdir looks what it is, it is not
            refused.append(path)
            raise FileExistsError(path)
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse_once)
    with Claims(tmp_path / "claims", LEASE) as claims:
        assert refused and claims.take("a")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError), Claims(tmp_path / "file", LEASE):
        pass


def test_a_long_wait_is_told_once(tmp_path: Path) -> None:
    told, release = [], threading.Event()

    def tell() -> None:
        told.append(1)
        release.set()

    def wait_for_it() -> None:
        with Claims(tmp_path, lease_seconds=0.1) as second, second.hold("a", tell):
            pass

    with Claims(tmp_path, lease_seconds=0.1) as first, ThreadPoolExecutor(1) as pool:
        with first.hold("a", tell):
            waiting = pool.submit(wait_for_it)
            assert release.wait(60)
        waiting.result(60)
    assert told == [1]


def test_a_process_of_this_machine_that_was_killed_loses_its_claims_at_once_and_a_living_one_keeps_them(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from teacherstudent.claims import Claims\n"
        "with Claims(Path(sys.argv[1]), 1e6) as claims:\n"
        "    assert claims.take('a'); print('taken', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "taken\n"
    with Claims(tmp_path, 1e6) as claims:
        assert not claims.take("a")
        process.send_signal(signal.SIGKILL)
        with claims.hold("a"):  # waits until it is a zombie at least
            assert not list(tmp_path.glob(".a*"))
        claims.sweep()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert not tmp_path.exists()


def test_a_live_worker_goes_on_saying_so(tmp_path: Path) -> None:
    with Claims(tmp_path, lease_seconds=0.2) as claims:
        path = tmp_path / f"worker.{claims._token}"
        first = json.loads(path.read_text())["beats"]
        waiting = threading.Event()
        for _ in range(500):
            if json.loads(path.read_text())["beats"] > first + 2:
                break
            waiting.wait(0.02)
        assert json.loads(path.read_text())["beats"] > first + 2


def test_holding_is_for_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with Claims(tmp_path, lease_seconds=0.1) as claims:
            for _ in range(3):
                with claims.hold("a"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 12
