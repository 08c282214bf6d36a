"""One tiny experiment, run once and looked at by many tests."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.toml"


def teacherstudent(*arguments: str | Path, timeout_seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """The command line, as a process of its own, from the root of the checkout."""
    return run([sys.executable, "-m", "teacherstudent", *map(str, arguments)], timeout_seconds)


def run(command: Sequence[str], timeout_seconds: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_seconds)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Plain pytest skips, and says so, what has a make target of its own; `-m soak` or `-m system` runs it."""
    if config.option.markexpr:
        return
    targets = {"soak": "full counts: make soak", "system": "Debian packages or root: make test-system"}
    for item in items:
        for name, reason in targets.items():
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/tiny.toml after `run`."""
    folder = tmp_path_factory.mktemp("tiny") / "experiment"
    done = teacherstudent("run", TINY, f"folder={folder}")
    assert done.returncode == 0, done.stderr
    return folder
