"""Threads on both sides of the network: everything once and in order, and any error ends all of it."""

import threading
from collections.abc import Iterator

import pytest

from teacherstudent.training.pipeline import WriteBehind, read_ahead


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("num_items", [0, 1, 20])
def test_items_come_in_order_and_go_in_order(size: int, num_items: int) -> None:
    written: list[int] = []
    with read_ahead(range(num_items), size) as items, WriteBehind(written.append, size) as writer:
        for item in items:
            writer.put(item)
    assert written == list(range(num_items))


def test_no_more_is_read_ahead_than_was_asked_for() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with read_ahead(make(), 2) as items:
        for item in items:
            assert len(made) <= item + 4  # this one, two that wait, one at the door
            if item == 10:
                break
    assert len(made) <= 14


def test_an_error_of_the_reading_side_comes_out_after_what_was_read_before_it() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise KeyError("reading")

    met = []
    with pytest.raises(KeyError, match="reading"), read_ahead(make(), 3) as items:
        met.extend(items)
    assert met == [1]


def test_an_error_of_the_writing_side_stops_the_writing_and_comes_out() -> None:
    written = []

    def write(item: int) -> None:
        if item == 3:
            raise KeyError("writing")
        written.append(item)

    with pytest.raises(KeyError, match="writing"), WriteBehind(write, 1) as writer:
        for item in range(100):
            writer.put(item)
    assert written == [0, 1, 2]


def test_an_error_in_between_ends_both_sides_and_no_thread_is_left() -> None:
    before = threading.active_count()
    going = threading.Event()
    written: list[int] = []

    def write(item: int) -> None:
        going.wait(10)
        written.append(item)

    def fail() -> None:
        with read_ahead(range(100), 1) as items, WriteBehind(write, 2) as writer:
            for item in items:
                writer.put(item)
                if item == 2:
                    threading.Timer(0.05, going.set).start()
                    raise KeyError("between")

    with pytest.raises(KeyError, match="between"):
        fail()
    assert written in ([], [0])
    assert threading.active_count() <= before + 1  # the timer
