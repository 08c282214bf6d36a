"""Which elements may send when there are more than a message should hold."""
# K elements that are due, n elements of a bucket

import torch
from torch import Tensor

from teacherstudent.distributed.codec import Quanta


def choose(due: Quanta, cursor: int, most: int) -> tuple[Quanta, Quanta, int]:
    """What is sent of the quanta that are due, what is left for later, and where to begin next time.

    At most `most` elements send: the first from index `cursor` on, and then from 0 on. The next step begins behind
    the last of them, so that every element gets its turn, and high indices do not starve.
    """
    num_due = len(due)
    if num_due <= most:
        return due, _take(due, slice(0, 0)), cursor
    begin = int(torch.searchsorted(due.indices, cursor))
    order = (torch.arange(num_due, device=due.indices.device) + begin) % num_due
    chosen, left = order[:most], order[most:]
    next_cursor = int(due.indices[chosen[-1]]) + 1
    return _take(due, chosen.sort().values), _take(due, left.sort().values), next_cursor


def _take(quanta: Quanta, which: Tensor | slice) -> Quanta:
    return Quanta(quanta.indices[which], quanta.counts[which])
