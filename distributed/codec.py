"""Quanta, and the messages in which they travel.

`encode` and `decode` turn quanta into a message and back. A message is a header and a payload, all little-endian:

    offset  size  header
    0       4     "GTC2", the version
    4       1     codec: 0 words, 1 bitmap, 2 rice, 3 dense
    5       1     rice: the parameter of the gaps;  dense: the bytes of a count;  0 in others
    6       1     0 where the payload holds no surplus, otherwise 1 + the parameter of its Rice stream
    7       1     0
    8       8     step
    16      8     threshold, a double
    24      4     bucket
    28      4     n, the number of elements of the bucket
    32      4     K, the number of elements that send
    36      4     CRC-32 of the learning rates in use
    40      4     CRC-32 of the rest of the header and the payload

    words   a 32-bit word for each element that sends, by rising index: index·2 + (1 if negative); surplus
    bitmap  a bit for each element of the bucket, 1 if it sends; signs; surplus
    rice    the gaps, as a Rice stream (rice.py): the elements between one that sends and the next; signs; surplus
    dense   for each element of the bucket its count, signed, in 1, 2 or 4 bytes, the fewest that hold the largest

    signs   a bit for each element that sends, 1 if negative
    surplus only where any element sends more than one quantum: how many more than one each sends, as a Rice stream

Bits fill a byte from the lowest on, and the last byte is filled up with zeros. The size of a message is known before
it is written, and the codec with the fewest bytes is used, unless another one is asked for. (A bitmap is a Rice stream
with parameter 0 that goes on to the end of the bucket: it is never smaller, but faster, and used where it is as small.)
"""
# n elements of a bucket, K elements that send

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teacherstudent.distributed import rice
from teacherstudent.distributed.rice import Bytes, Values, to_bytes

_HEADER = struct.Struct("<4sBBBBqdIIIII")
_CHECKSUM_OFFSET = 40
VERSION = b"GTC2"
LADDER = ("words", "bitmap", "rice", "dense")  # by their numbers; of equal sizes the first is used
WORDS, BITMAP, RICE, DENSE = range(len(LADDER))
CODECS = ("auto", *LADDER)  # what may be asked for
MAX_ELEMENTS = 2**31


@dataclass(frozen=True)
class Quanta:
    """Which elements send, and how much: indices (K), rising; counts (K), signed, 0 < |count| < 2³¹.

    Of any whole dtype, on any device; those of a message are int64, on the host.
    """

    indices: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return self.indices.numel()


@dataclass(frozen=True)
class Place:
    """What the messages of one exchange have in common; sender and receiver must agree on all of it."""

    step: int
    bucket: int
    num_elements: int
    threshold: float
    rates_checksum: int


def encode(quanta: Quanta, place: Place, codec: str = "auto") -> Tensor:
    """A message as bytes on the host, in one of CODECS; "auto" is the one with the fewest bytes."""
    assert codec in CODECS
    payload = _Payload(quanta, place.num_elements)
    if codec == "auto":
        codec = min(LADDER, key=payload.count_bytes)
    header = _Header(
        VERSION,
        LADDER.index(codec),
        *payload.parameters(codec),
        0,
        place.step,
        place.threshold,
        place.bucket,
        place.num_elements,
        len(quanta),
        place.rates_checksum,
        0,
    )
    message = np.concatenate([np.frombuffer(_HEADER.pack(*header), np.uint8), *payload.write(codec)])
    assert message.size == _HEADER.size + payload.count_bytes(codec)
    struct.pack_into("<I", message.data, _CHECKSUM_OFFSET, zlib.crc32(message.data))
    return torch.from_numpy(message)


def decode(message: Tensor, place: Place) -> Quanta:
    """The quanta of a message (bytes).

    Raises ValueError, which says what is wrong, for one that is damaged or from another place, before it takes memory
    for more elements than its bytes can hold.
    """
    data = message.cpu().contiguous().numpy()
    if data.size < _HEADER.size:
        raise ValueError(f"it has {data.size} bytes, fewer than the {_HEADER.size} of a header")
    header, payload = _Header(*_HEADER.unpack(data[: _HEADER.size].data)), data[_HEADER.size :]
    if header.version != VERSION:
        raise ValueError(
            f"it begins with {header.version!r}, not {VERSION!r}: altered, or from another version"
        )
    blank = _HEADER.pack(*header._replace(checksum=0))
    if header.checksum != zlib.crc32(payload.data, zlib.crc32(blank)):
        raise ValueError("its checksum does not match: altered or truncated")
    found = Place(header.step, header.bucket, header.num_elements, header.threshold, header.rates_checksum)
    if found != place:
        raise ValueError(
            f"it is for {found}, not for {place}: the ranks are out of step, or differ in learning rate"
        )
    if (
        header.codec >= len(LADDER)
        or header.reserved
        or (header.parameter and header.codec in (WORDS, BITMAP))
    ):
        raise ValueError("it is in no codec of this version")
    indices, counts = (_read_dense if header.codec == DENSE else _read_sparse)(payload, header)
    if indices.size != header.num_sent or (header.num_sent and indices[-1] >= place.num_elements):
        raise ValueError(f"it announces {header.num_sent} of {place.num_elements} elements, and holds others")
    return Quanta(torch.from_numpy(indices), torch.from_numpy(counts))


class _Header(NamedTuple):
    version: bytes
    codec: int
    parameter: int
    surplus: int
    reserved: int
    step: int
    threshold: float
    bucket: int
    num_elements: int
    num_sent: int
    rates_checksum: int
    checksum: int


# ---- writing ----------------------------------------------------------------------------------------------------


