"""The acoustic model: stacked LSTM layers and one linear layer to the senones.

# B batch, T frames, F features, C cells, D directions, S senones
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from teacherstudent.data.features import Normalisation
from teacherstudent.training.lstm import State, run_in_bfloat16
from teacherstudent.training_settings import LEAST_CHUNK_FRAMES, Network


class AcousticModel(nn.Module):
    """Log-mel features to senone logits.

    Teacher: bidirectional. Student: unidirectional, with an output delay of d frames: what it says of frame t it
    says after hearing frame t + d. The delay is undone inside, so that row t of the output always speaks of frame
    t of the input, in training, labelling and decoding alike. The normalisation is part of the model.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: Network, num_senones: int, normalisation: Normalisation) -> None:
        super().__init__()
        self.network, self.num_senones = network, num_senones
        self.register_buffer("mean", torch.from_numpy(normalisation.mean.copy()))
        self.register_buffer("deviation", torch.from_numpy(normalisation.deviation.copy()))
        directions = 2 if network.bidirectional else 1
        sizes = [len(normalisation.mean)] + [network.cells * directions] * (network.layers - 1)
        self.layers = nn.ModuleList(Layer(size, network.cells, directions) for size in sizes)
        self.output = nn.Linear(network.cells * directions, num_senones)

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        noise: torch.Generator | None = None,
        bfloat16: bool = False,
    ) -> Tensor:
        """(B, T, F), (B,) lengths in descending order -> (B, T, S) logits; rows beyond a length are undefined.

        noise: draws the dropout masks while training; without it there is no dropout. bfloat16: the LSTM layers'
        products are of bfloat16 (lstm.py).
        """
        return self._judge(self.encode(features, lengths, noise, bfloat16))

    def encode(
        self,
        features: Tensor,
        lengths: Tensor,
        noise: torch.Generator | None = None,
        bfloat16: bool = False,
    ) -> Tensor:
        """As forward, but for the output layer: (B, T, C * D), in the type of the LSTM layers' weights."""
        heard, masks = self._hear(features, lengths), self._draw_masks(features, noise)
        hidden, _ = self._pass(heard, lengths, masks, self._begin(), bfloat16)
        return hidden[:, self.network.output_delay_frames :]

    def chunks(
        self,
        features: Tensor,
        lengths: Tensor,
        chunk_frames: int,
        noise: torch.Generator | None = None,
        bfloat16: bool = False,
    ) -> Iterator[tuple[slice, Tensor]]:
        """As forward, a chunk of frames at a time: (which frames, their logits), in order.

        The layers' states are carried from chunk to chunk, and no gradient passes there (truncated back-propagation
        through time, Williams & Peng 1990). What one chunk needs for its backward pass is free when that is done.
        In fp32 the logits are those of forward, bit for bit (see divide). Raises ValueError for a bidirectional
        network, whose backward half begins with the last frame.
        """
        if self.network.bidirectional:
            raise ValueError(
                f"chunk_frames = {chunk_frames}: it must be 0 for a bidirectional network, which has to hear the "
                "whole utterance before it can say anything of its first frame"
            )
        heard, masks, states = self._hear(features, lengths), self._draw_masks(features, noise), self._begin()
        begin, delay = 0, self.network.output_delay_frames
        for start, stop in divide(features.shape[1], chunk_frames):
            hidden, states = self._pass(heard[:, begin : stop + delay], lengths, masks, states, bfloat16)
            yield slice(start, stop), self._judge(hidden[:, start + delay - begin :])
            begin = stop + delay

    def _hear(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Normalised, and with the last frame repeated for as long as the output is delayed: (B, T + delay, F)."""
        normalised = (features.to(self.mean.dtype) - self.mean) / self.deviation
        delay = self.network.output_delay_frames
        return _repeat_last(normalised, lengths, delay) if delay else normalised

    def _begin(self) -> list[State | None]:
        """The layers' states before the first frame."""
        return [None for _ in self.layers]

    def _pass(
        self, hidden: Tensor, lengths: Tensor, masks: list[Tensor], states: list[State | None], bfloat16: bool
    ) -> tuple[Tensor, list[State | None]]:
        """Through the LSTM layers: (B, T, F) -> (B, T, C * D), and the states after it."""
        after = []
        for index, layer in enumerate(self.layers):
            if index and masks:
                hidden = hidden * masks[index - 1]
            hidden, state = layer(hidden, lengths, states[index], bfloat16)
            after.append(state)
        return hidden, after

    def _judge(self, hidden: Tensor) -> Tensor:
        """The output layer: (B, T, C * D) -> (B, T, S)."""
        return self.output(hidden.to(self.output.weight.dtype))

    def _draw_masks(self, features: Tensor, noise: torch.Generator | None) -> list[Tensor]:
        """For what goes into every layer but the first: one mask an utterance, the same for all its frames (Gal &
        Ghahramani 2016).
        """
        if noise is None or not self.network.dropout:
            return []
        keep, weight = 1 - self.network.dropout, self.output.weight
        shape = (features.shape[0], 1, weight.shape[1])
        drawn = [torch.rand(shape, generator=noise, device=noise.device) for _ in self.layers[1:]]
        return [(mask < keep).to(weight) / keep for mask in drawn]


class Layer(nn.Module):
    """One LSTM a direction; the backward one reads each utterance from its own end.

    Padding stands at the end, where neither has anything left to say. Sequences packed by torch would do the same,
    but train several times slower on a CPU.
    """

    def __init__(self, num_inputs: int, num_cells: int, directions: int) -> None:
        super().__init__()
        self.directions = nn.ModuleList(
            nn.LSTM(num_inputs, num_cells, batch_first=True) for _ in range(directions)
        )

    def forward(
        self, hidden: Tensor, lengths: Tensor, state: State | None = None, bfloat16: bool = False
    ) -> tuple[Tensor, State]:
        """(B, T, inputs) -> (B, T, C * directions), and the state of the forward direction, without its history."""
        run = run_in_bfloat16 if bfloat16 else _run
        forwards, *backwards = cast(list[nn.LSTM], self.directions)
        output, after = run(forwards, hidden, state)
        if backwards:
            reversed_output, _ = run(backwards[0], _reverse(hidden, lengths), None)
            output = torch.cat([output, _reverse(reversed_output, lengths)], dim=2)
        return output, after


def _run(lstm: nn.LSTM, hidden: Tensor, state: State | None) -> tuple[Tensor, State]:
    """As run_in_bfloat16, in the type of the weights."""
    output, (last, cells) = lstm(hidden.to(next(lstm.parameters()).dtype), state)
    return output, (last.detach(), cells.detach())


def divide(num_frames: int, chunk_frames: int) -> list[tuple[int, int]]:
    """(start, stop) of each chunk. A rest of fewer than LEAST_CHUNK_FRAMES joins the chunk before it.

    For a product of very few rows (three and fewer, with one thread; nine, with two) MKL takes another way, and the
    last bits are others: so no chunk is that short, unless the utterance is. That holds from some 100
    senones on: for 11, MKL's way changes with larger numbers of rows too. The LSTM layers' never does.
    """
    starts = list(range(0, max(1, num_frames - LEAST_CHUNK_FRAMES + 1), chunk_frames))
    return list(zip(starts, [*starts[1:], num_frames]))


def _reverse(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, F): each utterance back to front; its padding stays where it is."""
    frames = torch.arange(hidden.shape[1], device=hidden.device)
    mirrored = lengths.to(hidden.device)[:, None] - 1 - frames
    frames = torch.where(mirrored >= 0, mirrored, frames)
    return hidden.gather(1, frames[:, :, None].expand(-1, -1, hidden.shape[2]))


def _repeat_last(hidden: Tensor, lengths: Tensor, delay: int) -> Tensor:
    """(B, T, F) -> (B, T + delay, F): each utterance's own last frame follows it, whatever padding stood there."""
    frames = torch.arange(hidden.shape[1] + delay, device=hidden.device)
    frames = torch.minimum(frames, lengths.to(hidden.device)[:, None] - 1)
    return hidden.gather(1, frames[:, :, None].expand(-1, -1, hidden.shape[2]))


def build_model(network: Network, num_senones: int, normalisation: Normalisation, seed: int) -> AcousticModel:
    """Initial weights from the seed alone: a generator of its own, since threads share torch's global one.

    Uniform in +-1/sqrt(cells) as in torch.nn.LSTM, with the forget gates' bias at 1 (Jozefowicz et al. 2015).
    """
    model = AcousticModel(network, num_senones, normalisation)
    generator = torch.Generator().manual_seed(seed)
    bound = network.cells**-0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
        for name, parameter in model.named_parameters():
            if "bias_ih" in name:  # torch keeps two biases: the sum is what counts
                parameter[network.cells : 2 * network.cells] = 1.0
            elif "bias_hh" in name:
                parameter.zero_()
    return model


def num_parameters(network: Network, num_senones: int, num_features: int) -> int:
    """Without making the weights: 78 M of them are known at once."""
    blank = np.zeros(num_features, np.float32)
    with torch.device("meta"):
        model = AcousticModel(network, num_senones, Normalisation(blank, blank))
    return sum(parameter.numel() for parameter in model.parameters())


def model_state(model: AcousticModel, provenance: dict[str, Any]) -> dict[str, Any]:
    """All that is needed to build the model again."""
    return {
        "format": 1,
        "network": dataclasses.asdict(model.network),
        "num_senones": model.num_senones,
        "provenance": provenance,
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
    }


def model_from_state(state: dict[str, Any]) -> AcousticModel:
    weights = state["weights"]
    normalisation = Normalisation(weights["mean"].numpy(), weights["deviation"].numpy())
    model = AcousticModel(Network(**state["network"]), state["num_senones"], normalisation)
    model.load_state_dict(weights)
    return model.eval()
