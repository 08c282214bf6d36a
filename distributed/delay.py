"""One step's exchange under way while the next one is computed."""
# N ranks

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from teacherstudent.distributed import kernels
from teacherstudent.distributed.codec import Place, Quanta
from teacherstudent.distributed.communicators import Handle
from teacherstudent.distributed.courier import Arrived
from teacherstudent.distributed.exchange import Exchange
from teacherstudent.distributed.flat import Bucket


class Pending(NamedTuple):
    """A step that has been exchanged, or is being exchanged, and not been applied."""

    exchanges: list[Exchange]  # of each bucket; none where all gradients so far were 0
    present: list[bool]  # for each parameter, whether any rank had a gradient


def save_pending(pending: Pending | None) -> dict[str, Any] | None:
    """For a checkpoint: the messages of all N ranks for each bucket. Waits for them."""
    if pending is None:
        return None
    return {
        "places": [asdict(exchange.place) for exchange in pending.exchanges],
        "messages": [exchange.handle.wait() for exchange in pending.exchanges],
        "bytes_sent": [count_bytes(exchange) for exchange in pending.exchanges],
        "present": list(pending.present),
    }


def count_bytes(exchange: Exchange) -> int:
    """That are to be counted when it is received; the worker's own communicator has counted them already."""
    return 0 if isinstance(exchange.handle, Handle) else exchange.handle.bytes_sent


def load_pending(saved: dict[str, Any] | None, buckets: Sequence[Bucket]) -> Pending | None:
    """What save_pending returned. ValueError where it is for other buckets."""
    if saved is None:
        return None
    places = [Place(**place) for place in saved["places"]]
    found, needed = [place.num_elements for place in places], [bucket.num_elements for bucket in buckets]
    if places and found != needed:
        raise ValueError(
            f"this state holds a delayed step in buckets of {found} elements, and the buckets have {needed} now; load "
            "it with the same overlap and bucket_bytes, or call synchronize() before saving"
        )
    exchanges = [
        Exchange(place, Arrived(messages, bytes_sent))
        for place, messages, bytes_sent in zip(places, saved["messages"], saved["bytes_sent"], strict=True)
    ]
    return Pending(exchanges, list(saved["present"]))


def take_back(residual: Tensor, parts: Sequence[kernels.Part], own: Quanta, threshold: float) -> None:
    """Return what this rank has sent for parameters whose learning rate has become 0 since: it cannot be applied."""
    resting = [part for part in parts if not part.rate]
    for begin, end in kernels.spans(resting, own.indices):
        taken = Quanta(own.indices[begin:end].to(residual.device), own.counts[begin:end].to(residual.device))
        kernels.put_back(residual, taken, threshold)
