"""The gradient of a step: of chunks, in bfloat16, of masked features."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_training import make_source, make_training
from torch import Tensor

from teacherstudent.config import Config, Network, Optimisation
from teacherstudent.config import load as load_config
from teacherstudent.data.features import Normalisation
from teacherstudent.distributed import Communicator, in_process
from teacherstudent.distributed.optimizers import DistributedOptimizer
from teacherstudent.training import gradient as gradient_module
from teacherstudent.training import train as train_module
from teacherstudent.training.batches import Batch, Position, Source
from teacherstudent.training.gradient import Measured, Part, agree_numeric_mode, compute_gradient
from teacherstudent.training.losses import PADDING
from teacherstudent.training.models import AcousticModel, build_model, divide
from teacherstudent.training.schedule import HUMAN, MACHINE, Plan
from teacherstudent.training.train import train
from teacherstudent.training_settings import Masking

NUM_FEATURES, NUM_SENONES = 6, 101
LENGTHS = (75, 75, 52, 33, 20, 4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def build(layers: int = 2, cells: int = 20, delay: int = 0, dropout: float = 0.0) -> AcousticModel:
    network = Network(layers=layers, cells=cells, output_delay_frames=delay, dropout=dropout)
    normalisation = Normalisation(torch.full((NUM_FEATURES,), 0.3).numpy(), torch.ones(NUM_FEATURES).numpy())
    return build_model(network, NUM_SENONES, normalisation, seed=1)


def make_batch(lengths: tuple[int, ...] = LENGTHS, human: bool = True) -> Batch:
    """Padding holds large numbers, which must not reach anything."""
    generator = torch.Generator().manual_seed(sum(lengths))
    size = (len(lengths), max(lengths))
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    features = torch.randn(*size, NUM_FEATURES, generator=generator)
    features[~valid] = 1e3
    senones = torch.randint(NUM_SENONES, size, generator=generator)
    if human:
        return Batch(features, torch.tensor(lengths), senones=senones.masked_fill(~valid, PADDING))
    ids = torch.stack([senones, (senones + 1) % NUM_SENONES], dim=2)
    probabilities = torch.tensor([0.75, 0.25]) * valid[:, :, None]
    return Batch(features, torch.tensor(lengths), ids=ids, probabilities=probabilities)


def gradient(
    model: AcousticModel, batch: Batch, multiplier: float = 1.0, **settings: object
) -> tuple[Measured, list[Tensor]]:
    """Not clipped; the dropout and the masks are always the same."""
    optimizer: DistributedOptimizer = torch.optim.SGD(model.parameters())  # type: ignore[assignment]
    noise = torch.Generator().manual_seed(7)
    options = Optimisation(clip_norm=1e9, **settings)  # type: ignore[arg-type]
    [measured], _ = compute_gradient(model, optimizer, [Part(batch)], noise, options, multiplier)
    return measured, [parameter.grad.clone() for parameter in model.parameters()]


# -- chunks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells, delay, num_threads", [(96, 0, 1), (96, 4, 1), (130, 4, 1), (96, 4, 2)])
@torch.no_grad()
def test_what_is_said_chunk_by_chunk_is_what_is_said_of_whole_utterances_bit_for_bit(
    cells: int, delay: int, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    model = build(cells=cells, delay=delay, dropout=0.3)
    for lengths in ((61,), (61, 40), LENGTHS):
        batch = make_batch(lengths)
        whole = model(batch.features, batch.lengths, torch.Generator().manual_seed(7))
        for chunk_frames in (16, 20, 45, 60, 100):
            noise = torch.Generator().manual_seed(7)
            pieces = list(model.chunks(batch.features, batch.lengths, chunk_frames, noise))
            assert torch.equal(torch.cat([logits for _, logits in pieces], dim=1), whole), chunk_frames
            assert all(logits.shape[1] == frames.stop - frames.start for frames, logits in pieces)


@pytest.mark.parametrize("human", [True, False], ids=["human", "machine"])
@pytest.mark.parametrize("delay", [0, 4])
def test_one_chunk_that_is_as_long_as_the_batch_has_the_gradient_of_whole_utterances_bit_for_bit(
    delay: int, human: bool
) -> None:
    model, batch = build(delay=delay, dropout=0.3), make_batch(human=human)
    whole, expected = gradient(model, batch)
    for chunk_frames in (60, 75, 1000):  # 60: the rest of 15 joins it
        measured, found = gradient(model, batch, chunk_frames=chunk_frames)
        assert measured == whole
        assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected))


def run_by_hand(model: AcousticModel, features: Tensor, borders: set[int]) -> Tensor:
    """(T, F) -> (T, S): the LSTM's equations, frame by frame; at the borders the past becomes a constant."""
    delay = model.network.output_delay_frames
    hidden = list((torch.cat([features, features[-1:].expand(delay, -1)]) - model.mean) / model.deviation)
    for layer in model.layers:
        w_input, w_output, b_input, b_output = layer.directions[0].parameters()
        output = cells = torch.zeros(model.network.cells, dtype=features.dtype)
        for t, frame in enumerate(hidden):
            if t in borders:
                output, cells = output.detach(), cells.detach()
            i, f, u, o = (w_input @ frame + b_input + w_output @ output + b_output).chunk(4)
            cells = f.sigmoid() * cells + i.sigmoid() * u.tanh()
            hidden[t] = output = o.sigmoid() * cells.tanh()
    return torch.stack(hidden[delay:]) @ model.output.weight.T + model.output.bias


