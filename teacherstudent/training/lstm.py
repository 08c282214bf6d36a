"""An LSTM layer whose products are of bfloat16: weights, their gradients and the cells' states stay float32.

On a GPU it is cuDNN's under autocast. On a CPU the one that torch would take (oneDNN's) gains nothing in the backward
pass with fewer than some 30 utterances, since it adds each frame's share to the weights' gradient by itself. Here that
gradient is one product over all frames, and only what has to wait for the frame before is done frame by frame.

# B batch, T frames, F features, C cells; gates of 4 C: input, forget, candidate, output, as in torch
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

State = tuple[Tensor, Tensor]  # output and cells, after the last frame
_FRAMES_WORTH_LAYING_OUT = 16  # the copy takes as long as four products


def run_in_bfloat16(lstm: nn.LSTM, hidden: Tensor, state: State | None) -> tuple[Tensor, State]:
    """(B, T, F) -> (B, T, C) bfloat16: lstm(hidden, state) of one batch-first layer. No gradient enters the state."""
    if hidden.device.type != "cpu":
        with torch.autocast(hidden.device.type, torch.bfloat16):
            output, after = lstm(hidden, state)
        return output, (after[0].detach(), after[1].detach())
    if state is None:
        blank = torch.zeros(hidden.shape[0], lstm.hidden_size)
        state = blank.bfloat16(), blank
    w_input, w_output, b_input, b_output = lstm.parameters()
    frames = hidden.transpose(0, 1).bfloat16().contiguous()
    outputs, output, cells = _BFloat16LSTM.apply(
        frames, *state, w_input.bfloat16(), w_output.bfloat16(), (b_input + b_output).bfloat16()
    )
    return outputs.transpose(0, 1), (output, cells)


class _BFloat16LSTM(torch.autograd.Function):
    """Frames first: (T, B, F) -> (T, B, C), and the state after the last frame."""

    @staticmethod
    def forward(
        ctx: Any,
        frames: Tensor,
        output: Tensor,
        cells: Tensor,
        w_input: Tensor,
        w_output: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_frames, num_utterances, num_cells = *frames.shape[:2], w_output.shape[1]
        gates = linear(frames, w_input, bias)
        recur = lay_out(w_output, num_frames, num_utterances)
        outputs = frames.new_empty(num_frames + 1, num_utterances, num_cells)
        kept = cells.new_empty(num_frames + 1, num_utterances, num_cells)
        outputs[0], kept[0] = output, cells
        for t in range(num_frames):
            opened = recur(outputs[t]).float().add_(gates[t])
            i, f, u, o = opened.chunk(4, dim=1)
            candidate = _tanh(u)
            opened.sigmoid_()
            u.copy_(candidate)
            torch.mul(f, kept[t], out=kept[t + 1]).addcmul_(i, u)
            outputs[t + 1] = _tanh(kept[t + 1]).mul_(o)
            gates[t] = opened  # what the backward pass needs of them
        ctx.save_for_backward(frames, outputs, kept, gates, w_input, w_output)
        state = outputs[-1].clone(), kept[-1].clone()
        ctx.mark_non_differentiable(*state)
        return outputs[1:], *state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        frames, outputs, kept, gates, w_input, w_output = ctx.saved_tensors
        slopes = _open_gates(upstream[0], kept, gates, w_output.t().contiguous()).flatten(0, 1)
        into_frames = (slopes @ w_input).view_as(frames) if ctx.needs_input_grad[0] else None
        into_w_input = slopes.t() @ frames.flatten(0, 1)
        into_w_output = slopes.t() @ outputs[:-1].flatten(0, 1)
        return into_frames, None, None, into_w_input, into_w_output, slopes.sum(0)


def _open_gates(upstream: Tensor, kept: Tensor, gates: Tensor, w_output: Tensor) -> Tensor:
    """The loss's slope in the gates before their non-linearities, (T, B, 4 C) bfloat16; w_output (C, 4 C).

    Kept are the cells before every frame and after the last one.
    """
    slopes = torch.empty_like(gates)
    slope = torch.empty_like(gates[0], dtype=kept.dtype)
    di, df, du, do = slope.chunk(4, dim=1)
    into_cells = torch.zeros_like(kept[0])
    recur = lay_out(w_output, len(gates), gates.shape[1])
    for t in reversed(range(len(gates))):
        i, f, u, o = gates[t].float().chunk(4, dim=1)
        into_output = upstream[t].float()
        if t + 1 < len(gates):
            into_output = recur(slopes[t + 1]).add_(upstream[t]).float()
        squashed = _tanh(kept[t + 1])
        torch.mul(into_output, squashed, out=do).mul_(o).mul_(1 - o)
        into_cells.addcmul_(into_output * o, 1 - squashed * squashed)
        torch.mul(into_cells, u, out=di).mul_(i).mul_(1 - i)
        torch.mul(into_cells, kept[t], out=df).mul_(f).mul_(1 - f)
        torch.mul(into_cells, i, out=du).mul_(1 - u * u)
        into_cells.mul_(f)
        slopes[t] = slope
    return slopes


def lay_out(weights: Tensor, num_frames: int, num_rows: int) -> Callable[[Tensor], Tensor]:
    """The function (num_rows, I) -> (num_rows, O) of weights (O, I) that linear is, to be called num_frames times.

    For every product oneDNN copies the weights into an order of its own, which for few rows takes a third of the time.
    Where torch has the operators with which its compiler does that once, it is done once. They are not documented, and
    another version may lack them: it is slower then, nothing else.
    """
    operators = torch.ops.mkldnn
    if num_frames < _FRAMES_WORTH_LAYING_OUT or not hasattr(operators, "_reorder_linear_weight"):
        return partial(linear, weight=weights)
    ordered = operators._reorder_linear_weight(weights, num_rows)
    return lambda rows: operators._linear_pointwise(rows, ordered, None, "none", [], "")


def _tanh(values: Tensor) -> Tensor:
    """By way of the logistic function: on a CPU torch's own takes four times as long."""
    return torch.sigmoid(2 * values).mul_(2).sub_(1)
