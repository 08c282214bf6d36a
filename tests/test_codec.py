"""Messages of quanta: they come back as they went, or not at all, in the fewest bytes."""
# n elements of a bucket, K elements that send

import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.distributed import codec, rice
from teacherstudent.distributed.thresholds import threshold_at

PLACE = codec.Place(step=7, bucket=1, num_elements=50, threshold=0.25, rates_checksum=123)
FAR = codec.Place(2**40, 65535, 2**31 - 1, threshold_at(-300), 2**32 - 1)
HEADER = struct.Struct("<4s4BqdIIIII")
FIELDS = ("version", "codec", "parameter", "surplus", "reserved", "step", "threshold", "bucket", "n", "sent", "rates",
          "checksum")  # fmt: skip
LADDER = ("words", "bitmap", "rice", "dense")

Counts = dict[int, int]  # of quanta, by element

SINGLE = st.sampled_from([-1, 1])
SMALL = st.integers(-5, 5).filter(bool)
LARGE = st.integers(-(2**31) + 1, 2**31 - 1).filter(bool)
MESSAGES = st.one_of(*(st.dictionaries(st.integers(0, 49), counts) for counts in (SINGLE, SMALL, LARGE)))
EXAMPLES = [
    {},
    {3: -1},
    {3: 1000, 4: -1},
    {0: -2, 7: 1, 49: 3},
    {index: 1 if index % 2 else -1 for index in range(40)},
]
EVERY_CODEC = pytest.mark.parametrize("name", LADDER)
EVERY_EXAMPLE = pytest.mark.parametrize("counts", EXAMPLES, ids=["empty", "one", "many", "ends", "crowd"])


def quanta_of(counts: Counts) -> codec.Quanta:
    indices = sorted(counts)
    return codec.Quanta(
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor([counts[index] for index in indices], dtype=torch.int64),
    )


def counts_of(quanta: codec.Quanta) -> Counts:
    assert quanta.indices.dtype == quanta.counts.dtype == torch.int64
    return dict(zip(quanta.indices.tolist(), quanta.counts.tolist(), strict=True))


def random_quanta(num_elements: int, num_sent: int, seed: int = 3) -> codec.Quanta:
    random = np.random.default_rng(seed)
    indices = np.sort(random.choice(num_elements, num_sent, replace=False))
    return codec.Quanta(torch.from_numpy(indices), torch.from_numpy(random.integers(0, 2, num_sent) * 2 - 1))


def seal(message: torch.Tensor) -> torch.Tensor:
    """The message with a checksum that fits."""
    data = bytearray(message.numpy().tobytes())
    data[40:44] = bytes(4)
    data[40:44] = struct.pack("<I", zlib.crc32(data))
    return torch.frombuffer(data, dtype=torch.uint8)


def forge(message: torch.Tensor, **fields: int) -> torch.Tensor:
    header = dict(zip(FIELDS, HEADER.unpack(bytes(message[:44].tolist())), strict=True)) | fields
    packed = torch.frombuffer(bytearray(HEADER.pack(*header.values())), dtype=torch.uint8)
    return seal(torch.cat([packed, message[44:]]))


