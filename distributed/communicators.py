"""The one narrow interface through which workers talk, written once for every transport.

A transport only moves bytes between pairs of ranks (`_transfer`) and may offer a reduction of its own
(`_reduce_natively`). The collectives below are generators over such transfers, so that torch.distributed, MPI
and in-process threads run the same code and, under the ordered reduction, give the same bits.

Because a rank waits for each peer separately, a deadline that passes names the rank that was late.
"""
# N number of ranks

import math
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

DEFAULT_TIMEOUT_SECONDS = 600.0
REDUCTIONS = ("ordered", "native")
OPERATIONS = ("sum", "max")
# Below this every rank sends its whole tensor to every other one: one round trip instead of two.
DIRECT_ELEMENTS = 1024
# Tags repeat after this many, which bounds the collectives under way at once. MPI promises tags up to 32767.
NUM_TAGS = 32764
ROUNDS_PER_COLLECTIVE = 2
_DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


class PeerLost(ConnectionError):
    """A rank that others rely on has failed or left; `rank` says which one."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class Transfer(ABC):
    """Messages under way in one round of a collective."""

    @abstractmethod
    def finish(self, deadline: float) -> list[Tensor]:
        """Wait until `deadline` (time.monotonic) and return the received bytes in rank order."""


class Handle:
    """A collective that was started; `wait()` ends it and returns its result."""

    def __init__(self, communicator: "Communicator", rounds: Generator[Transfer, list[Tensor], Any]) -> None:
        self._communicator = communicator
        self._rounds = rounds
        self._transfer: Transfer | None = None
        self._result: Any = None
        self._advance(None)

    def wait(self, timeout_seconds: float | None = None) -> Any:
        """Wait for the result. Collectives started earlier on this communicator are ended first.

        Raises TimeoutError naming the late rank, or PeerLost naming the one that failed.
        """
        self._communicator._finish_through(self, timeout_seconds)
        return self._result

    def _advance(self, received: list[Tensor] | None) -> None:
        try:
            self._transfer = next(self._rounds) if received is None else self._rounds.send(received)
        except StopIteration as end:
            self._transfer, self._result = None, end.value

    def _run(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while self._transfer is not None:
            self._advance(self._transfer.finish(deadline))


class Communicator(ABC):
    """A group of ranks. Every method is collective: all ranks call the same ones in the same order.

    rank, size       this worker's number and how many there are
    host, device     where it runs
    timeout_seconds  how long a collective may wait for the slowest rank
    reduction        "ordered" or "native", what all_reduce does unless told otherwise
    bytes_sent       payload handed to other ranks so far
    member           what its ranks are called in messages
    serves_threads   whether two threads may use its transport at once
    """

    member = "rank"
    serves_threads = True

    def __init__(
        self, rank: int, size: int, device: torch.device, timeout_seconds: float, reduction: str
    ) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds!r}; give a number of seconds above 0")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
        self.rank = rank
        self.size = size
        self.device = device
        self.host = socket.gethostname()
        self.timeout_seconds = timeout_seconds
        self.reduction = reduction
        self.bytes_sent = 0
        self._num_started = 0
        self._under_way: deque[Handle] = deque()

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the transport holds; not collective, and the communicator cannot be used after it."""
        self._under_way.clear()

    # ---- collectives -------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, op: str = "sum", reduction: str | None = None) -> Tensor:
        """Reduce `tensor` (same shape and dtype on every rank) in place over all ranks, and return it.

        "ordered": each rank owns a slice, receives it from all, sums in float64 in rank order, rounds once, and
        all-gathers: the traffic of a ring, and the same bits on every transport. Integers are summed in int64;
        a sum that does not fit the dtype is an OverflowError. "native": the transport's own reduction, for which
        only the ranks of one run agree; integers are reduced in order there too.
        """
        return self.start_all_reduce(tensor, op, reduction).wait()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order. Their first dimensions may differ, and may be 0."""
        return self.start_all_gather(tensor).wait()

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Send tensors[r] to rank r; returns what each rank sent here. First dimensions may differ, and be 0."""
        return self.start_all_to_all(tensors).wait()

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Overwrite `tensor` on every rank with that of rank `root`, in place, and return it."""
        return self.start_broadcast(tensor, root).wait()

    def barrier(self, timeout_seconds: float | None = None) -> None:
        """Return once every rank has called. math.inf waits without a deadline."""
        byte = torch.zeros(1, dtype=torch.uint8)
        self._start(self._barrier_rounds(byte, self._next_tag())).wait(timeout_seconds)

    def start_all_reduce(self, tensor: Tensor, op: str = "sum", reduction: str | None = None) -> Handle:
        """As all_reduce; `tensor` must be left alone until the handle's `wait()` has returned."""
        reduction = self.reduction if reduction is None else reduction
        if op not in OPERATIONS:
            raise ValueError(f"op is {op!r}; choose one of {', '.join(OPERATIONS)}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
        if tensor.is_complex() or (tensor.dtype == torch.bool and op == "sum"):
            raise ValueError(f"cannot {op}-reduce {tensor.dtype}; reduce real or integer tensors")
        if reduction == "native" and tensor.is_floating_point():
            return self._start(self._native_rounds(tensor, op))
        return self._start(self._ordered_rounds(tensor, op, self._next_tag()))

    def start_all_gather(self, tensor: Tensor) -> Handle:
        return self.start_all_to_all([tensor] * self.size)

    def start_all_to_all(self, tensors: Sequence[Tensor]) -> Handle:
        if len(tensors) != self.size:
            raise ValueError(
                f"all_to_all got {len(tensors)} tensors for {self.size} ranks; give one for each"
            )
        return self._start(self._all_to_all_rounds(tensors, self._next_tag()))

    def start_broadcast(self, tensor: Tensor, root: int = 0) -> Handle:
        if not 0 <= root < self.size:
            raise ValueError(f"broadcast from rank {root}, but ranks go from 0 to {self.size - 1}")
        return self._start(self._broadcast_rounds(tensor, root, self._next_tag()))

    @abstractmethod
    def split(self, color: int) -> "Communicator":
        """A communicator of the ranks that gave the same `color`, in the present order."""

    def number_of(self, rank: int) -> int:
        """What a rank is called in messages: its number among all that were launched, also after `split`."""
        return rank

    # ---- what a transport provides ------------------------------------------------------------------------

    @abstractmethod
    def _transfer(
        self, outgoing: dict[int, Tensor], incoming: dict[int, int], own: Tensor, tag: int
    ) -> Transfer:
        """Start sending bytes outgoing[r] to rank r and receiving incoming[r] bytes from rank r.

        Messages are never empty. The transfer returns a list of N byte tensors: `own` at this rank's place, and
        empty ones where nothing was to be received.
        """

    def _reduce_natively(self, tensor: Tensor, op: str) -> Transfer:
        """Start the transport's own in-place reduction of a contiguous floating-point tensor."""
        raise ValueError(f"{type(self).__name__} has no reduction of its own; use reduction='ordered'")

    # ---- rounds -------------------------------------------------------------------------------------------

    def _ordered_rounds(self, tensor: Tensor, op: str, tag: int) -> Generator[Transfer, list[Tensor], Tensor]:
        if self.size == 1:
            return tensor
        flat = tensor.detach().reshape(-1).cpu()
        if flat.numel() <= DIRECT_ELEMENTS:
            received = yield self._exchange([flat] * self.size, [_num_bytes(flat)] * self.size, tag)
            total = reduce_in_order([part.view(flat.dtype) for part in received], op)
        else:
            bounds = [flat.numel() * rank // self.size for rank in range(self.size + 1)]
            slices = [flat[start:stop] for start, stop in pairwise(bounds)]
            received = yield self._exchange(slices, [_num_bytes(slices[self.rank])] * self.size, tag)
            own = reduce_in_order([part.view(flat.dtype) for part in received], op)
            del received
            gathered = yield self._exchange([own] * self.size, [_num_bytes(part) for part in slices], tag + 1)
            total = torch.cat(gathered).view(flat.dtype)
        with torch.no_grad():
            tensor.copy_(total.view(tensor.shape))
        return tensor

    def _native_rounds(self, tensor: Tensor, op: str) -> Generator[Transfer, list[Tensor], Tensor]:
        if self.size == 1:
            return tensor
        flat = tensor.detach().reshape(-1).contiguous()
        self.bytes_sent += 2 * (self.size - 1) * _num_bytes(flat) // self.size  # what a ring sends
        yield self._reduce_natively(flat, op)
        if flat.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(flat.view(tensor.shape))
        return tensor

    def _all_to_all_rounds(
        self, tensors: Sequence[Tensor], tag: int
    ) -> Generator[Transfer, list[Tensor], list[Tensor]]:
        host: dict[int, Tensor] = {}  # a tensor that goes to many ranks is brought to the host once
        for tensor in tensors:
            if id(tensor) not in host:
                host[id(tensor)] = tensor.detach().contiguous().cpu()
        outgoing = [host[id(tensor)] for tensor in tensors]
        device, own = tensors[self.rank].device, outgoing[self.rank]
        headers = {key: _describe(tensor) for key, tensor in host.items()}
        received = yield self._exchange([headers[id(t)] for t in tensors], [_HEADER_BYTES] * self.size, tag)
        shapes = [self._read_description(header, own, rank) for rank, header in enumerate(received)]
        num_bytes = [math.prod(shape) * own.element_size() for shape in shapes]
        received = yield self._exchange(outgoing, num_bytes, tag + 1)
        received[self.rank] = received[
            self.rank
        ].clone()  # what is returned never shares memory with the input
        return [
            part.view(own.dtype).view(shape).to(device)
            if part.numel()
            else own.new_empty(shape, device=device)
            for part, shape in zip(received, shapes)
        ]

    def _broadcast_rounds(
        self, tensor: Tensor, root: int, tag: int
    ) -> Generator[Transfer, list[Tensor], Tensor]:
        if self.size == 1:
            return tensor
        flat = tensor.detach().reshape(-1).cpu()
        nothing = flat[:0]
        outgoing = [flat if self.rank == root else nothing] * self.size
        num_bytes = [_num_bytes(flat) if rank == root else 0 for rank in range(self.size)]
        received = yield self._exchange(outgoing, num_bytes, tag)
        if self.rank != root and flat.numel():
            with torch.no_grad():
                tensor.copy_(received[root].view(flat.dtype).view(tensor.shape))
        return tensor

    def _barrier_rounds(self, byte: Tensor, tag: int) -> Generator[Transfer, list[Tensor], None]:
        yield self._exchange([byte] * self.size, [1] * self.size, tag)

    # ---- helpers ------------------------------------------------------------------------------------------

    def _exchange(self, outgoing: Sequence[Tensor], incoming_bytes: Sequence[int], tag: int) -> Transfer:
        """Send outgoing[r] (contiguous, on the host) to rank r, and receive incoming_bytes[r] from it."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends = {rank: _as_bytes(outgoing[rank]) for rank in others if outgoing[rank].numel()}
        self.bytes_sent += sum(message.numel() for message in sends.values())
        receives = {rank: incoming_bytes[rank] for rank in others if incoming_bytes[rank]}
        return self._transfer(sends, receives, _as_bytes(outgoing[self.rank]), tag)

    def _read_description(self, header: Tensor, own: Tensor, rank: int) -> list[int]:
        dtype, num_dims, *shape = header.view(torch.int64).tolist()
        theirs, mine = shape[:num_dims], list(own.shape)
        if not (0 <= dtype < len(_DTYPES) and 0 <= num_dims <= _MAX_DIMS):
            raise mismatch_error(self, rank)  # the answer to another call
        if _DTYPES[dtype] != own.dtype or theirs[1:] != mine[1:] or num_dims != own.dim():
            raise ValueError(
                f"rank {self.number_of(rank)} sent {_DTYPES[dtype]} of shape {tuple(theirs)}, rank "
                f"{self.number_of(self.rank)} has {own.dtype} of shape {tuple(mine)}; only the first dimension may "
                "differ between ranks"
            )
        return theirs

    def _start(self, rounds: Generator[Transfer, list[Tensor], Any]) -> Handle:
        handle = Handle(self, rounds)
        self._under_way.append(handle)
        return handle

    def _finish_through(self, handle: Handle, timeout_seconds: float | None) -> None:
        # In the order of starting, on every rank: two ranks waiting for different handles cannot block each other.
        while handle in self._under_way:
            self._under_way.popleft()._run(
                self.timeout_seconds if timeout_seconds is None else timeout_seconds
            )

    def _next_tag(self) -> int:
        tag = self._num_started * ROUNDS_PER_COLLECTIVE % NUM_TAGS
        self._num_started += 1
        return tag


def reduce_in_order(parts: Sequence[Tensor], op: str) -> Tensor:
    """Reduce equally long vectors in the given order: floats in float64, rounded once; integers in int64."""
    dtype = parts[0].dtype
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        if op == "sum":
            total += part
        else:
            torch.maximum(total, part.to(wide), out=total)
    reduced = total.to(dtype)
    if not dtype.is_floating_point and not torch.equal(reduced.to(wide), total):
        raise OverflowError(f"a sum of {dtype} over the ranks does not fit; reduce in a wider integer type")
    return reduced


def late_error(comm: Communicator, late: Sequence[int], what: str) -> TimeoutError:
    names = ", ".join(str(comm.number_of(rank)) for rank in late)
    return TimeoutError(
        f"rank {comm.number_of(comm.rank)} waited for rank{'s' * (len(late) > 1)} {names} until the deadline passed "
        f"({what}). Look in the log of that rank for an error or a stall, or raise timeout_seconds if it is only slow"
    )


def lost_error(comm: Communicator, rank: int) -> PeerLost:
    return PeerLost(
        rank,
        f"rank {comm.number_of(rank)} has failed or left; its own log says why, unless it has only taken fewer steps "
        "than the others",
    )


def mismatch_error(comm: Communicator, rank: int) -> ValueError:
    return ValueError(
        f"rank {comm.number_of(rank)} sent a message of another size than rank {comm.number_of(comm.rank)} expected; "
        "all ranks must call the same collectives, as often, with tensors of the same size"
    )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_bytes(tensor: Tensor) -> Tensor:
    if not tensor.numel():  # which may have any stride, and view() asks for 1
        return torch.empty(0, dtype=torch.uint8)
    return tensor.reshape(-1).view(torch.uint8)


_MAX_DIMS = 8
_HEADER_BYTES = 8 * (2 + _MAX_DIMS)


def _describe(tensor: Tensor) -> Tensor:
    if tensor.dim() > _MAX_DIMS or tensor.dtype not in _DTYPES:
        raise ValueError(
            f"cannot send {tensor.dtype} of shape {tuple(tensor.shape)}: at most {_MAX_DIMS} dimensions"
        )
    padding = [0] * (_MAX_DIMS - tensor.dim())
    return torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *padding])