@pytest.mark.parametrize("delay", [0, 3])
def test_the_gradient_of_chunks_reaches_back_to_the_chunks_first_frame(delay: int) -> None:
    model, batch = build(cells=4, delay=delay).double(), make_batch((50, 41))
    batch = dataclasses.replace(batch, features=batch.features.double())
    measured, found = gradient(model, batch, chunk_frames=16, multiplier=2.0)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for features, senones, length in zip(batch.features, batch.senones, batch.lengths):
        logits = run_by_hand(
            model, features[:length], borders={16 + delay, 32 + delay}
        )  # 16, 16 and 18 frames
        total += torch.nn.functional.cross_entropy(logits, senones[:length], reduction="sum")
    (2 * total / batch.num_frames).backward()
    assert measured.loss == pytest.approx(float(total), rel=1e-12)
    for got, parameter in zip(found, model.parameters()):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-13)


def test_loss_and_errors_do_not_depend_on_the_chunks() -> None:
    model = build(delay=4)
    for human in (True, False):
        batch = make_batch(human=human)
        whole, _ = gradient(model, batch)
        chunked, _ = gradient(model, batch, chunk_frames=20)
        assert (chunked.errors, chunked.num_frames) == (whole.errors, whole.num_frames)
        assert chunked.loss == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize("numeric_mode", ["fp32", "bf16"])
def test_a_chunk_keeps_only_its_own_activations_for_the_backward_pass(numeric_mode: str) -> None:
    model, batch = build(), make_batch((160, 160))

    def kept(chunk_frames: int) -> list[int]:
        """Bytes put by for each backward pass, without what does not grow with the frames."""
        bytes_of_chunks, model_bytes = [], {parameter.data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in model_bytes and tensor.dim() > 2:
                storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chunks = model.chunks(
                batch.features, batch.lengths, chunk_frames, bfloat16=numeric_mode == "bf16"
            )
            for _, logits in chunks:
                bytes_of_chunks.append(sum(storages.values()))
                storages.clear()
                logits.sum().backward()
        return bytes_of_chunks

    [whole] = kept(160)
    parts = kept(20)
    assert len(parts) == 8
    assert max(parts) < whole / 6


@pytest.mark.parametrize("num_frames", [1, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("chunk_frames", [16, 20, 31, 32, 1000])
def test_chunks_take_every_frame_once_and_none_is_short(num_frames: int, chunk_frames: int) -> None:
    chunks = divide(num_frames, chunk_frames)
    taken = [frame for start, stop in chunks for frame in range(start, stop)]
    assert taken == list(range(num_frames))
    sizes = [stop - start for start, stop in chunks]
    assert sizes[:-1] == [chunk_frames] * (len(sizes) - 1)
    assert min(sizes) >= min(16, num_frames)
    assert max(sizes) < chunk_frames + 16


def test_a_bidirectional_network_has_no_chunks() -> None:
    with pytest.raises(
        ValueError, match=r"^student.optimisation.chunk_frames = 50: it must be 0, since a bidir"
    ):
        config_with("student.network.bidirectional=true", "student.network.output_delay_frames=0",
                    "student.optimisation.chunk_frames=50")  # fmt: skip
    with pytest.raises(ValueError, match=r"^teacher.optimisation.chunk_frames = 50"):
        config_with("teacher.optimisation.chunk_frames=50")
    with pytest.raises(
        ValueError, match=r"chunk_frames = 3: it must be 0, for whole utterances, or at least 16"
    ):
        config_with("student.optimisation.chunk_frames=3")
    normalisation = Normalisation(torch.zeros(6).numpy(), torch.ones(6).numpy())
    model = build_model(Network(layers=1, cells=3, bidirectional=True), 5, normalisation, 1)
    with pytest.raises(ValueError, match="chunk_frames = 20: it must be 0 for a bidirectional network"):
        next(model.chunks(torch.zeros(1, 40, 6), torch.tensor([40]), 20))


def config_with(*overrides: str) -> Config:
    return load_config(Path(__file__).parent / "tiny.toml", overrides)


# -- bfloat16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [Network(layers=3, cells=40, output_delay_frames=2, dropout=0.2),
                                     Network(layers=2, cells=40, bidirectional=True)], ids=["uni", "bi"])  # fmt: skip
def test_the_gradient_in_bfloat16_is_that_of_float32_but_for_rounding(network: Network) -> None:
    normalisation = Normalisation(torch.zeros(NUM_FEATURES).numpy(), torch.ones(NUM_FEATURES).numpy())
    model, batch = build_model(network, NUM_SENONES, normalisation, 1), make_batch(human=False)
    exact, expected = gradient(model, batch)
    rounded, found = gradient(model, batch, numeric_mode="bf16")
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-3)
    assert rounded.loss != exact.loss
    for got, wanted in zip(found, expected):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.03 * wanted.norm()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    "asked, having, got",
    [("fp32", [], "fp32"), ("auto", [True, True], "bf16"), ("auto", [True, False], "fp32"),
     ("bf16", [True, True], "bf16")],
)  # fmt: skip
def test_all_workers_compute_in_what_all_their_processors_have(
    monkeypatch: pytest.MonkeyPatch, asked: str, having: list[bool], got: str
) -> None:
    answers = iter(having)
    monkeypatch.setattr(gradient_module, "has_bfloat16", lambda _: next(answers))
    modes = in_process(
        2, lambda comm: agree_numeric_mode(Optimisation(numeric_mode=asked), comm).numeric_mode
    )
    assert modes == [got, got]


