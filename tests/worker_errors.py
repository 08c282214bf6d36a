"""What is wrong on one worker is an error on all of them."""

from collections.abc import Callable
from typing import Any

import pytest

from teacherstudent.distributed import Communicator, in_process


def errors_of(num_workers: int, work: Callable[[Communicator], Any]) -> list[str]:
    """The messages of the ValueErrors that all in-process workers must meet; none of them waits long."""

    def catch(comm: Communicator) -> str:
        with pytest.raises(ValueError) as caught:
            work(comm)
        return str(caught.value)

    return in_process(num_workers, catch, timeout_seconds=10)
