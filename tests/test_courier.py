"""The thread that exchanges in the background."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from conftest import ROOT

from teacherstudent.distributed import GTC, Communicator, courier, in_process

ENDING = """
import threading, torch
from teacherstudent.distributed.courier import Courier

class Slow:
    rank = bytes_sent = 0
    serves_threads = True
    def split(self, color):
        return self
    def all_gather(self, message):
        threading.Event().wait(0.3)
        print("delivered", flush=True)

Courier(Slow()).start_all_gather(torch.zeros(1))
raise RuntimeError("boom")
"""


def test_a_process_that_fails_lets_what_is_under_way_arrive() -> None:
    """Else gloo would abort it, and hide its error."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "RuntimeError: boom" in done.stderr
    assert done.stdout == "delivered\n"


def test_a_process_does_not_wait_long_for_peers_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    class Stuck:
        rank = bytes_sent = 0
        serves_threads = True

        def split(self, color: int) -> "Stuck":
            return self

        def all_gather(self, message: torch.Tensor) -> list[torch.Tensor]:
            over.wait()
            return []

    stuck: Any = Stuck()
    delivery = courier.Courier(stuck).start_all_gather(torch.zeros(1))
    monkeypatch.setattr(courier, "EXIT_SECONDS", 0.05)
    courier._join_threads()
    assert not delivery.is_over.is_set()
    over.set()
    assert delivery.wait() == []


@pytest.mark.parametrize("option", ["overlap", "delay"])
def test_a_transport_that_serves_one_thread_only_is_refused(option: str) -> None:
    def work(comm: Communicator) -> None:
        parameter = torch.nn.Parameter(torch.zeros(3))
        comm.serves_threads = False  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="MPI_THREAD_MULTIPLE"):
            GTC(torch.optim.SGD([parameter], lr=0.1), comm, threshold=0.5, **{option: True})
        GTC(torch.optim.SGD([parameter], lr=0.1), comm, threshold=0.5)

    in_process(2, work)
