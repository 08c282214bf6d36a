"""Links of a chosen speed between worker processes on one machine: namespaces, veth pairs and a bridge.

    with Links(num_workers=4, bits_per_second=10**9) as links:
        for results in links.run(measure, steps=5):   # measure(comm, steps) yields on every worker
            print(results)                            # what each worker yielded, in rank order

Each worker has a namespace of its own whose only interface leads to a bridge in one more namespace; the interfaces of
the machine itself are not touched. `tc tbf` shapes both ends of every wire, so that sending and receiving each go at
the speed asked for, like a full-duplex port of a switch. Its burst is a millisecond's worth: with the megabyte that is
often seen in recipes a sparse message would pass at the speed of memory.
"""

import contextlib
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

INTERFACE = "wire"
PREFIX = "teacherstudent"
NAMESPACES = Path("/run/netns")
BURST_SECONDS, LEAST_BURST_BYTES = 1e-3, 16 * 1024
QUEUE = "100ms"  # what waits longer is dropped
PORT = 29500
ROOT = Path(__file__).resolve().parent.parent
_numbers = itertools.count()


class LinkError(RuntimeError):
    """Shaped links cannot be made here; the message says why and what helps."""


class Links:
    """`num_workers` namespaces on one bridge. Inside the `with` block they exist; after it nothing of them does.

    Namespaces are named after this process. Those of a process that died without removing its own are removed when
    the next links are made; its workers end by themselves, since each watches the pipe to the process that started it.

    Raises LinkError where links cannot be made: not root, no iproute2, no permission.
    """

    def __init__(self, num_workers: int, bits_per_second: float) -> None:
        name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.bits_per_second = int(bits_per_second)
        self.namespaces = [f"{name}-{rank}" for rank in range(num_workers)]
        self.addresses = [f"10.77.0.{rank + 1}" for rank in range(num_workers)]
        self._switch = f"{name}-switch"
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Links":
        check_permission()
        remove_orphans()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, remove namespaces and with them all interfaces."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes.clear()
        for namespace in (*self.namespaces, self._switch):
            if (NAMESPACES / namespace).exists():
                call("ip", "netns", "del", namespace)

    def start(self, rank: int, command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """Start a command in the namespace of a rank; it is killed when the links are closed."""
        inside = ["ip", "netns", "exec", self.namespaces[rank], *command]
        process = subprocess.Popen(
            inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
        )
        self._processes.append(process)
        return process

    def run(self, function: Callable[..., Iterator[Any]], **settings: Any) -> Iterator[list[Any]]:
        """Call function(comm, **settings), a generator at the top of its file, in one process a namespace.

        Yields what the workers yield, each time one list in rank order; that and the settings travel as JSON.
        Raises RuntimeError naming the workers that failed, with the end of what they said; the others are ended.
        """
        worker = Path(__file__).with_name("link_worker.py")
        command = [sys.executable, str(worker), inspect.getfile(function), function.__name__]
        with contextlib.ExitStack() as files:
            logs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in self.namespaces]
            workers = [
                self.start(rank, [*command, json.dumps(settings)], stderr=log, env=self._environment(rank))
                for rank, log in enumerate(logs)
            ]
            while True:
                lines = [worker.stdout.readline() for worker in workers if worker.stdout]
                if not all(lines):
                    break
                yield [json.loads(line) for line in lines]
            self._end(workers, logs)

    def _end(self, workers: list["subprocess.Popen[str]"], logs: Sequence[IO[str]]) -> None:
        """Wait for the workers; once one has failed the transport tells the others, and they get a while to say so."""
        failed = {}
        for rank, worker in enumerate(workers):
            try:
                code = worker.wait(timeout=60)
            except subprocess.TimeoutExpired:
                worker.kill()
                code = worker.wait()
            self._processes.remove(worker)
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()
            if code:
                logs[rank].seek(0)
                said = "".join(logs[rank].readlines()[-3:]).strip()
                failed[rank] = signal.Signals(-code).name if code < 0 else f"exit {code}: {said}"
        if failed:
            raise RuntimeError("; ".join(f"worker {rank} failed ({how})" for rank, how in failed.items()))

    def _environment(self, rank: int) -> dict[str, str]:
        """What torchrun would set, for gloo over the shaped interface; one compute thread, since they share cores."""
        return {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(self.namespaces)),
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def _build(self) -> None:
        for namespace in (*self.namespaces, self._switch):
            call("ip", "netns", "add", namespace)
            call("ip", "-n", namespace, "link", "set", "lo", "up")
        call("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        call("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for rank, namespace in enumerate(self.namespaces):
            port = f"port{rank}"
            pair = ["type", "veth", "peer", "name", port, "netns", self._switch]
            call("ip", "link", "add", INTERFACE, "netns", namespace, *pair)
            call("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            call("ip", "-n", namespace, "addr", "add", f"{self.addresses[rank]}/24", "dev", INTERFACE)
            call("ip", "-n", namespace, "link", "set", INTERFACE, "up")
            self._shape(namespace, INTERFACE)
            self._shape(self._switch, port)

    def _shape(self, namespace: str, interface: str) -> None:
        burst = max(LEAST_BURST_BYTES, int(self.bits_per_second / 8 * BURST_SECONDS))
        speed = ["rate", f"{self.bits_per_second}bit", "burst", f"{burst}b", "latency", QUEUE]
        call("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *speed)


def bytes_transmitted() -> int:
    """What has left this namespace over its interface, headers included; to be called inside a worker."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text(encoding="ascii"))


def find_obstacle() -> str | None:
    """Why shaped links cannot be made here, found by making two; None where they can."""
    try:
        with Links(2, bits_per_second=10**9):
            return None
    except LinkError as error:
        return str(error)


def check_permission() -> None:
    if not sys.platform.startswith("linux"):
        raise LinkError(f"shaped links need Linux's network namespaces, and this is {sys.platform}")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise LinkError(
            f"shaped links need {' and '.join(missing)}, not found: install iproute2 (apt-get install iproute2)"
        )
    if os.geteuid() != 0:
        raise LinkError("shaped links need root, to make network namespaces: run as root, such as with sudo")


def remove_orphans() -> None:
    """Remove the namespaces of processes that are no more."""
    names = [path.name for path in NAMESPACES.iterdir()] if NAMESPACES.is_dir() else []
    for name in names:
        found = re.fullmatch(rf"{PREFIX}-(\d+)-\d+-\w+", name)
        if found and not Path("/proc", found[1]).exists():
            call("ip", "netns", "del", name)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LinkError(
            f"shaped links cannot be made here: '{' '.join(command)}' says: {done.stderr.strip()}"
        )
