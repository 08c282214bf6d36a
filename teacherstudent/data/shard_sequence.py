"""Shards by number, each made when it is asked for."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

Shard = TypeVar("Shard")


class ShardSequence(Sequence[Shard]):
    """`make(number)` for every number below `count`: 100,000 shards take no memory, and no time to pickle.

    It is made anew each time: keep what is used again and again. May be pickled if `make` may.
    """

    def __init__(self, make: Callable[[int], Shard], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: Any) -> Any:
        numbers = range(self._count)[number]
        return self._make(numbers) if isinstance(numbers, int) else [self._make(one) for one in numbers]
