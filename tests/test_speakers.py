from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.synthesis.speakers import ACCENTS, PITCHES, RATES, VARIANTS, draw_speakers

DATA = Path(import_module("espeakng_loader").get_data_path())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 1000))
def test_speakers_are_distinct_and_every_part_has_as_many_as_asked_for(counts: list[int], split: int) -> None:
    parts = {f"part{index}": count for index, count in enumerate(counts)}
    speakers = draw_speakers(parts, split)
    assert [sum(speaker.part == part for speaker in speakers) for part in parts] == counts
    assert len({(who.variant, who.accent, who.rate, who.pitch) for who in speakers}) == sum(counts)
    assert len({who.id for who in speakers}) == sum(counts)
    assert all(who.rate in RATES and who.pitch in PITCHES for who in speakers)


def test_the_split_alone_decides_who_speaks() -> None:
    counts = {"human": 3, "test": 5}
    assert draw_speakers(counts, 1) == draw_speakers(counts, 1)
    assert draw_speakers(counts, 1) != draw_speakers(counts, 2)


def test_variants_and_accents_come_again_only_when_all_have_come() -> None:
    speakers = draw_speakers({"human": len(VARIANTS)}, 0)
    assert {who.variant for who in speakers} == set(VARIANTS)
    assert {who.accent for who in speakers[: len(ACCENTS)]} == set(ACCENTS)


def test_more_speakers_than_there_can_be_are_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        draw_speakers({"human": 10**6}, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_in_the_wheel_and_without_breath(variant: str) -> None:
    lines = (DATA / "voices" / "!v" / variant).read_text(errors="replace").splitlines()
    assert not any(line.strip().startswith("breath") for line in lines)
