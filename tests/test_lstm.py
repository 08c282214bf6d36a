"""An LSTM layer of bfloat16 products is torch's LSTM, but for the rounding."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from teacherstudent.training import lstm
from teacherstudent.training.lstm import lay_out, run_in_bfloat16

torch.set_num_threads(1)

CELLS, INPUTS = 24, 10


def make_layer(seed: int = 1) -> nn.LSTM:
    """Its weights are numbers that bfloat16 has, so that rounding them changes nothing."""
    layer = nn.LSTM(INPUTS, CELLS, batch_first=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((0.7 * torch.randn(parameter.shape, generator=generator)).bfloat16())
        layer.bias_hh_l0.zero_()
    return layer


def make_batch(num_utterances: int, num_frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_utterances * 100 + num_frames)
    return torch.randn(num_utterances, num_frames, INPUTS, generator=generator).bfloat16().float()


def assert_near(got: Tensor, expected: Tensor, share: float = 0.02) -> None:
    """In the norm; rounding to 8 bits, some products deep, stays below it, a wrong term is far above."""
    assert (got.double() - expected.double()).norm() < share * expected.double().norm()


@pytest.mark.parametrize("num_utterances, num_frames", [(1, 1), (1, 9), (4, 2), (5, 30)])
def test_outputs_state_and_gradients_are_those_of_an_lstm_in_float64(
    num_utterances: int, num_frames: int
) -> None:
    layer, batch = make_layer(), make_batch(num_utterances, num_frames)
    weights = torch.randn(num_utterances, num_frames, CELLS, generator=torch.Generator().manual_seed(2))
    start = [torch.randn(num_utterances, CELLS, generator=torch.Generator().manual_seed(n)) for n in (3, 4)]
    exact, exact_batch = copy.deepcopy(layer).double(), batch.double().requires_grad_()
    exact_state = (start[0].bfloat16().double()[None], start[1].double()[None])
    expected, (last, cells) = exact(exact_batch, exact_state)
    (expected * weights).sum().backward()

    batch.requires_grad_()
    output, state = run_in_bfloat16(layer, batch, (start[0].bfloat16(), start[1]))
    (output * weights).sum().backward()
    assert_near(output, expected)
    assert_near(state[0], last[0])
    assert_near(state[1], cells[0])
    assert_near(batch.grad, exact_batch.grad)
    for parameter, reference in zip(layer.parameters(), exact.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert_near(parameter.grad, reference.grad)


def test_a_layer_without_a_state_starts_from_zero_and_goes_on_where_it_was() -> None:
    layer, batch = make_layer(), make_batch(3, 20)
    whole, last = run_in_bfloat16(layer, batch, None)
    blank = torch.zeros(3, CELLS)
    first, state = run_in_bfloat16(layer, batch[:, :13], (blank.bfloat16(), blank))
    second, end = run_in_bfloat16(layer, batch[:, 13:], state)
    assert_near(torch.cat([first, second], dim=1), whole, share=1e-3)
    assert_near(end[1], last[1], share=1e-3)
    assert end[1].dtype == torch.float32  # what is summed up over hundreds of frames is not rounded to 8 bits


def test_no_gradient_passes_through_the_state() -> None:
    layer, batch = make_layer(), make_batch(2, 8).requires_grad_()
    _, state = run_in_bfloat16(layer, batch, None)
    assert not any(part.requires_grad for part in state)
    later, _ = run_in_bfloat16(layer, batch[:, 4:], state)
    later.sum().backward()
    assert (batch.grad[:, :4] == 0).all()
    assert (batch.grad[:, 4:] != 0).any()


@pytest.mark.parametrize("num_frames", [1, 100])  # never laid out, once
@pytest.mark.parametrize("num_rows", [1, 7, 16])
def test_weights_laid_out_multiply_as_they_do_otherwise(num_frames: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(96, 160, generator=generator).bfloat16()
    product = lay_out(weights, num_frames, num_rows)
    for _ in range(2):
        rows = torch.randn(num_rows, 160, generator=generator).bfloat16()
        assert_near(product(rows), rows.double() @ weights.double().t(), share=0.004)


def test_a_torch_without_the_operators_that_lay_weights_out_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = run_in_bfloat16(make_layer(), make_batch(5, 40), None)
    monkeypatch.setattr(lstm, "torch", SimpleNamespace(**vars(torch) | {"ops": SimpleNamespace(mkldnn=None)}))
    output, _ = run_in_bfloat16(make_layer(), make_batch(5, 40), None)
    assert_near(output, expected)
