"""One tiny experiment, run once and looked at by many tests."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest

# A machine that stalls for a moment is no error of the code; what takes long is seen by its test's own limits.
hypothesis.settings.register_profile("teacherstudent", deadline=None)
hypothesis.settings.load_profile("teacherstudent")

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.toml"


def teacherstudent(*arguments: str | Path, timeout_seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """The command line, as a process of its own, from the root of the checkout."""
    return run([sys.executable, "-m", "teacherstudent", *map(str, arguments)], timeout_seconds)


def run(command: Sequence[str], timeout_seconds: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_seconds)


# Files that take longest, in this order before the others: begun last, one would keep a single core busy at the end.
LONG = (
    "test_run.py",
    "test_launchers.py",
    "test_cli.py",
    "test_evaluate.py",
    "test_recipes.py",
    "test_open_corpus.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Plain pytest skips, and says so, what has a make target of its own; `-m soak` or `-m system` runs it."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if config.option.markexpr:
        return
    targets = {"soak": "full counts: make soak", "system": "Debian packages or root: make test-system"}
    for item in items:
        for name, reason in targets.items():
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Shards and catalogues are kept in a folder of the tests', also by the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/tiny.toml after `run`, made once for all processes that run tests: for reading only."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "tiny" / "experiment"
    folder.parent.mkdir(exist_ok=True)
    with (shared / "tiny" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here for the first
        if not (folder / "report.html").exists():
            done = teacherstudent("run", TINY, f"folder={folder}")
            assert done.returncode == 0, done.stderr
    return folder
