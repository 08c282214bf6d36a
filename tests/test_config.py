"""Settings: defaults < file < override, and every mistake is answered with what would have been right."""

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent import cli
from teacherstudent.config import Config, Decode, load, to_toml
from teacherstudent.settings import flatten


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "conf.toml"
    path.write_text("")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as refused:
        load(path, overrides)
    return str(refused.value)


def test_an_empty_file_gives_the_defaults(toml: Path) -> None:
    assert load(toml) == Config()


def test_the_file_goes_before_the_default_and_the_override_before_the_file(toml: Path) -> None:
    toml.write_text("seed = 1\n[teacher.schedule]\nsteps = 7\nwarmup_steps = 3\n")
    config = load(toml, ["seed=4", "seed=2", "teacher.schedule.steps=8"])  # of two the last
    assert (config.seed, config.teacher.schedule.steps) == (2, 8)
    assert config.teacher.schedule.warmup_steps == 3  # the file's
    assert config.teacher.schedule.human_turn_steps == 1  # the default


def test_a_section_of_the_file_keeps_the_defaults_of_its_own_place(toml: Path) -> None:
    toml.write_text("[teacher.network]\nlayers = 2\n[student.network]\nlayers = 2\n")
    config = load(toml)
    assert (config.teacher.network.bidirectional, config.teacher.network.output_delay_frames) == (True, 0)
    assert (config.student.network.bidirectional, config.student.network.output_delay_frames) == (False, 4)


@pytest.mark.parametrize("text, value", [("a/b", "a/b"), ("'7'", "7"), ("", ""), ("a=b", "a=b")])
def test_an_override_is_a_toml_value_or_plain_text(toml: Path, text: str, value: str) -> None:
    assert load(toml, [f"data.folder={text}"]).data.folder == value


@pytest.mark.parametrize(
    "override, unknown, nearest",
    [
        ("sead=1", "sead", "seed"),
        ("teecher.network.layers=1", "teecher", "teacher"),
        ("teacher.network.layer=1", "teacher.network.layer", "layers"),
        ("student.variants.a.schedule.stpes=1", "student.variants.a.schedule.stpes", "steps"),
        ("student.variants.a.netwrk.cells=1", "student.variants.a.netwrk", "network"),
    ],
)
def test_an_unknown_key_at_any_depth_names_the_nearest(
    toml: Path, override: str, unknown: str, nearest: str
) -> None:
    message = refusal(toml, override)
    assert f"unknown setting {unknown!r}; the nearest in" in message
    assert message.endswith(repr(nearest))