class _Payload:
    """The quanta of one message, as the codecs write them."""

    def __init__(self, quanta: Quanta, num_elements: int) -> None:
        self.num_elements = num_elements
        self.indices = _to_numpy(quanta.indices)
        self.counts = _to_numpy(quanta.counts)
        self.gaps = np.diff(self.indices, prepend=-1) - 1
        self.surplus = np.abs(self.counts) - 1
        assert len(self.indices) == len(self.counts)
        assert self.gaps.min(initial=0) >= 0 and (self.indices[-1:] < num_elements).all()
        assert self.surplus.min(initial=0) >= 0 and self.surplus.max(initial=0) < rice.LIMIT - 1

    @cached_property
    def gap_layout(self) -> rice.Layout:
        return rice.choose_layout(self.gaps)

    @cached_property
    def surplus_layout(self) -> rice.Layout:
        return rice.choose_layout(self.surplus) if self.surplus.any() else rice.Layout(0, 0)

    @cached_property
    def width(self) -> int:
        return _width(self.counts)

    def parameters(self, codec: str) -> tuple[int, int]:
        """What the header says of the payload beside the codec."""
        if codec == "dense":
            return self.width, 0
        surplus = 1 + self.surplus_layout.parameter if self.surplus_layout.num_bytes else 0
        return self.gap_layout.parameter if codec == "rice" else 0, surplus

    def count_bytes(self, codec: str) -> int:
        num_sign_bytes = to_bytes(self.indices.size)
        match codec:
            case "words":
                return 4 * self.indices.size + self.surplus_layout.num_bytes
            case "rice":
                return self.gap_layout.num_bytes + num_sign_bytes + self.surplus_layout.num_bytes
            case "bitmap":
                return to_bytes(self.num_elements) + num_sign_bytes + self.surplus_layout.num_bytes
        return self.num_elements * self.width

    def write(self, codec: str) -> list[Bytes]:
        negative = self.counts < 0
        signs = np.packbits(negative, bitorder="little")
        surplus = [rice.encode(self.surplus, self.surplus_layout)] if self.surplus_layout.num_bytes else []
        match codec:
            case "words":
                return [(self.indices * 2 + negative).astype("<u4").view(np.uint8), *surplus]
            case "rice":
                return [rice.encode(self.gaps, self.gap_layout), signs, *surplus]
            case "bitmap":
                return [rice.set_bits(self.indices, self.num_elements), signs, *surplus]
        dense = np.zeros(self.num_elements, f"<i{self.width}")
        dense[self.indices] = self.counts
        return [dense.view(np.uint8)]


def _to_numpy(whole: Tensor) -> Values:
    return whole.cpu().numpy().astype(np.int64, copy=False)


def _width(counts: Values) -> int:
    """The fewest bytes that hold every count and its negative."""
    largest = int(np.abs(counts).max(initial=0))
    return next(width for width in (1, 2, 4, 8) if largest < 2 ** (8 * width - 1))


# ---- reading ----------------------------------------------------------------------------------------------------


def _read_dense(payload: Bytes, header: _Header) -> tuple[Values, Values]:
    if (
        header.parameter not in (1, 2, 4)
        or header.surplus
        or payload.size != header.num_elements * header.parameter
    ):
        raise ValueError(f"it holds {payload.size} bytes for {header.num_elements} elements")
    values = payload.view(f"<i{header.parameter}")
    indices = np.flatnonzero(values != 0)
    counts = values[indices].astype(np.int64)
    if _width(counts) != header.parameter:
        raise ValueError(f"it takes {header.parameter} bytes for a count, and needs {_width(counts)}")
    return indices, counts


def _read_sparse(payload: Bytes, header: _Header) -> tuple[Values, Values]:
    match LADDER[header.codec]:
        case "words":
            words, rest = _take(payload, 4 * header.num_sent)
            negative = (words.view("<u4") & 1).astype(np.uint8)
            indices = (words.view("<u4") >> 1).astype(np.int64)
            if (np.diff(indices) <= 0).any():
                raise ValueError("its indices do not rise")
        case "rice":
            gaps, num_bytes = rice.decode(payload, header.num_sent, header.parameter)
            indices = np.cumsum(gaps + 1) - 1
            negative, rest = _take_signs(payload[num_bytes:], header.num_sent)
        case _:
            bitmap, rest = _take(payload, to_bytes(header.num_elements))
            indices = rice.find_bits(bitmap)
            negative, rest = _take_signs(rest, indices.size)
    counts = 1 - 2 * negative.astype(np.int64)
    if header.surplus:
        surplus, num_bytes = rice.decode(rest, indices.size, header.surplus - 1)
        rest = rest[num_bytes:]
        counts *= 1 + surplus
        if surplus.max(initial=0) >= rice.LIMIT - 1:
            raise ValueError("it holds counts of 2³¹ quanta")
    if rest.size:
        raise ValueError(
            f"it has {rest.size} bytes more than the {header.num_sent} elements that it announces"
        )
    return indices, counts


def _take(payload: Bytes, num_bytes: int) -> tuple[Bytes, Bytes]:
    if payload.size < num_bytes:
        raise ValueError(f"it lacks {num_bytes - payload.size} bytes of what it announces")
    return payload[:num_bytes], payload[num_bytes:]


def _take_signs(payload: Bytes, count: int) -> tuple[Bytes, Bytes]:
    signs, rest = _take(payload, to_bytes(count))
    bits = np.unpackbits(signs, bitorder="little")
    if bits[count:].any():
        raise ValueError("there are bits beyond its last sign")
    return bits[:count], rest