def test_bfloat16_is_refused_on_every_worker_where_one_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(gradient_module, "has_bfloat16", lambda _: next(answers))

    def agree(comm: Communicator) -> str:
        with pytest.raises(
            ValueError, match=r"numeric_mode = 'bf16': 1 of 2 workers have a processor without"
        ):
            agree_numeric_mode(Optimisation(numeric_mode="bf16"), comm)
        return "refused"

    assert in_process(2, agree) == ["refused", "refused"]


# -- masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sources", [("human",), ("machine",), ("human", "machine")])
@pytest.mark.parametrize("human", [True, False], ids=["human", "machine"])
def test_masks_lie_on_the_utterances_of_the_sources_that_are_named(
    human: bool, sources: tuple[str, ...]
) -> None:
    model, batch = build(), make_batch(human=human)
    masking = Masking(frequency_masks=1, frequency_mask_mels=2, time_masks=2, sources=sources)
    plain, _ = gradient(model, batch)
    masked, _ = gradient(model, batch, masking=masking)
    named = ("human" if human else "machine") in sources
    assert (masked.loss != plain.loss) == named


def test_a_feature_that_is_masked_is_zero_to_the_network() -> None:
    """So it is the mean that stands there: a model that hears nothing but zeros says the same of everything."""
    model, batch = build(), make_batch()
    silent = dataclasses.replace(batch, features=model.mean.expand_as(batch.features))
    masking = Masking(frequency_masks=40, frequency_mask_mels=2)  # so many that they cover everything
    assert gradient(model, batch, masking=masking)[0] == gradient(model, silent)[0]


class Interruption(Exception):
    pass


class Breaking:
    """A source that raises at a micro-batch."""

    def __init__(self, source: Source, consumed: int) -> None:
        self.source, self.consumed, self.advance = source, consumed, source.advance

    def batch(self, position: Position, rank: int) -> Batch:
        if (position.epoch, position.consumed) == (0, self.consumed):
            raise Interruption
        return self.source.batch(position, rank)


def test_a_training_with_chunks_masks_and_bfloat16_goes_on_as_if_never_interrupted(tmp_path: Path) -> None:
    def run(folder: Path, consumed: int) -> None:
        training = make_training(folder)
        training = dataclasses.replace(
            training,
            optimisation=dataclasses.replace(
                training.optimisation,
                chunk_frames=16,
                numeric_mode="bf16",
                masking=Masking(time_masks=2, time_mask_share=0.5),
            ),
        )

        def work(comm: Communicator) -> None:
            sources = {name: Breaking(make_source(name, 30), consumed) for name in (HUMAN, MACHINE)}
            train(comm, training, sources, make_source("dev", 3))  # type: ignore[arg-type]

        in_process(1, work)

    run(tmp_path / "whole", -1)
    with pytest.raises(Interruption):
        run(tmp_path / "interrupted", 6)
    run(tmp_path / "interrupted", -1)
    for name in ("final.pt", "log.jsonl"):
        assert (tmp_path / "interrupted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_worker_validates_while_another_in_its_process_computes_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last worker is late in every step; with BMUF the others do not wait for it before a block's end."""
    monkeypatch.setattr(gradient_module, "has_bfloat16", lambda device: True)
    backward, measure = gradient_module._backward, train_module._measure
    late, validates, found = threading.local(), threading.Event(), []

    def last_is_late(*arguments):
        if getattr(late, "is_so", False):
            validates.wait(0.1)
        return backward(*arguments)

    def look(*arguments):
        validates.set()
        found.append(torch.get_float32_matmul_precision())
        return measure(*arguments)

    monkeypatch.setattr(gradient_module, "_backward", last_is_late)
    monkeypatch.setattr(train_module, "_measure", look)
    training = make_training(tmp_path, "bmuf")
    optimisation = dataclasses.replace(training.optimisation, numeric_mode="bf16", block_steps=50)
    schedule = dataclasses.replace(training.plan.schedule, steps=3, validate_every_steps=2)
    plan = Plan(schedule, 0.3)
    training = dataclasses.replace(training, optimisation=optimisation, plan=plan)

    def work(comm: Communicator) -> None:
        late.is_so = comm.rank == 1
        sources = {name: make_source(name) for name in (HUMAN, MACHINE)}
        train(comm, training, sources, make_source("dev", 3))

    in_process(2, work, timeout_seconds=60)
    assert found == ["highest"] * 4
