"""averaged.pt is the mean of just the models that it names."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.training import model_average
from teacherstudent.training.model_average import Validated


def state(step: int, values: torch.Tensor) -> dict:
    return {"format": 1, "provenance": {"step": step, "seed": 3}, "weights": {"w": values}}


@settings(max_examples=50, deadline=None)
@given(
    errors=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=12), number=st.integers(0, 5)
)
def test_choosing_after_every_validation_is_choosing_among_all_of_them(
    errors: list[float], number: int
) -> None:
    every = [Validated(step, error) for step, error in enumerate(errors)]
    last: list[Validated] = []
    best: list[Validated] = []
    for model in every:
        last = model_average.choose([*last, model], number, "last")
        best = model_average.choose([*best, model], number, "best")
    assert last == every[max(0, len(every) - number) :]
    ranked = sorted(range(len(errors)), key=lambda step: (errors[step], step))
    assert best == [every[step] for step in sorted(ranked[:number])]


def test_the_mean_is_rounded_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1000, generator=generator) for _ in range(7)]
    chosen = [Validated(3 * step, 0.5) for step in range(7)]
    for model, value in zip(chosen, values, strict=True):
        model_average.keep(tmp_path, state(model.step, value))
    mean = model_average.average(tmp_path, chosen)
    assert torch.equal(mean["weights"]["w"], torch.stack(values).double().mean(dim=0).float())
    assert mean["provenance"] == {"step": 18, "seed": 3, "averaged_steps": [0, 3, 6, 9, 12, 15, 18]}


def test_only_models_that_count_no_longer_are_forgotten(tmp_path: Path) -> None:
    for step in (3, 6, 30):
        model_average.keep(tmp_path, state(step, torch.zeros(1)))
    (tmp_path / "step3.rank0.pt").write_bytes(b"")
    model_average.forget_others(tmp_path, [Validated(3, 0.1), Validated(30, 0.1)])
    assert {path.name for path in tmp_path.iterdir()} == {"model3.pt", "model30.pt", "step3.rank0.pt"}


def test_a_missing_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model3\.pt"):
        model_average.average(tmp_path, [Validated(3, 0.1)])