def read_by_hand(message: torch.Tensor) -> Counts:
    """As the table in the module says, one bit after the other."""
    data = bytes(message.tolist())
    _, number, parameter, surplus, _, _, _, _, n, sent, _, _ = HEADER.unpack(data[:44])
    name = LADDER[number]
    if name == "dense":
        dense = struct.unpack(f"<{n}{ {1: 'b', 2: 'h', 4: 'i'}[parameter] }", data[44:])
        return {index: count for index, count in enumerate(dense) if count}
    bits = iter("".join(f"{byte:08b}"[::-1] for byte in data[44:]))
    num_read = 0

    def take(width: int) -> int:
        nonlocal num_read
        num_read += width
        return sum(int(next(bits)) << bit for bit in range(width))

    def align() -> None:
        assert take(-num_read % 8) == 0

    def take_stream(parameter: int) -> list[int]:
        low = [take(parameter) for _ in range(sent)]
        align()
        values = []
        for rest in low:
            quotient = 0
            while not take(1):
                quotient += 1
            values.append(quotient << parameter | rest)
        align()
        return values

    if name == "words":
        words = [take(32) for _ in range(sent)]
        indices, signs = [word // 2 for word in words], [word % 2 for word in words]
    else:
        if name == "rice":
            gaps = take_stream(parameter)
            indices = [sum(gaps[: place + 1]) + place for place in range(sent)]
        else:
            indices = [index for index in range(n) if take(1)]
            align()
        signs = [take(1) for _ in range(sent)]
        align()
    more = take_stream(surplus - 1) if surplus else [0] * sent
    assert next(bits, None) is None
    return {
        index: (-1) ** sign * (1 + extra) for index, sign, extra in zip(indices, signs, more, strict=True)
    }


# ---- there and back ---------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(MESSAGES)
def test_every_codec_says_what_the_format_says_and_auto_is_the_smallest(counts: Counts) -> None:
    sizes = {}
    for name in codec.CODECS:
        message = codec.encode(quanta_of(counts), PLACE, name)
        sizes[name] = message.numel()
        assert name == "auto" or LADDER[message[4]] == name
        assert read_by_hand(message) == counts
        assert counts_of(codec.decode(message, PLACE)) == counts
    assert sizes["auto"] == min(sizes[name] for name in LADDER)


@pytest.mark.parametrize("place", [PLACE, FAR], ids=["near", "far"])
def test_empty_full_single_and_last_element_messages_come_back(place: codec.Place) -> None:
    last = place.num_elements - 1
    examples: list[Counts] = [{}, {0: -1}, {last: 1}, {last: -1}, {0: 2, last: -(2**31) + 1}]
    if place is PLACE:
        examples.append({index: 1 if index % 3 else -1 for index in range(50)})
    for counts in examples:
        for name in codec.CODECS if place is PLACE else ("auto", "words", "rice"):
            message = codec.encode(quanta_of(counts), place, name)
            assert counts_of(codec.decode(message, place)) == counts


@EVERY_CODEC
def test_a_bucket_without_elements_or_with_one_has_messages(name: str) -> None:
    for num_elements, counts in [(0, {}), (1, {}), (1, {0: -1}), (1, {0: 300})]:
        place = codec.Place(0, 0, num_elements, 1.0, 0)
        assert counts_of(codec.decode(codec.encode(quanta_of(counts), place, name), place)) == counts


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count_dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_the_message_does_not_depend_on_the_dtype_of_the_quanta(
    index_dtype: torch.dtype, count_dtype: torch.dtype
) -> None:
    quanta = quanta_of({0: -128, 7: 1, 2**31 - 2: 127})
    given = codec.Quanta(quanta.indices.to(index_dtype), quanta.counts.to(count_dtype))
    for name in ("words", "rice"):
        assert torch.equal(codec.encode(given, FAR, name), codec.encode(quanta, FAR, name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_quanta_and_messages_of_a_gpu_are_brought_to_the_host() -> None:
    quanta = quanta_of({3: -1, 40: 2})
    on_gpu = codec.Quanta(quanta.indices.cuda(), quanta.counts.cuda())
    message = codec.encode(on_gpu, PLACE)
    assert torch.equal(message, codec.encode(quanta, PLACE))
    assert counts_of(codec.decode(message.cuda(), PLACE)) == {3: -1, 40: 2}


@pytest.mark.parametrize("density", [1e-4, 1e-3, 1e-2, 1e-1])
def test_rice_is_within_a_tenth_of_the_entropy_and_the_smallest_at_these_densities(density: float) -> None:
    n = 2_000_000
    sent = round(n * density)
    quanta = random_quanta(n, sent)
    place = codec.Place(1, 0, n, 0.25, 0)
    sets = math.lgamma(n + 1) - math.lgamma(sent + 1) - math.lgamma(n - sent + 1)
    entropy_bits = sets / math.log(2) + sent  # which of all sets of K of n elements, and its signs
    message = codec.encode(quanta, place)
    assert LADDER[message[4]] == "rice"
    assert entropy_bits <= 8 * (message.numel() - 44) <= 1.1 * entropy_bits
    if density == 1e-3:
        assert entropy_bits / sent == pytest.approx(12.4, abs=0.05)
    decoded = codec.decode(message, place)
    assert torch.equal(decoded.indices, quanta.indices)
    assert torch.equal(decoded.counts, quanta.counts)


def test_each_codec_is_used_where_it_is_the_smallest_and_a_bitmap_where_it_equals_rice() -> None:
    examples = {
        "words": quanta_of({2**31 - 2: 1}),
        "rice": random_quanta(2000, 100),
        "bitmap": random_quanta(2000, 1200),
        "dense": quanta_of({index: index * 37 % 127 + 1 for index in range(40)}),
    }
    for name, quanta in examples.items():
        place = codec.Place(1, 0, {"words": 2**31 - 1, "dense": 40}.get(name, 2000), 0.25, 0)
        assert LADDER[codec.encode(quanta, place)[4]] == name


@EVERY_CODEC
def test_numba_and_numpy_send_the_same_message(name: str) -> None:
    single = random_quanta(20_000, 700)
    quanta = codec.Quanta(single.indices, single.counts * (1 + single.indices % 5 * (single.indices % 2)))
    place = codec.Place(1, 0, 20_000, 0.25, 0)
    message = codec.encode(quanta, place, name)
    numpy_kernels = rice.Kernels(rice.write_by_numpy, rice.read_by_numpy)
    with patch.object(rice, "load_kernels", lambda: numpy_kernels):
        assert torch.equal(codec.encode(quanta, place, name), message)
        assert counts_of(codec.decode(message, place)) == counts_of(quanta)
    assert counts_of(codec.decode(message, place)) == counts_of(quanta)


def test_words_and_rice_never_touch_what_does_not_send() -> None:
    counts = {index * 200_000_000: -1 for index in range(10)}
    rice.load_kernels()
    tracemalloc.start()
    for name in ("auto", "words", "rice"):
        codec.decode(codec.encode(quanta_of(counts), FAR, name), FAR)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


# ---- damage -----------------------------------------------------------------------------------------------------


@EVERY_CODEC
@EVERY_EXAMPLE
def test_any_altered_byte_missing_end_or_longer_end_is_noticed(counts: Counts, name: str) -> None:
    message = codec.encode(quanta_of(counts), PLACE, name)
    for position in range(message.numel()):
        for flip in range(1, 256) if position < 8 else (1, 2, 16, 128, 255):
            altered = message.clone()
            altered[position] ^= flip
            refuse(altered)
        refuse(message[:position])
    for more in (torch.zeros(1, dtype=torch.uint8), message, torch.full((7,), 255, dtype=torch.uint8)):
        refuse(torch.cat([message, more]))
    refuse(message[1:])


@settings(max_examples=150, deadline=None)
@given(MESSAGES, st.sampled_from(codec.CODECS), st.data())
def test_altered_bits_are_noticed(counts: Counts, name: str, data: st.DataObject) -> None:
    message = codec.encode(quanta_of(counts), PLACE, name)
    bits = data.draw(st.sets(st.integers(0, 8 * message.numel() - 1), min_size=1, max_size=8))
    for bit in bits:
        message[bit // 8] ^= 1 << bit % 8
    refuse(message)


@EVERY_CODEC
@EVERY_EXAMPLE
def test_behind_a_checksum_that_fits_every_bit_still_counts(counts: Counts, name: str) -> None:
    """No two payloads mean the same, so that no garbage is carried along; and what is read is always legal."""
    message = codec.encode(quanta_of(counts), PLACE, name)
    for bit in range(8 * message.numel()):
        altered = message.clone()
        altered[bit // 8] ^= 1 << bit % 8
        found = read_or_refuse(seal(altered))
        if bit >= 8 * 44:
            assert found != counts
        elif counts and not 40 <= bit // 8 < 44 and found is not None:
            assert 4 <= bit // 8 <= 6  # another codec or parameter, under which the bits mean something too
    for position in range(44, message.numel()):
        assert read_or_refuse(seal(message[:position])) is None
    for more in (0, 1, 255):
        longer = torch.cat([message, torch.tensor([more], dtype=torch.uint8)])
        assert read_or_refuse(seal(longer)) is None


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 5), st.integers(0, 33), st.integers(0, 34), st.integers(0, 51), st.binary(max_size=60))
def test_of_arbitrary_bytes_only_legal_quanta_are_read_and_just_as_the_format_says(
    number: int, parameter: int, surplus: int, sent: int, payload: bytes
) -> None:
    header = HEADER.pack(b"GTC2", number, parameter, surplus, 0, 7, 0.25, 1, 50, sent, 123, 0)
    message = seal(torch.frombuffer(bytearray(header + payload), dtype=torch.uint8))
    found = read_or_refuse(message)
    if found is not None:
        assert len(found) == sent
        assert found == read_by_hand(message)


@EVERY_CODEC
def test_a_count_that_is_a_lie_is_refused_before_memory_is_taken(name: str) -> None:
    message = codec.encode(random_quanta(2000, 400), codec.Place(7, 1, 2000, 0.25, 123), name)
    places = [codec.Place(7, 1, n, 0.25, 123) for n in (2000, 2**31 - 1)]
    tracemalloc.start()
    for sent in (399, 401, 2000, 2001, 2**31 - 1, 2**32 - 1):
        for place in places:
            with pytest.raises(ValueError):
                codec.decode(forge(message, sent=sent, n=place.num_elements), place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * message.numel() + 50_000


FORGERIES: dict[str, tuple[str, Callable[[], bytes], dict[str, int]]] = {
    "falling indices": ("words", lambda: struct.pack("<2I", 2 * 9, 2 * 4), {}),
    "the same index twice": ("words", lambda: struct.pack("<2I", 2 * 9, 2 * 9 + 1), {}),
    "an index beyond the end": ("words", lambda: struct.pack("<2I", 2 * 9, 2 * 50), {}),
    "gaps beyond the end": ("rice", lambda: bytes([0b101101, 0b10000001, 0]), {"parameter": 3}),
    "a bit beyond the bitmap": ("bitmap", lambda: bytes([1, 0, 0, 0, 0, 0, 0b100, 0]), {}),
    "a bit beyond the signs": ("bitmap", lambda: bytes([1, 0, 0, 0, 0, 0, 1, 0b100]), {}),
    "a dense zero too many": ("dense", lambda: bytes([1, *[0] * 49]), {"parameter": 1}),
    "a dense −128": ("dense", lambda: bytes([128, 1, *[0] * 48]), {"parameter": 1}),
    "dense in too many bytes": ("dense", lambda: bytes([1, 0, 1, *[0] * 97]), {"parameter": 2}),
    "dense with a surplus": ("dense", lambda: bytes([1, 1, *[0] * 48]), {"parameter": 1, "surplus": 1}),
    "words with a parameter": ("words", lambda: struct.pack("<2I", 2, 4), {"parameter": 1}),
    "a reserved byte": ("words", lambda: struct.pack("<2I", 2, 4), {"reserved": 1}),
    "no codec": ("words", lambda: struct.pack("<2I", 2, 4), {"codec": 4}),
    "2³¹ quanta": ("words", lambda: struct.pack("<2I9B", 2, 4, *[255] * 7, 63, 0b11), {"surplus": 32}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_well_sealed_message_must_still_make_sense(forgery: str) -> None:
    name, payload, fields = FORGERIES[forgery]
    body = torch.frombuffer(bytearray(payload()), dtype=torch.uint8)
    message = torch.cat([codec.encode(quanta_of({3: 1, 4: 1}), PLACE, name)[:44], body])
    refuse(forge(message, **{"parameter": 0, "surplus": 0} | fields))


@pytest.mark.parametrize(
    "change",
    [{"step": 8}, {"bucket": 0}, {"threshold": 0.5}, {"rates_checksum": 9}, {"num_elements": 51}],
    ids=str,
)
def test_a_message_from_another_place_is_refused(change: dict[str, float]) -> None:
    for name in LADDER:
        message = codec.encode(quanta_of({40: -1}), PLACE, name)
        with pytest.raises(ValueError, match="out of step"):
            codec.decode(message, codec.Place(**{**vars(PLACE), **change}))  # type: ignore[arg-type]


def test_a_message_of_another_version_is_refused_by_name() -> None:
    message = codec.encode(quanta_of({}), PLACE)
    with pytest.raises(ValueError, match=r"GTC1.*GTC2"):
        codec.decode(forge(message, version=b"GTC1"), PLACE)  # type: ignore[arg-type]


def refuse(message: torch.Tensor) -> None:
    with pytest.raises(ValueError):
        codec.decode(message, PLACE)


def read_or_refuse(message: torch.Tensor) -> Counts | None:
    """What is read is legal in any case."""
    try:
        quanta = codec.decode(message, PLACE)
    except ValueError:
        return None
    indices, counts = quanta.indices.tolist(), quanta.counts.tolist()
    assert indices == sorted(set(indices))
    assert all(0 <= index < PLACE.num_elements for index in indices)
    assert all(0 < abs(count) < 2**31 for count in counts)
    return counts_of(quanta)
