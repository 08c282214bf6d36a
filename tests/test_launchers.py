"""Real processes under real launchers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from workers.training import METHODS_OF_SIZE, train

from teacherstudent.distributed import in_process

ROOT = Path(__file__).parent.parent
WORKERS = ROOT / "tests" / "workers"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
MPIRUN = [
    os.path.join(os.path.dirname(sys.executable), "mpirun"),
    "--oversubscribe",
    "--bind-to",
    "none",
    "-n",
]

EXAMPLES = ["01_gtc.py", "02_bmuf.py", "03_two_tiers.py"]

needs_mpi = pytest.mark.skipif(not os.path.exists(MPIRUN[0]), reason="mpirun is not beside this Python")
launchers = pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpirun", marks=needs_mpi)])
Launch = Callable[..., subprocess.CompletedProcess[str]]


def launch(
    launcher: str, *script: str | Path, num_workers: int = 2, timeout_seconds: float = 100
) -> subprocess.CompletedProcess[str]:
    """A launch that hangs is a test that fails."""
    command = [*TORCHRUN, str(num_workers)]
    if launcher == "mpirun":
        command = [*MPIRUN, str(num_workers), sys.executable]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if os.getuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        [*command, *map(str, script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout_seconds,
    )


@pytest.fixture(scope="module")
def in_process_hashes() -> dict[int, dict[str, str]]:
    """number of workers -> method -> hash"""
    found: dict[int, dict[str, str]] = {}
    for size, methods in METHODS_OF_SIZE.items():
        all_ranks = {
            method: in_process(size, lambda comm, method=method: train(comm, method)) for method in methods
        }
        assert all(len(set(hashes)) == 1 for hashes in all_ranks.values())
        found[size] = {method: hashes[0] for method, hashes in all_ranks.items()}
        assert len(set(found[size].values())) == len(methods)
    return found


@launchers
@pytest.mark.parametrize("num_workers", METHODS_OF_SIZE)
def test_every_method_gives_the_same_bits_as_in_process(
    launcher: str, num_workers: int, in_process_hashes: dict[int, dict[str, str]]
) -> None:
    done = launch(launcher, WORKERS / "training.py", num_workers=num_workers)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == in_process_hashes[num_workers]


@launchers
def test_collectives_work_on_real_processes(launcher: str) -> None:
    done = launch(launcher, WORKERS / "collectives.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("collectives agree") == 2


@pytest.mark.parametrize(  # two workers are one group of the third
    ("example", "launcher"),
    [
        (EXAMPLES[1], "torchrun"),  # as the README has them
        pytest.param(EXAMPLES[0], "mpirun", marks=needs_mpi),
        pytest.param(EXAMPLES[1], "mpirun", marks=[needs_mpi, pytest.mark.soak]),
        pytest.param(EXAMPLES[0], "torchrun", marks=pytest.mark.soak),
    ],
)
def test_the_examples_train_on_two_workers(launcher: str, example: str) -> None:
    done = launch(launcher, ROOT / "examples" / example)
    assert done.returncode == 0, done.stderr
    assert "2 worker(s)" in done.stdout
    losses = [float(line.split()[3]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < min(0.35, 0.6 * losses[0])


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run_alone(example: str) -> None:
    script = ROOT / "examples" / example
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 worker(s)" in done.stdout
    assert len(script.read_text().splitlines()) <= 60


def test_two_tiers_train_on_two_groups_of_two_workers() -> None:
    done = launch("torchrun", ROOT / "examples" / "03_two_tiers.py", num_workers=4)
    assert done.returncode == 0, done.stderr
    assert "4 worker(s) in 2 group(s)" in done.stdout
    losses = [float(line.split()[6]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < min(0.35, 0.6 * losses[0])


@pytest.mark.parametrize(
    ("way", "launcher"),
    [
        ("raise", "torchrun"),
        ("kill", "torchrun"),
        pytest.param("raise", "mpirun", marks=needs_mpi),
        pytest.param("exit", "mpirun", marks=needs_mpi),
        pytest.param("exit", "torchrun", marks=pytest.mark.soak),
        pytest.param("kill", "mpirun", marks=[needs_mpi, pytest.mark.soak]),
    ],
)
def test_a_worker_that_dies_makes_the_launch_fail(launcher: str, way: str) -> None:
    done = launch(launcher, WORKERS / "failing.py", way, timeout_seconds=60)
    assert done.returncode != 0
    if way == "raise":
        assert "this rank has a problem of its own" in done.stderr


@launchers
def test_a_worker_that_never_comes_is_named_and_the_launch_fails(launcher: str) -> None:
    done = launch(launcher, WORKERS / "failing.py", "late", timeout_seconds=60)
    assert done.returncode != 0
    assert "rank 0 waited for rank 1 until the deadline passed" in done.stderr


@launchers
def test_the_launch_scripts_start_the_command_line_on_all_workers(launcher: str, tmp_path: Path) -> None:
    script = [str(ROOT / "launch" / f"{launcher}.sh"), "2"]
    explained = subprocess.run(script, capture_output=True, text=True)
    assert explained.returncode == 2 and "NUM_WORKERS STEP conf.toml" in explained.stderr
    command = [
        *script,
        "teacher",
        str(ROOT / "tests" / "tiny.toml"),
        f"folder={tmp_path}/no",
        "distributed.worker=1",
    ]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert refused.returncode != 0
    assert "distributed.worker" in refused.stderr + refused.stdout
