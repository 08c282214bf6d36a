"""However many label, and whenever they are killed: running again gives the bytes of an undisturbed run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from labelling import open_experiment

SHARDS = [[7, 30, 12], [5], [18, 3, 25], [9, 40], [11, 2], [20], [4, 4]]


class Killer:
    """Labels copies of one experiment in processes that it kills."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        open_experiment(folder / "new", SHARDS)
        self.count = 0
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "tests" / "labelling.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def write(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def copy(self) -> Path:
        self.count += 1
        folder = self.folder / str(self.count)
        return Path(shutil.copytree(self.folder / "new", folder))

    def kill(self, seconds: object, *limits: object) -> tuple[Path, dict]:
        assert self.process.stdout is not None
        folder = self.copy()
        self.write(folder, seconds, *limits)
        return folder, json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait() == 0


def contents(folder: Path) -> dict[str, bytes]:
    """Of all that labelling leaves, also hidden files; without the claims of a process that died as it left."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for place in ("targets", "steps")
        for path in sorted((folder / place).rglob("*"))
        if path.is_file() and ".claims" not in path.parts
    }


def kill_at_random_moments(folder: Path, num_moments: int, seed: int) -> None:
    """With 1 and 3 workers: all of them, or one of three, before some file operation; and all by the clock."""
    random = np.random.default_rng(seed)
    killer = Killer(folder)
    killer.write(killer.copy(), "count")
    whole, done = killer.kill("-", "-")
    assert done["killed"] == [0] and done["rest"] == []
    operations = int((folder / "1" / "count").read_text())
    (folder / "1" / "count").unlink()
    expected = contents(whole)
    assert sum(name.endswith(".h5") for name in expected) == len(SHARDS)
    unfinished = 0
    for moment in range(num_moments):
        for num_workers in (1, 3):
            last = operations // num_workers
            seconds: object = "-"
            limits: list[object] = [int(limit) for limit in random.integers(1, last + 1, num_workers)]
            if moment % 4 == 2:
                limits[1:] = ["-"] * (num_workers - 1)  # one of them: the others do its work
            elif moment % 4 == 3:
                seconds, limits = float(random.uniform(0, 0.7)), ["-"] * num_workers
            labelled, found = killer.kill(seconds, *limits)
            where = f"workers {num_workers}, seconds {seconds}, limits {limits}: {found}"
            assert set(found["killed"]) <= {-9, 0} and not any(found["rest"]), where
            assert contents(labelled) == expected, where
            unfinished += found["there"] < len(SHARDS)
            if "-" in limits and seconds == "-":
                assert found["there"] == len(SHARDS), where
            shutil.rmtree(labelled)
    assert unfinished >= num_moments // 2  # the moments were before the end
    killer.close()


def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, num_moments=4, seed=1)


@pytest.mark.soak
def test_killed_at_many_moments_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, num_moments=24, seed=2)
