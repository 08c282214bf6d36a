"""Messages of quanta: they come back as they went, or not at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.distributed import codec
from teacherstudent.distributed.thresholds import threshold_at

PLACE = codec.Place(step=7, bucket=1, num_elements=50, threshold=0.25, rates_checksum=123)


Counts = dict[int, int]  # of quanta, by element


def quanta_of(counts: Counts) -> codec.Quanta:
    indices = sorted(counts)
    return codec.Quanta(
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor([counts[index] for index in indices], dtype=torch.int64),
    )


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 49), st.sampled_from([-1, 1])))
def test_decoding_a_message_gives_back_what_was_encoded(counts: Counts) -> None:
    check_round_trip(counts, PLACE, 4 * len(counts))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 49), st.integers(-(2**20), 2**20).filter(bool)), st.booleans())
def test_many_quanta_of_one_element_come_back_in_the_smallest_codec_that_holds_them(
    counts: Counts, small: bool
) -> None:
    if small:
        counts = {index: max(-127, min(127, count)) for index, count in counts.items()}
    single = all(abs(count) == 1 for count in counts.values())
    fits_a_byte = all(abs(count) <= 127 for count in counts.values())
    sparse = (4 if single else 8) * len(counts)
    check_round_trip(counts, PLACE, min(sparse, 50) if fits_a_byte else sparse, dense=fits_a_byte)


@pytest.mark.parametrize("num_elements", [1, 50, 2**31 - 1])
def test_empty_full_single_and_last_element_messages_come_back(num_elements: int) -> None:
    place = codec.Place(2**40, 65535, num_elements, threshold_at(-300), 2**32 - 1)
    for counts in ({}, {0: -1}, {num_elements - 1: 1}, {num_elements - 1: -1}):
        check_round_trip(counts, place, 4 * len(counts))
    if num_elements < 100:
        full = {index: 1 if index % 3 else -1 for index in range(num_elements)}
        check_round_trip(full, place, 4 * len(full))


def check_round_trip(counts: Counts, place: codec.Place, payload_bytes: int, dense: bool = True) -> None:
    quanta = quanta_of(counts)
    message = codec.encode(quanta, place)
    assert message.numel() == 40 + (min(payload_bytes, place.num_elements) if dense else payload_bytes)
    decoded = codec.decode(message, place)
    assert torch.equal(decoded.indices, quanta.indices)
    assert torch.equal(decoded.counts, quanta.counts)


@pytest.mark.parametrize(
    "counts", [{}, {3: -1}, {3: 1000, 4: -1}, {index: 1 if index % 2 else -1 for index in range(40)}], ids=str
)
def test_any_altered_byte_or_missing_end_is_noticed(counts: Counts) -> None:
    message = codec.encode(quanta_of(counts), PLACE)
    for position in range(message.numel()):
        for flip in (1, 128, 255):
            altered = message.clone()
            altered[position] ^= flip
            with pytest.raises(ValueError):
                codec.decode(altered, PLACE)
        with pytest.raises(ValueError):
            codec.decode(message[:position], PLACE)


@pytest.mark.parametrize(
    "change",
    [{"step": 8}, {"bucket": 0}, {"threshold": 0.5}, {"rates_checksum": 9}, {"num_elements": 3}],
    ids=str,
)
def test_a_message_from_another_place_is_refused(change: dict[str, float]) -> None:
    message = codec.encode(quanta_of({40: -1}), PLACE)
    with pytest.raises(ValueError):
        codec.decode(message, codec.Place(**{**vars(PLACE), **change}))  # type: ignore[arg-type]
