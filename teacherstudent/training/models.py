"""The acoustic model: stacked LSTM layers and one linear layer to the senones.

# B batch, T frames, F features, C cells, D directions, S senones
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teacherstudent.config import Network
from teacherstudent.data.features import Normalisation


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

    def forward(self, features: Tensor, lengths: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """(B, T, F), (B,) lengths in descending order -> (B, T, S) logits; rows beyond a length are undefined.

        noise: draws the dropout masks while training; without it there is no dropout.
        """
        return self.output(self.encode(features, lengths, noise).to(self.output.weight.dtype))

    def encode(self, features: Tensor, lengths: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """As forward, but for the output layer: (B, T, C * D), in the type of the LSTM layers' weights."""
        hidden = (features.to(self.mean.dtype) - self.mean) / self.deviation
        delay = self.network.output_delay_frames
        if delay:
            hidden = _repeat_last(hidden, lengths, delay)
        for index, layer in enumerate(self.layers):
            if index and noise is not None and self.network.dropout:
                hidden = hidden * self._mask(hidden, noise)
            hidden = layer(hidden, lengths)
        return hidden[:, delay:]

    def _mask(self, hidden: Tensor, noise: torch.Generator) -> Tensor:
        """One mask an utterance, the same for all its frames (Gal & Ghahramani 2016)."""
        keep = 1 - self.network.dropout
        shape = (hidden.shape[0], 1, hidden.shape[2])
        return (torch.rand(shape, generator=noise, device=noise.device) < keep).to(hidden) / keep


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

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, inputs) -> (B, T, C * directions)."""
        hidden = hidden.to(next(self.parameters()).dtype)
        outputs = [self.directions[0](hidden)[0]]
        if len(self.directions) == 2:
            backwards = self.directions[1](_reverse(hidden, lengths))[0]
            outputs.append(_reverse(backwards, lengths))
        return torch.cat(outputs, dim=2)


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
