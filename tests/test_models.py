"""What an acoustic model says of a frame depends on what it may hear, and on nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teacherstudent.config import Network
from teacherstudent.data.features import Normalisation
from teacherstudent.training.models import (
    AcousticModel,
    build_model,
    model_from_state,
    model_state,
    num_parameters,
)

torch.set_num_threads(1)

NUM_FEATURES, NUM_SENONES = 6, 7
NETWORKS = {
    "unidirectional": Network(layers=2, cells=5),
    "delayed": Network(layers=2, cells=5, output_delay_frames=3),
    "bidirectional": Network(layers=2, cells=5, bidirectional=True),
}


def build(network: Network, seed: int = 1) -> AcousticModel:
    """In double precision, so that equal means equal."""
    random = np.random.default_rng(5)
    normalisation = Normalisation(
        random.normal(size=NUM_FEATURES).astype(np.float32),
        random.uniform(1, 2, NUM_FEATURES).astype(np.float32),
    )
    return build_model(network, NUM_SENONES, normalisation, seed).double()


def utterance(num_frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + num_frames)
    return torch.randn(num_frames, NUM_FEATURES, generator=generator, dtype=torch.float64)


def run(model: AcousticModel, features: Tensor) -> Tensor:
    """(T, F) -> (T, S), alone."""
    return model(features[None], torch.tensor([len(features)]))[0]


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("padding", [0.0, 1e3])
def test_padding_and_company_never_change_an_utterance(network: Network, padding: float) -> None:
    model = build(network)
    utterances = [utterance(length) for length in (9, 9, 6, 2, 1)]
    lengths = torch.tensor([len(features) for features in utterances])
    batch = torch.full(
        (len(lengths), 11, NUM_FEATURES), padding, dtype=torch.float64
    )  # 2 frames more than any
    for row, features in zip(batch, utterances):
        row[: len(features)] = features
    together = model(batch, lengths)
    assert together.shape == (5, 11, NUM_SENONES)
    for logits, features in zip(together, utterances):
        torch.testing.assert_close(logits[: len(features)], run(model, features), rtol=0, atol=1e-12)


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_a_frame_hears_as_far_ahead_as_the_delay_and_no_further(delay: int) -> None:
    model = build(Network(layers=2, cells=5, output_delay_frames=delay))
    features = utterance(10).requires_grad_()
    logits = run(model, features)
    for frame in range(10):
        (heard,) = torch.autograd.grad(logits[frame].sum(), features, retain_graph=True)
        influence = heard.abs().amax(dim=1)
        assert (influence[: frame + delay + 1] > 0).all()
        assert (influence[frame + delay + 1 :] == 0).all()


def test_every_frame_of_a_bidirectional_network_hears_the_whole_utterance() -> None:
    features = utterance(10).requires_grad_()
    logits = run(build(NETWORKS["bidirectional"]), features)
    for frame in range(10):
        (heard,) = torch.autograd.grad(logits[frame].sum(), features, retain_graph=True)
        assert (heard.abs().amax(dim=1) > 0).all()


def test_the_last_frames_hear_the_last_one_repeated() -> None:
    model = build(Network(layers=2, cells=5, output_delay_frames=3))
    features = utterance(8)
    longer = torch.cat([features, features[-1:].expand(3, -1)])
    torch.testing.assert_close(run(model, features), run(model, longer)[:8], rtol=0, atol=1e-12)


def test_the_model_normalises_its_input() -> None:
    model, features = build(NETWORKS["delayed"]), utterance(8)
    normalised = (features - model.mean) / model.deviation
    expected = run(model, features)
    model.mean.zero_()
    model.deviation.fill_(1)
    torch.testing.assert_close(run(model, normalised), expected, rtol=0, atol=1e-12)


def test_the_weights_are_of_the_seed_alone() -> None:
    network = NETWORKS["bidirectional"]
    torch.manual_seed(1)
    first = build(network, seed=3).state_dict()
    torch.manual_seed(2)
    second = build(network, seed=3).state_dict()
    other = build(network, seed=4).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    drawn = [name for name in first if "weight" in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_forget_gates_start_open_and_all_other_weights_small() -> None:
    cells = 5
    for name, value in build(NETWORKS["bidirectional"]).state_dict().items():
        if "bias_ih" in name:
            assert (value[cells : 2 * cells] == 1).all()
            value = torch.cat([value[:cells], value[2 * cells :]])
        elif "bias_hh" in name:
            assert (value == 0).all()
        assert value.abs().max() <= cells**-0.5 or name in ("mean", "deviation")


@pytest.mark.parametrize("network", [*NETWORKS.values(), Network(layers=1, cells=3)])
def test_the_number_of_parameters_is_known_without_making_them(network: Network) -> None:
    real = sum(parameter.numel() for parameter in build(network).parameters())
    assert num_parameters(network, NUM_SENONES, NUM_FEATURES) == real


@pytest.mark.parametrize(
    "network, millions",
    [(Network(layers=5, cells=768), 24.3), (Network(layers=5, cells=832, bidirectional=True), 78)],
    ids=["student", "teacher"],
)
def test_networks_of_full_size_have_the_published_number_of_parameters(
    network: Network, millions: float
) -> None:
    assert num_parameters(network, 3183, 192) == pytest.approx(millions * 1e6, rel=0.01)


def into_second_layer(model: AcousticModel, batch: Tensor, noise: torch.Generator | None) -> Tensor:
    """(B, T, C) that the second layer is given."""
    seen = []
    hook = model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch, torch.full((len(batch),), batch.shape[1]), noise)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_dropout_has_one_mask_an_utterance_for_all_frames_and_is_right_on_average() -> None:
    model = build(Network(layers=2, cells=500, dropout=0.25))
    batch = torch.stack([utterance(4, seed) for seed in range(8)])
    plain = into_second_layer(model, batch, None)
    dropped = into_second_layer(model, batch, torch.Generator().manual_seed(1))
    mask = dropped / plain
    torch.testing.assert_close(mask, mask[:, :1].expand_as(mask))
    values = mask[:, 0]
    assert (((values - 1 / 0.75).abs() < 1e-9) | (values == 0)).all()
    assert values.mean().item() == pytest.approx(1, abs=0.04)  # 4 standard deviations of 4,000 draws
    assert len({tuple(row.tolist()) for row in values > 0}) == 8  # each utterance its own


def test_dropout_is_of_its_generator_alone_and_absent_without_one() -> None:
    model = build(Network(layers=3, cells=5, dropout=0.5))
    batch, lengths = utterance(6)[None], torch.tensor([6])
    first = model(batch, lengths, torch.Generator().manual_seed(1))
    torch.manual_seed(9)
    assert torch.equal(model(batch, lengths, torch.Generator().manual_seed(1)), first)
    assert not torch.equal(model(batch, lengths, torch.Generator().manual_seed(2)), first)
    undropped = build(Network(layers=3, cells=5))
    assert torch.equal(model(batch, lengths), undropped(batch, lengths))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_model_comes_back_from_its_state(network: Network) -> None:
    model = build(network).float()
    state = model_state(model, {"step": 3})
    features = utterance(8)
    expected = run(model, features)
    with torch.no_grad():  # the state is a copy: training on does not change it
        for parameter in model.parameters():
            parameter.add_(1)
    again = model_from_state(state)
    assert (again.network, again.num_senones) == (network, NUM_SENONES)
    assert torch.equal(run(again, features), expected)
    assert state["provenance"] == {"step": 3}


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"bidirectional": True, "output_delay_frames": 1}, "output_delay_frames = 1: it must be 0"),
        ({"layers": 0}, "layers"),
        ({"cells": 0}, "cells"),
        ({"output_delay_frames": -1}, "output_delay_frames"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"dropout": -0.1}, "dropout = -0.1"),
    ],
)
def test_a_network_that_cannot_be_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Network(**settings)
