"""`--dry-run` tells the settings of a training: one that is changed changes what is told of the training."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teacherstudent.config import load
from teacherstudent.dry_run import describe
from teacherstudent.training.schedule import Plan

SMOKE = Path(__file__).parent.parent / "examples/smoke/smoke.toml"


def told(*settings: str, student: str = "gtc") -> str:
    """Of the student, without the page of settings before it."""
    page = describe(load(SMOKE, [*settings, f"student.only={student}"]), "student")
    return page[page.index(f"\n\nstudent {student}\n") :]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("student.network.output_delay_frames=2", "output delay 2 frames"),
        ("student.network.dropout=0.3", "dropout 0.3"),
        ("student.network.normalisation=speaker", "speaker normalisation"),
        ("student.optimisation.codec=words", "words messages"),
        ("student.schedule.held_out_utterances=7", "also on 7 machine-labelled utterances"),
        ("student.schedule.machine_shards=3", "machine-labelled from the first 3 shards alone"),
        ("student.schedule.stop_after_validations=2", "stops after 2 without a lower frame error"),
        ("student.loss.label_smoothing=0.1", "cross-entropy with the label, 0.1 of it for all senones alike"),
        ("student.loss.kept=5", "the best 5 of 20 stored posteriors, renormalised"),
        ("student.loss.tail=true", "the best 20 of 20 stored posteriors, what they lack as one more class"),
        ("student.loss.temperature=2.0", "renormalised, temperature 2"),
        ("student.loss.confidence=highest", "frames weighed by the teacher's highest posterior"),
        ("student.loss.confidence=kept", "frames weighed by the teacher's sum of the kept"),
        ("student.loss.confidence_floor=0.5", "none of frames whose highest is below 0.5"),
        ("student.optimisation.chunk_frames=40", "pieces of 40 frames"),
        ("student.optimisation.numeric_mode=bf16", "numeric mode bf16"),
        ("student.optimisation.clip_norm=0.5", "gradient clipped to norm 0.5"),
        ("student.optimisation.momentum=0.8", "momentum 0.8"),
        ("student.optimisation.masking.frequency_masks=2", "2 masks of up to 12 mel bands"),
        ("student.optimisation.masking.time_masks=2", "2 masks of up to 23 frames and 20 % of the utterance"),
        (
            "student.optimisation.exact_steps=9",
            "method      gtc: density 0.1, multi-quantum, after 9 exact steps",
        ),
        ("student.optimisation.ramp_steps=9", "density 0.1, reached from 1e-2 in 9 steps, multi-quantum"),
        ("student.variants.gtc.optimisation.momentum_correction=true", "momentum 0.9 before compression"),
    ],
)
def test_a_setting_is_told(setting: str, text: str) -> None:
    assert text in told(setting)
    assert text not in told()


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("block_steps=8", "blocks of 8 steps, block momentum 0.5 with so many workers"),
        ("block_momentum=0.75", "block momentum 0.75, keep local state"),
        ("local_state=average", "average local state"),
        ("wire=int8", "int8 updates"),
    ],
)
def test_a_setting_of_bmuf_is_told(setting: str, text: str) -> None:
    assert text in told(f"student.variants.bmuf.optimisation.{setting}", student="bmuf")
    assert text not in told(student="bmuf")


def test_two_tiers_tell_their_groups_and_the_block_momentum_across_them() -> None:
    settings = ["method=two-tiers", "group_size=2", "density=0.01"]
    words = [f"student.variants.bmuf.optimisation.{setting}" for setting in settings]
    text = told(*words, "student.variants.bmuf.workers=8", student="bmuf")
    assert "two-tiers: groups of 2 by gtc, density 0.01; blocks of 5 steps, block momentum 0.75 with" in text
    odd = told(*words, "student.variants.bmuf.workers=3", student="bmuf")
    assert "density 0.01 (an error with 3 workers: 2 has to divide their number); blocks" in odd
    assert "block momentum by their number" in odd
    one = told(*words, "student.variants.bmuf.optimisation.group_size=1", student="bmuf")
    assert "two-tiers: groups of 1, which is bmuf; blocks of 5 steps" in one


def test_masks_of_one_source_are_told_as_such() -> None:
    masking = "student.optimisation.masking"
    assert "masks on human-labelled alone" in told(f"{masking}.time_masks=1", f"{masking}.sources=['human']")
    assert "masks on" not in told(f"{masking}.time_masks=1")
    unused = told(f"{masking}.time_masks=1", f"{masking}.sources=['machine']", student="human-only")
    assert "masks on machine-labelled alone: not here, where none is trained on" in unused


@pytest.mark.parametrize("setting", ["held_out_utterances=7", "machine_shards=3"])
def test_what_human_labels_alone_do_not_use_is_told(setting: str) -> None:
    assert "not here, where none is trained on" in told(f"student.schedule.{setting}", student="human-only")
    assert "machine:" not in told(student="human-only")


def test_a_share_of_posteriors_on_human_labels_is_told() -> None:
    text = told("student.loss.soft_share=0.3", "label.human=true")
    assert "with the label; 30 % with the best 20 of 20 stored posteriors, renormalised; machine: " in text


def test_all_stored_posteriors_are_told_as_all() -> None:
    config = load(SMOKE)
    every: Any = replace(config, label=replace(config.label, k=0))
    assert "machine: cross-entropy with all posteriors, renormalised" in describe(every, "student")


@pytest.mark.parametrize("source", ["human", "machine"])
@pytest.mark.parametrize(
    "changed",
    [
        "final_learning_rate_ratio=1e-3 warmup_steps=37",  # so fast that no column begins at the warm-up's end
        "final_learning_rate_ratio=1e-9 warmup_steps=400",  # the highest is within the warm-up
        "decay=sub-epoch final_learning_rate_ratio=0.02 validate_every_steps=30 warmup_steps=31",
        "mode=sequential warmup_steps=5",
    ],
)
def test_the_chart_names_the_highest_rate_of_all_steps(source: str, changed: str) -> None:
    settings = [f"student.variants.gtc.schedule.{setting}" for setting in changed.split()]
    gtc = load(SMOKE, settings).student_variants()["gtc"]
    plan = Plan(gtc.schedule, gtc.optimisation.learning_rate)
    rates = [part.learning_rate for step in plan for part in step.portions if part.source == source]
    [label] = re.findall(rf"^ +{source} +(\S+) +│", told(*settings), re.MULTILINE)
    assert label == f"{max(rates):.3g}"


def test_a_source_whose_turn_never_comes_is_drawn_empty() -> None:
    schedule = "student.variants.gtc.schedule"
    text = told(f"{schedule}.steps=2", f"{schedule}.warmup_steps=0")
    assert "human   0 " in text
    assert "machine 1.5 " in text
    assert "machine 2 steps" in text
