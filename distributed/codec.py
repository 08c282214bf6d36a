"""Quanta, and the messages in which they travel.

`fire` takes the quanta out of a residual, `encode` and `decode` turn them into a message and back, and `add` counts
them. A message is a header and a payload:

    offset  size  header
    0       4     "GTC1", the version
    4       1     codec: 0 words, 1 dense, 2 counts
    5       1     0
    6       2     bucket
    8       8     step
    16      8     threshold, a double
    24      4     number of elements that send
    28      4     CRC-32 of the learning rates in use
    32      4     CRC-32 of the rest of the header and the payload
    36      4     0

    words   one 32-bit word for each element that sends one quantum, by rising index: index·2 + (1 if negative)
    counts  the words, then a signed 32-bit count of quanta for each
    dense   one signed byte for each element of the bucket: its count, −127 to 127

All little-endian. Of the codecs that can hold the counts, the one with the fewest bytes is used.
"""
# n elements of a bucket, K elements that send

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_HEADER = struct.Struct("<4sBBHqdIIII")
_CHECKSUM_OFFSET = 32
VERSION = b"GTC1"
WORDS, DENSE, COUNTS = 0, 1, 2
MAX_ELEMENTS = 2**31


@dataclass(frozen=True)
class Quanta:
    """Which elements send, and how much: indices (K) int64, rising; counts (K) int64, signed, never 0."""

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


def fire(residual: Tensor, threshold: float, most: int = 1) -> Quanta:
    """Every element with |r| ≥ τ sends its whole quanta, `most` at most, and keeps the rest.

    `residual` (n) changes in place: r ∓ count·τ, exact while |r| < 2²⁰·τ.
    """
    indices = torch.nonzero(residual.abs() >= threshold).view(-1)
    values = residual[indices]
    magnitudes = values.abs()
    whole = (magnitudes / threshold).floor().clamp_(1, most)
    whole -= (whole * threshold > magnitudes).to(whole.dtype)  # where the quotient was rounded up
    whole.copysign_(values)
    residual[indices] = values - whole * threshold
    return Quanta(indices, whole.to(torch.int64))


def encode(quanta: Quanta, place: Place) -> Tensor:
    """A message as bytes on the host."""
    indices, counts = quanta.indices.cpu(), quanta.counts.cpu()
    codec = _choose_codec(counts, place.num_elements)
    if codec == DENSE:
        payload = torch.zeros(place.num_elements, dtype=torch.int8)
        payload[indices] = counts.to(torch.int8)
    else:
        payload = (indices * 2 + (counts < 0)).to(torch.int32)
        if codec == COUNTS:
            payload = torch.cat((payload, counts.to(torch.int32)))
    body = payload.view(torch.uint8)
    header = _pack(codec, place, len(quanta), 0)
    header = _pack(codec, place, len(quanta), _checksum(header, body))
    return torch.cat((torch.frombuffer(bytearray(header), dtype=torch.uint8), body))


def decode(message: Tensor, place: Place) -> Quanta:
    """The quanta of a message. ValueError says what is wrong with one that is damaged or from another place."""
    if message.numel() < _HEADER.size:
        raise ValueError(f"it has {message.numel()} bytes, fewer than the {_HEADER.size} of a header")
    header, body = bytes(message[: _HEADER.size].numpy()), message[_HEADER.size :].contiguous()
    version, codec, _, bucket, step, threshold, count, rates, checksum, _ = _HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"it begins with {version!r}, not {VERSION!r}: altered, or from another version")
    if checksum != _checksum(header, body):
        raise ValueError("its checksum does not match: altered or truncated")
    found = Place(step, bucket, place.num_elements, threshold, rates)
    if found != place:
        raise ValueError(
            f"it is for {found}, not for {place}: the ranks are out of step, or differ in learning rate"
        )
    quanta = _decode_dense(body, place.num_elements) if codec == DENSE else _decode_words(body, count, codec)
    if len(quanta) != count or (count and int(quanta.indices[-1]) >= place.num_elements):
        raise ValueError(f"it announces {count} of {place.num_elements} elements, and holds others")
    return quanta


def add(quanta: Quanta, counts: Tensor) -> None:
    """Count one sender's quanta into `counts` (n), in place; whole numbers, exact in any floating dtype in use."""
    sent = quanta.counts.to(device=counts.device, dtype=counts.dtype)
    counts.index_add_(0, quanta.indices.to(counts.device), sent)


def _choose_codec(counts: Tensor, num_elements: int) -> int:
    largest = int(counts.abs().max()) if counts.numel() else 1
    sparse = (WORDS, 4) if largest == 1 else (COUNTS, 8)
    dense_fits = largest <= torch.iinfo(torch.int8).max
    return DENSE if dense_fits and num_elements < sparse[1] * counts.numel() else sparse[0]


def _pack(codec: int, place: Place, count: int, checksum: int) -> bytes:
    return _HEADER.pack(
        VERSION, codec, 0, place.bucket, place.step, place.threshold, count, place.rates_checksum, checksum, 0
    )


def _checksum(header: bytes, body: Tensor) -> int:
    blank = header[:_CHECKSUM_OFFSET] + bytes(4) + header[_CHECKSUM_OFFSET + 4 :]
    return zlib.crc32(body.numpy().data, zlib.crc32(blank))


def _decode_words(body: Tensor, count: int, codec: int) -> Quanta:
    if body.numel() != (8 if codec == COUNTS else 4) * count:
        raise ValueError(f"it announces {count} elements, and holds {body.numel()} bytes of words")
    words = body.clone().view(torch.int32).to(torch.int64)
    indices, signs = (words[:count] & 0xFFFFFFFF) >> 1, 1 - 2 * (words[:count] & 1)
    return Quanta(indices, words[count:] if codec == COUNTS else signs)


def _decode_dense(body: Tensor, num_elements: int) -> Quanta:
    if body.numel() != num_elements:
        raise ValueError(f"it holds {body.numel()} bytes for {num_elements} elements")
    values = body.view(torch.int8)
    indices = torch.nonzero(values).view(-1)
    return Quanta(indices, values[indices].to(torch.int64))
