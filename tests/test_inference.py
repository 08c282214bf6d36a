"""What a network says of an utterance depends on the utterance, not on its company."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelling import KEPT, NUM_FEATURES, NUM_SENONES, TEACHER

from teacherstudent.config import Network
from teacherstudent.data.features import Normalisation
from teacherstudent.posteriors import TopK, top_k
from teacherstudent.training import inference
from teacherstudent.training.inference import (
    Pieces,
    computing,
    find_best,
    has_bfloat16,
    infer,
    plan_batches,
    to_numeric_mode,
)
from teacherstudent.training.models import AcousticModel, build_model

torch.set_num_threads(1)
WHOLE = Pieces(10**6, 0)


@dataclass
class LoadedShard:
    """Of features in memory."""

    path: Path
    arrays: dict[str, dict[str, np.ndarray]]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    @property
    def num_frames(self) -> np.ndarray:
        return np.array([len(arrays["values"]) for arrays in self.arrays.values()], np.int64)

    def __getitem__(self, utterance_id: str) -> dict[str, np.ndarray]:
        return self.arrays[utterance_id]

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        return iter(self.arrays.items())


def make_teacher(network: Network = TEACHER) -> AcousticModel:
    blank = Normalisation(np.zeros(NUM_FEATURES, np.float32), np.full(NUM_FEATURES, 2, np.float32))
    return build_model(network, NUM_SENONES, blank, seed=2).eval()


def make_values(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.normal(size=(length, NUM_FEATURES)).astype("float16") for length in lengths]


@torch.no_grad()
def alone(model: AcousticModel, values: np.ndarray) -> torch.Tensor:
    return model(torch.from_numpy(values.astype(np.float32))[None], torch.tensor([len(values)]))[0]


@pytest.mark.parametrize("batch_frames", [1, 20, 60, 10_000])
def test_inference_in_batches_equals_inference_of_each_utterance_and_keeps_the_order(
    batch_frames: int,
) -> None:
    model, values = make_teacher(), make_values(18, 3, 40, 25, 18)
    shard = LoadedShard(Path("shard"), {str(number): {"values": each} for number, each in enumerate(values)})
    found = list(infer(model, shard, batch_frames))
    assert [name for name, _ in found] == list("01234")
    for (_, logits), each in zip(found, values):
        torch.testing.assert_close(logits, alone(model, each), rtol=1e-4, atol=1e-5)


def test_the_best_of_a_batch_are_those_of_each_utterance_alone() -> None:
    model, values = make_teacher(), make_values(40, 25, 18, 18, 1)
    for best, each in zip(find_best(model, values, KEPT, 1000, WHOLE), values):
        assert isinstance(best, TopK)
        expected = top_k(alone(model, each), KEPT)
        torch.testing.assert_close(best.log_posteriors, expected.log_posteriors, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(best.dropped, expected.dropped, rtol=1e-3, atol=1e-5)
        assert torch.equal(best.ids.long(), expected.ids)


@given(
    lengths=st.lists(st.integers(0, 50), max_size=30),
    batch_frames=st.integers(1, 200),
    chunk_frames=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_has_every_utterance_once_longest_first_and_keeps_the_limits(
    lengths: list[int], batch_frames: int, chunk_frames: int
) -> None:
    batches = plan_batches(lengths, batch_frames, chunk_frames)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(order, reverse=True)
    for batch in batches:
        longest = lengths[batch[0]]
        assert len(batch) == 1 or (longest * len(batch) <= batch_frames and longest <= chunk_frames)


@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_pieces_cover_every_frame_once_with_context_wherever_there_is_any(
    num_frames: int, chunk_frames: int, context_frames: int
) -> None:
    pieces = Pieces(chunk_frames, context_frames).divide(num_frames)
    assert [frame for _, start, stop, _ in pieces for frame in range(start, stop)] == list(range(num_frames))
    for first, start, stop, last in pieces:
        assert stop - start <= chunk_frames
        assert start - first == min(context_frames, start)
        assert last - stop == min(context_frames, num_frames - stop)


@pytest.mark.parametrize("batch_frames", [1, 150, 10_000])
def test_a_long_recording_in_pieces_with_enough_context_is_as_it_is_whole(batch_frames: int) -> None:
    model, (values,) = make_teacher(), make_values(333)
    (whole,) = find_best(model, [values], KEPT, batch_frames, WHOLE)
    (divided,) = find_best(model, [values], KEPT, batch_frames, Pieces(50, 40))
    assert isinstance(whole, TopK) and isinstance(divided, TopK)
    assert len(divided.ids) == 333
    torch.testing.assert_close(divided.log_posteriors, whole.log_posteriors, rtol=1e-3, atol=1e-4)


def test_less_context_errs_more_and_only_near_where_the_pieces_meet() -> None:
    model, (values,) = make_teacher(), make_values(400)
    (whole,) = find_best(model, [values], KEPT, 1000, WHOLE)
    assert isinstance(whole, TopK)
    errors = {}
    for context in (0, 2, 8, 32):
        (divided,) = find_best(model, [values], KEPT, 1000, Pieces(100, context))
        assert isinstance(divided, TopK)
        errors[context] = (divided.log_posteriors - whole.log_posteriors).abs().amax(dim=1)
    most = [float(errors[context].max()) for context in errors]
    assert most == sorted(most, reverse=True)
    assert most[0] > 10 * most[-1]
    inside = errors[0].view(4, 100)[:, 40:60]
    assert float(inside.max()) < 0.01 * most[0]


def test_memory_of_a_long_recording_is_that_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    encode = AcousticModel.encode

    def noting(self, features, lengths, noise=None):
        met.append(features.shape[0] * features.shape[1])
        return encode(self, features, lengths, noise)

    monkeypatch.setattr(AcousticModel, "encode", noting)
    find_best(make_teacher(), make_values(2000), KEPT, 300, Pieces(50, 10))
    assert max(met) <= 300


def test_an_output_that_is_not_finite_is_told_of_that_utterance_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, values = make_teacher(), make_values(9, 7, 5)
    values[1][2, 2] = np.nan
    found = find_best(model, values, KEPT, 1000, WHOLE)
    assert found[1] == "the teacher's output is not finite"
    for number in (0, 2):
        best = found[number]
        assert isinstance(best, TopK)
        torch.testing.assert_close(
            best.log_posteriors, top_k(alone(model, values[number]), KEPT).log_posteriors
        )
    long = make_values(90)[0]
    long[70] = np.nan
    assert find_best(model, [long], KEPT, 40, Pieces(30, 5)) == ["the teacher's output is not finite"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags : fpu avx512f amx_bf16\n", True),
        ("Features : fp asimd bf16\n", True),
        ("flags : fpu avx512f avx512_vnni\nbugs : bf16\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_what_the_processor_says_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(inference, "_CPU_INFO", tmp_path / "cpuinfo")
    assert has_bfloat16() is expected
    monkeypatch.setattr(inference, "_CPU_INFO", tmp_path / "none")
    assert not has_bfloat16()


@pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16")
def test_in_bfloat16_normalisation_and_output_layer_stay_float32() -> None:
    model = to_numeric_mode(make_teacher(), "bf16")
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    assert {kind for name, kind in kinds.items() if name.startswith("layers.")} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if not name.startswith("layers.")} == {torch.float32}
    values = make_values(30)[0] + np.float16(
        100
    )  # far from the mean: what is rounded before it is taken off is lost
    shifted = make_teacher()
    shifted.mean += 100
    exact = alone(shifted, values)
    in_bf16 = to_numeric_mode(shifted, "bf16")
    assert alone(in_bf16, values).dtype == torch.float32
    assert (alone(in_bf16, values) - exact).abs().max() < 0.02


def test_the_switch_of_the_process_is_turned_back_by_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with computing("fp32"):
        assert torch.get_float32_matmul_precision() == "highest"
    with computing("bf16"):
        with computing("bf16"):
            pass
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same_as_the_processor() -> None:
    values = make_values(40, 25, 18)
    here = find_best(make_teacher(), values, KEPT, 1000, WHOLE)
    there = find_best(to_numeric_mode(make_teacher(), "fp32", "cuda"), values, KEPT, 1000, WHOLE)
    for first, second in zip(here, there):
        assert isinstance(first, TopK) and isinstance(second, TopK)
        assert second.ids.device.type == "cpu"
        torch.testing.assert_close(first.log_posteriors, second.log_posteriors, rtol=1e-3, atol=1e-3)