def test_the_readme_has_a_whole_experiment_of_ones_own_data(toml: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    toml.write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    config = load(toml)
    assert (config.data.folder, config.align.source) == ("mydata", "transcripts")


@pytest.mark.parametrize(
    "override, places",
    [
        ("network.normalisation=causal", "teacher.network, student.network"),
        ("teacher.steps=1", "teacher.schedule.steps"),
        ("jobs=1", "corpus.jobs, features.jobs, align.jobs, senones.jobs, decode.jobs"),
    ],
)
def test_a_key_of_another_section_is_answered_with_where_it_is(
    toml: Path, override: str, places: str
) -> None:
    assert refusal(toml, override).endswith(f"; there is {places}")


@pytest.mark.parametrize(
    "override, needed",
    [
        ("student.schedule.steps=-1", ">= 1"),
        ("decode.beam=-1", "> 0, and finite"),
        ("align.states=0", "in [1, 9]"),
    ],
)
def test_a_number_out_of_range_is_answered_with_the_range(toml: Path, override: str, needed: str) -> None:
    assert refusal(toml, override).endswith(f": it must be {needed}")


def test_a_key_like_no_other_is_answered_with_all_of_its_section(toml: Path) -> None:
    assert "[label] knows batch_frames, chunk_frames, coding" in refusal(toml, "label.zzzzzz=1")


@pytest.mark.parametrize(
    "override, needed",
    [
        ("seed=1.5", "a whole number"),
        ("seed=true", "a whole number"),
        ("teacher.optimisation.learning_rate=fast", "a number"),
        ("teacher.optimisation.learning_rate=true", "a number"),
        ("teacher.optimisation.learning_rate=nan", "a number"),
        ("teacher.network.bidirectional=1", "true or false"),
        ("data.folder=3", "text"),
        ("student.variants=3", "a table"),
        ("student.variants.a=3", "a table"),
        ("corpus.snr_db=10", "a list"),
        ("corpus.snr_db=['loud']", "a number"),
        (
            "teacher.schedule.mode=humanonly",
            "'interleaved', 'sequential', 'mixed', 'human-only', 'machine-only'",
        ),
        ("features.sampling_rate=44100", "8000, 16000"),
        ("features.sampling_rate=16000.0", "8000, 16000"),
        ("teacher=3", "a section"),
        ("seed.x=3", "a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_name_and_what_is_needed(
    toml: Path, override: str, needed: str
) -> None:
    name = override.partition("=")[0]
    message = refusal(toml, override)
    assert name.removesuffix(".x") in message
    assert needed in message


def test_a_whole_number_is_a_number(toml: Path) -> None:
    config = load(toml, ["corpus.snr_db=[5, 10.5]", "student.optimisation.block_momentum=0"])
    assert config.corpus.snr_db == (5.0, 10.5)
    assert type(config.student.optimisation.block_momentum) is float


def test_an_override_without_name_or_value_is_shown_how_one_looks(toml: Path) -> None:
    assert "section.key=value" in refusal(toml, "seed")
    assert "section.key=value" in refusal(toml, "=1")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):  # a folder is no file
        assert f"no configuration at {path}:" in refusal(path)


def test_what_is_not_toml_is_said_to_be_so(toml: Path) -> None:
    for contents in (b"seed: 1\n", b"seed = 1\nseed = 2\n", b"\xff\xfe"):
        toml.write_bytes(contents)
        assert f"{toml} is not TOML" in refusal(toml)


def test_variants_start_from_the_student_and_change_only_what_they_name(toml: Path) -> None:
    toml.write_text(
        "[student.schedule]\nsteps = 9\n[student.variants.a.schedule]\nmode = 'human-only'\n"
        "[student.variants.b.optimisation]\nmethod = 'bmuf'\n"
    )
    variants = load(toml, ["student.variants.b.schedule.steps=5"]).student_variants()
    assert list(variants) == ["a", "b"]
    assert (variants["a"].schedule.mode, variants["a"].schedule.steps) == ("human-only", 9)
    assert (variants["b"].schedule.mode, variants["b"].schedule.steps) == ("interleaved", 5)
    assert (variants["a"].optimisation.method, variants["b"].optimisation.method) == ("gtc", "bmuf")
    assert Config().student_variants() == {"student": Config().student}


def test_a_variant_has_no_variants_of_its_own(toml: Path) -> None:
    for key, value in (("variants", "{b = {}}"), ("only", "'a'")):
        assert f"'student.variants.a.{key}'" in refusal(toml, f"student.variants.a.{key}={value}")


def test_a_variant_whose_name_is_no_folder_is_refused(toml: Path) -> None:
    for name in ("", "a b", "../a", "/a", ".a"):
        toml.write_text(f'[student.variants."{name}"]\n')
        assert "letters, digits" in refusal(toml)


def test_an_unknown_student_is_refused_with_those_there_are(toml: Path) -> None:
    toml.write_text("[student.variants.a]\n[student.variants.b]\n")
    assert load(toml, ["student.only=b"]).student.only == "b"
    assert "are a, b" in refusal(toml, "student.only=c")


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    folder=st.text(st.characters(exclude_categories=["Cs"])),
    scales=st.lists(st.floats(0, exclude_min=True, allow_infinity=False), min_size=1),
    momentum=st.none() | st.floats(0, 1, exclude_max=True),
)
def test_the_resolved_configuration_reloads_to_itself(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    folder: str,
    scales: list[float],
    momentum: float | None,
) -> None:
    default = Config()
    config = dataclasses.replace(
        default,
        seed=seed,
        data=dataclasses.replace(default.data, folder=folder),
        decode=Decode(acoustic_scales=tuple(scales)),
        student=dataclasses.replace(
            default.student,
            variants={"a": {"schedule": {"mode": "human-only"}}, "b": {}},
            optimisation=dataclasses.replace(default.student.optimisation, block_momentum=momentum),
        ),
    )
    path = tmp_path_factory.mktemp("resolved") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load(path) == config


def test_settings_of_where_and_how_fast_are_not_in_the_resolved_configuration(toml: Path) -> None:
    jobs = [f"{section}.jobs=9" for section in ("corpus", "features", "decode")]
    config = load(toml, ["folder=x", "student.only=student", "distributed.timeout_seconds=9", *jobs])
    assert config != load(toml)
    assert to_toml(config) == to_toml(load(toml))


def test_flattening_keeps_every_table_also_an_empty_one() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


def test_overrides_may_follow_an_option(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["teacher", str(toml), "--dry-run", "seed=77"]) == 0
    assert "seed = 77" in capsys.readouterr().out


@pytest.mark.parametrize(
    "setting",
    [
        "teacher.optimisation.clip_norm=-1.0",
        "teacher.optimisation.clip_norm=0.0",
        "student.optimisation.density=7.0",
        "student.optimisation.block_steps=0",
        "student.optimisation.block_momentum=1.0",
        "student.optimisation.learning_rate=0.0",
        "label.k=-1",
        "student.loss.label_smoothing=1.0",
        "student.loss.kept=21",  # label.k is 20
        "student.loss.temperature=0.0",
        "student.loss.confidence=sum",
        "student.loss.confidence_floor=1.1",
        "student.loss.soft_share=0.5",  # without label.human
        "student.variants.a.loss.kept=21",
        "label.numeric_mode=fp16",
        "label.chunk_frames=0",
        "label.max_bad_share=1.5",
        "label.lease_seconds=0",
        "conditions.redraw=true",  # nothing to draw from
        "decode.acoustic_scales=[]",
        "decode.bootstrap_samples=0",
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_runs(toml: Path, setting: str) -> None:
    toml.write_text("")
    name, _, _ = setting.partition("=")
    message = refusal(toml, setting)
    assert name.rsplit(".", maxsplit=1)[-1] in message
    assert "must be" in message


def test_a_loss_that_contradicts_itself_or_the_label_step_is_refused(toml: Path) -> None:
    tempered = refusal(toml, "student.loss.tail=true", "student.loss.temperature=2")
    assert "student.loss.temperature = 2.0: it must be 1, since loss.tail = true" in tempered
    kept = refusal(toml, "label.k=5", "student.variants.few.loss.kept=6")
    assert "student.variants.few.loss.kept = 6: it must be at most label.k, which is 5" in kept
    share = refusal(toml, "student.loss.soft_share=0.3")
    assert "student.loss.soft_share = 0.3: it must be 0, unless label.human = true" in share
    assert "unknown setting 'teacher.loss.kept'" in refusal(toml, "teacher.loss.kept=5")  # it has labels only
    load(toml, ["student.loss.soft_share=0.3", "label.human=true"])
    load(toml, ["student.loss.soft_share=0.3", "student.schedule.mode=machine-only"])
    load(toml, ["student.loss.kept=300", "label.k=0"])  # how many all are is known to the label step


def test_a_teacher_learns_from_human_labels_alone(toml: Path) -> None:
    refused = refusal(toml, "teacher.schedule.mode=mixed")
    assert "teacher.schedule.mode = 'mixed': it must be 'human-only'" in refused


def test_no_more_models_are_averaged_than_there_are_validations(toml: Path) -> None:
    settings = ["student.variants.a.schedule.steps=10", "student.variants.a.schedule.validate_every_steps=4"]
    load(toml, [*settings, "student.variants.a.schedule.average_models=3"])
    message = refusal(toml, *settings, "student.variants.a.schedule.average_models=4")
    assert "student.variants.a.schedule.average_models = 4: it must be at most 3, the number of" in message


def test_a_training_that_no_validation_could_stop_is_refused(toml: Path) -> None:
    schedule = "student.variants.a.schedule"
    settings = [f"{schedule}.steps=10", f"{schedule}.validate_every_steps=4"]
    load(toml, [*settings, f"{schedule}.stop_after_validations=1"])
    message = refusal(toml, *settings, f"{schedule}.stop_after_validations=2")
    assert (
        f"{schedule}.stop_after_validations = 2: it must be 0, or at least two below 3, the number of"
        in message
    )


def test_masks_that_are_wider_than_the_features_are_refused_before_anything_runs(toml: Path) -> None:
    fewer = "features.num_mels=10"
    load(toml, [fewer])  # there are no masks
    for where in ("teacher", "student", "student.variants.a"):
        message = refusal(toml, fewer, f"{where}.optimisation.masking.frequency_masks=1")
        name = f"{where}.optimisation.masking.frequency_mask_mels"
        assert f"{name} = 12: it must be at most features.num_mels, which is 10" in message


def test_what_is_stored_cannot_be_drawn_anew(toml: Path) -> None:
    toml.write_text('[conditions]\nredraw = true\nnoise_folder = "noises"\n')
    assert "conditions.redraw = True: it must be false, since features.storage = 'stored'" in refusal(
        toml, "seed=1"
    )
    assert load(toml, ["features.storage=on-the-fly"]).conditions.redraw


def test_what_variants_have_of_their_own_is_not_overridden_in_silence(toml: Path) -> None:
    toml.write_text(
        "[student.optimisation]\nbatch_frames = 7\n"
        "[student.variants.a.optimisation]\nlearning_rate = 0.5\n"
        "[student.variants.b.optimisation]\nmomentum = 0.5\n"
    )
    message = refusal(toml, "student.optimisation.learning_rate=0.3")
    assert message.endswith("of their own: say student.variants.a.optimisation.learning_rate")
    own = load(toml, ["student.variants.a.optimisation.learning_rate=0.3"]).student_variants()["a"]
    assert (own.optimisation.learning_rate, own.optimisation.batch_frames) == (0.3, 7)
    rates = load(toml, ["student.optimisation.batch_frames=9", "student.only=a"]).student_variants()
    assert {student.optimisation.batch_frames for student in rates.values()} == {9}
