"""A bucket's quanta on their way: messages to all ranks, and what came back as gradients."""
# N ranks, c sum of all ranks' counts, τ threshold

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from teacherstudent.distributed import kernels
from teacherstudent.distributed.codec import Place, Quanta, decode, encode
from teacherstudent.distributed.communicators import Communicator, Handle
from teacherstudent.distributed.courier import Arrived, Courier, Delivery
from teacherstudent.distributed.flat import Bucket

NO_QUANTA = Quanta(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


class Fired(NamedTuple):
    """What a bucket sends, and what is to be noted of it once the step is certain."""

    place: Place
    quanta: Quanta
    num_left: int  # elements that were due and had to stay
    cursor: int  # where the next step begins to choose


class Exchange(NamedTuple):
    """A bucket's messages under way."""

    place: Place
    handle: Handle | Delivery | Arrived


def start_exchange(comm: Communicator | Courier, fired: Fired, codec: str) -> Exchange:
    """Send the quanta of a bucket to all ranks, without waiting."""
    return Exchange(fired.place, comm.start_all_gather(encode(fired.quanta, fired.place, codec)))


def finish_exchange(exchange: Exchange) -> list[Quanta]:
    """Wait for the quanta of all ranks. ValueError names the sender of a message that cannot be used."""
    received = []
    for rank, message in enumerate(exchange.handle.wait()):
        try:
            received.append(decode(message, exchange.place))
        except ValueError as error:
            raise ValueError(f"the GTC message of rank {rank} cannot be used: {error}") from error
    return received


def hand_over(
    bucket: Bucket,
    received: Sequence[Quanta],
    threshold: float,
    num_ranks: int,
    rates: Sequence[float],
    present: Sequence[bool],
    dtype: torch.dtype,
) -> None:
    """Give fl(τ·c)/N/lr, each operation rounded in `dtype`, to the inner optimiser as the gradients of a bucket.

    A parameter for which no rank has a gradient or a quantum, or whose learning rate is 0, gets none.

    received  of each of the N ranks, or of none: then the gradients are 0
    rates     of each parameter group
    present   for each parameter of the model, whether any rank has a gradient
    """
    places = parts_of(bucket, [None] * len(bucket.pieces), rates)
    wanted = [present[piece.index] for piece in bucket.pieces]
    for quanta in received:
        spans = kernels.spans(places, quanta.indices)
        wanted = [before or begin < end for before, (begin, end) in zip(wanted, spans)]
    parts = []
    for piece, place, is_wanted in zip(bucket.pieces, places, wanted):
        if not (is_wanted and place.rate):
            piece.parameter.grad = None
            continue
        if piece.parameter.grad is None:
            piece.parameter.grad = torch.zeros_like(piece.parameter)
        parts.append(place._replace(gradient=piece.parameter.grad))
    kernels.apply(parts, received, threshold, num_ranks, dtype)


def parts_of(
    bucket: Bucket, gradients: Sequence[torch.Tensor | None], rates: Sequence[float]
) -> list[kernels.Part]:
    """The parameters of a bucket as the kernels take them."""
    return [
        kernels.Part(piece.start, piece.stop, gradient, rates[piece.group])
        for piece, gradient in zip(bucket.pieces, gradients)
    ]


def checksum_rates(rates: Sequence[float]) -> int:
    """Ranks whose learning rates differ find it out by this."""
    return zlib.crc32(struct.pack(f"<{len(rates)}d", *rates))
