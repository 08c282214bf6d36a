import os
import signal
import subprocess
import sys

import pytest

from teacherstudent.processes import ProcessMap, map_in_processes


class Plus:
    def __init__(self, amount):
        if not isinstance(amount, int):
            raise ValueError(f"{amount!r} is no amount")
        self.amount = amount

    def __call__(self, item):
        if item < 0:
            raise ValueError(f"{item} is negative")
        return item + self.amount


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_and_processes_serve_more_than_once(jobs):
    with ProcessMap(jobs, Plus, 3) as processes:
        assert list(processes.map(range(30))) == [item + 3 for item in range(30)]
        assert list(processes.map([])) == []
        with pytest.raises(ValueError, match="-1 is negative"):
            list(processes.map([5, -1, 7]))
        assert list(processes.map([1])) == [4]
    assert list(map_in_processes((Plus, 1), [1, 2], jobs)) == [2, 3]


def test_why_a_process_could_not_start_is_raised():
    for jobs in (1, 2):
        with pytest.raises(ValueError, match="'x' is no amount"):
            list(map_in_processes((Plus, "x"), [1], jobs))


class Killed:
    def __call__(self, item):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="ended before its work did: too little memory for 2 of them"):
        list(map_in_processes((Killed,), [1], 2))


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    with ProcessMap(2, Plus, 0) as processes:
        results = processes.map(items())
        next(results)
        assert len(taken) <= 8


@pytest.mark.parametrize("begin", ["if True:", 'if __name__ == "__main__":'])
def test_a_script_without_a_main_guard_is_an_error_and_does_not_hang(tmp_path, begin):
    script = tmp_path / "script.py"
    script.write_text(
        "from teacherstudent.processes import map_in_processes\n"
        "def make():\n    return int\n"
        f"{begin}\n    print(list(map_in_processes((make,), ['7'] * 3, 2)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    if begin == "if True:":
        assert done.returncode != 0
        assert '`if __name__ == "__main__":`' in done.stderr
    else:
        assert done.stdout == "[7, 7, 7]\n"
