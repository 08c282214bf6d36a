"""Messages of quanta: they come back as they went, or not at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.distributed import codec
from teacherstudent.distributed.thresholds import threshold_at

PLACE = codec.Place(step=7, bucket=1, num_elements=50, threshold=0.25, rates_checksum=123)


def quanta_of(signs: dict[int, bool]) -> codec.Quanta:
    indices = sorted(signs)
    return codec.Quanta(
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor([signs[index] for index in indices], dtype=torch.bool),
    )


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 49), st.booleans()))
def test_decoding_a_message_gives_back_what_was_encoded(signs: dict[int, bool]) -> None:
    check_round_trip(signs, PLACE)


@pytest.mark.parametrize("num_elements", [1, 50, 2**31 - 1])
def test_empty_full_single_and_last_element_messages_come_back(num_elements: int) -> None:
    place = codec.Place(2**40, 65535, num_elements, threshold_at(-300), 2**32 - 1)
    for signs in ({}, {0: True}, {num_elements - 1: False}, {num_elements - 1: True}):
        check_round_trip(signs, place)
    if num_elements < 100:
        check_round_trip({index: index % 3 == 0 for index in range(num_elements)}, place)


def check_round_trip(signs: dict[int, bool], place: codec.Place) -> None:
    quanta = quanta_of(signs)
    message = codec.encode(quanta, place)
    assert message.numel() == 40 + min(4 * len(signs), place.num_elements)
    decoded = codec.decode(message, place)
    assert torch.equal(decoded.indices, quanta.indices)
    assert torch.equal(decoded.negative, quanta.negative)


@pytest.mark.parametrize("signs", [{}, {3: True}, {index: index % 2 == 0 for index in range(40)}], ids=len)
def test_any_altered_byte_or_missing_end_is_noticed(signs: dict[int, bool]) -> None:
    message = codec.encode(quanta_of(signs), PLACE)
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
    message = codec.encode(quanta_of({40: True}), PLACE)
    with pytest.raises(ValueError):
        codec.decode(message, codec.Place(**{**vars(PLACE), **change}))  # type: ignore[arg-type]
