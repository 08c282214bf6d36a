"""The DDP hook is GTC with equal weights, in units of gradients, wherever DDP puts its buckets."""

import copy
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacherstudent.distributed import Communicator, in_process
from teacherstudent.distributed.ddp_hook import GTCState, gtc_hook
from teacherstudent.distributed.optimizers import STATE_KEY

ROOT = Path(__file__).parent.parent
SHAPES = {"a": (30, 4), "b": (7,), "c": (11, 3), "d": ()}
NUM_STEPS = 20


@dataclass
class Bucket:
    """What torch.distributed.GradBucket shows of a bucket."""

    number: int
    num_buckets: int
    members: list[torch.Tensor]
    flat: torch.Tensor

    def index(self) -> int:
        return self.number

    def is_last(self) -> bool:
        return self.number == self.num_buckets - 1

    def parameters(self) -> list[torch.Tensor]:
        return self.members

    def buffer(self) -> torch.Tensor:
        return self.flat

    def gradients(self) -> list[torch.Tensor]:
        parts = self.flat.split([member.numel() for member in self.members])
        return [part.view(member.shape) for part, member in zip(parts, self.members)]


def make_model(names: str = "abcd", dtype: torch.dtype = torch.float32) -> torch.nn.ParameterDict:
    return torch.nn.ParameterDict([(name, torch.zeros(SHAPES[name], dtype=dtype)) for name in names])


def gradients_of(rank: int, step: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    numbers = np.random.default_rng([rank, step])
    return {
        name: torch.tensor(numbers.normal(size=shape) + 0.2, dtype=dtype) for name, shape in SHAPES.items()
    }


def reduce(
    state: GTCState, model: torch.nn.ParameterDict, gradients: dict[str, torch.Tensor], cuts: str
) -> dict[str, torch.Tensor]:
    """What a DDP with such buckets would hand to the optimiser; cuts="dc ba" are two buckets."""
    buckets = [[model[name] for name in names] for names in cuts.split()]
    futures, named = [], {parameter: name for name, parameter in model.items()}
    for number, members in enumerate(buckets):
        flat = torch.cat([gradients[named[member]].reshape(-1) for member in members])
        bucket = Bucket(number, len(buckets), members, flat)
        futures.append((bucket, gtc_hook(state, bucket)))  # type: ignore[arg-type]
    reduced: dict[str, torch.Tensor] = {}
    for bucket, future in futures:
        bucket.flat = future.wait()
        reduced |= {named[member]: part for member, part in zip(bucket.members, bucket.gradients())}
    return reduced


def residuals_of(state: GTCState) -> dict[str, torch.Tensor]:
    saved = state.state_dict()
    return dict(zip(saved["names"], saved[STATE_KEY]["residuals"], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options", [{"density": 0.1}, {"threshold": 0.5}, {"threshold": 0.5, "multi_quantum": True}]
)
def test_every_element_is_conserved_bit_for_bit_wherever_the_buckets_are_cut(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """fl(r + g) = r′ + quanta·τ, and all ranks receive fl(τ·c)/N."""

    def work(comm: Communicator) -> list[dict[str, torch.Tensor]]:
        model = make_model(dtype=dtype)
        state = GTCState(model, comm, **options)
        updates = []
        for step in range(NUM_STEPS):
            gradients = gradients_of(comm.rank, step, dtype)
            before = {name: residual.clone() for name, residual in residuals_of(state).items()}
            given = {name: gradient.clone() for name, gradient in gradients.items()}
            cuts = ("abcd", "dc ba", "d c b a", "a dbc")[step % 4]
            threshold = state.metrics().get("threshold")  # the controller moves it after the step
            reduced = reduce(state, model, given, cuts)
            if threshold is None:
                continue
            for name, residual in residuals_of(state).items():
                grown = before[name] + gradients[name]
                quanta = (grown.double() - residual.double()) / threshold
                assert torch.equal(quanta, quanta.round())
                assert torch.equal(quanta != 0, grown.abs() >= threshold)
                counts = comm.all_reduce(quanta.to(torch.int64))
                assert torch.equal(reduced[name], counts.to(dtype) * threshold / comm.size)
            updates.append(reduced)
        assert state.metrics()["quanta_sent"] > 0
        return updates

    first, *others = in_process(3, work)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in SHAPES)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "clip_norm": 1.0}], ids=str)
def test_a_loss_scale_that_moves_changes_nothing_but_the_scale_of_the_update(options: dict[str, Any]) -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        scaler = torch.amp.GradScaler("cpu")
        plain, scaled = GTCState(model, comm, density=0.1), GTCState(model, comm, density=0.1, scaler=scaler)
        for step in range(NUM_STEPS):
            scale = 2.0 ** (step % 7)
            scaler.update(scale) if step else scaler.scale(torch.zeros(()))  # which sets it up
            scale = scaler.get_scale()
            gradients = gradients_of(comm.rank, step)
            one = reduce(plain, model, gradients, "dc ba")
            other = reduce(
                scaled, model, {name: scale * gradient for name, gradient in gradients.items()}, "dc ba"
            )
            for name in SHAPES:
                assert torch.equal(one[name] * scale, other[name])
                assert torch.equal(residuals_of(plain)[name], residuals_of(scaled)[name])
        assert plain.metrics()["quanta_sent"] > 0

    in_process(2, work)


def test_a_gradient_that_is_not_finite_is_nan_everywhere_and_touches_no_residual() -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        state, control = GTCState(model, comm, threshold=0.5), GTCState(model, comm, threshold=0.5)
        for step in range(6):
            gradients = gradients_of(comm.rank, step)
            if step == 3:
                spoilt = copy.deepcopy(gradients)
                spoilt["a"][-1, -1] = torch.nan if comm.rank == 1 else 1.0
                reduced = reduce(state, model, spoilt, "dc b a")  # others have gone by when it comes
                assert all(bool(gradient.isnan().all()) for gradient in reduced.values())
            one, other = (
                reduce(state, model, gradients, "dc b a"),
                reduce(control, model, gradients, "dc b a"),
            )
            assert all(torch.equal(one[name], other[name]) for name in SHAPES)
            for one_residual, other_residual in zip(
                residuals_of(state).values(), residuals_of(control).values()
            ):
                assert torch.equal(one_residual, other_residual)
        assert state.metrics()["skipped_nonfinite"] == 1

    in_process(2, work)


def test_a_parameter_without_a_gradient_on_any_rank_keeps_its_residual_and_sends_nothing() -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        state = GTCState(model, comm, threshold=0.125)
        for step in range(4):  # more than one quantum for each element
            reduce(
                state,
                model,
                {name: gradient + 2.0 for name, gradient in gradients_of(comm.rank, step).items()},
                "dcba",
            )
        held = residuals_of(state)["c"].clone()
        assert bool((held.abs() > 0.125).any())
        gradients = gradients_of(comm.rank, 4)
        gradients["c"].zero_()
        assert not reduce(state, model, gradients, "dcba")["c"].any()
        assert torch.equal(residuals_of(state)["c"], held)
        gradients["c"][0, 0] = float(comm.rank)  # one rank is enough
        assert bool(reduce(state, model, gradients, "dcba")["c"].any())

    in_process(2, work)


def test_a_backward_pass_that_is_broken_off_leaves_nothing_behind() -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        state, control = GTCState(model, comm, threshold=0.5), GTCState(model, comm, threshold=0.5)
        broken = Bucket(0, 2, [model["a"]], torch.full((model["a"].numel(),), 100.0))
        gtc_hook(state, broken)  # type: ignore[arg-type]
        one, other = (reduce(each, model, gradients_of(comm.rank, 0), "dc ba") for each in (state, control))
        assert all(torch.equal(one[name], other[name]) for name in SHAPES)

    in_process(2, work)


# ---- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_resumed_hook_goes_on_bit_for_bit_though_the_model_lists_its_parameters_in_another_order(
    momentum: float,
) -> None:
    def work(comm: Communicator) -> None:
        model, reordered = make_model(), make_model("cadb")
        state = GTCState(model, comm, threshold=0.5, momentum=momentum)
        for step in range(5):
            reduce(state, model, gradients_of(comm.rank, step), "dc ba")
        resumed = GTCState(reordered, comm, threshold=0.5, momentum=momentum)
        resumed.load_state_dict(copy.deepcopy(state.state_dict()))
        for step in range(5, 10):
            one = reduce(state, model, gradients_of(comm.rank, step), "dc ba")
            other = reduce(resumed, reordered, gradients_of(comm.rank, step), "a bc d")
            assert all(torch.equal(one[name], other[name]) for name in SHAPES)
        assert state.metrics()["quanta_sent"] == resumed.metrics()["quanta_sent"]

    in_process(2, work)


def test_a_state_of_another_model_or_kind_is_refused() -> None:
    def work(comm: Communicator) -> None:
        state = GTCState(make_model(), comm)
        with pytest.raises(
            ValueError, match="1 parameters are only in the state or only in the model, such as 'd'"
        ):
            state.load_state_dict(GTCState(make_model("abc"), comm).state_dict())
        with pytest.raises(ValueError, match="not the state of a GTCState"):
            state.load_state_dict({})

    in_process(2, work)


# ---- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 2.0}, "density is 2.0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"overlap": True}, "a DDP hook cannot have overlap=True"),
        ({"delay": True}, "a DDP hook cannot have delay=True"),
    ],
)
def test_an_option_out_of_place_is_an_error_on_every_worker(options: dict[str, Any], message: str) -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            GTCState(make_model(), comm, **options)

    in_process(2, work)


def test_a_model_without_trainable_parameters_is_an_error_on_every_worker() -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="no parameter that requires a gradient"):
            GTCState(make_model().requires_grad_(False), comm)

    in_process(2, work)


def test_gradients_of_other_parameters_are_an_error() -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        state = GTCState(model, comm)
        with pytest.raises(ValueError, match="brought gradients of 3 parameters, and the GTCState knows 4"):
            reduce(state, model, gradients_of(comm.rank, 0), "dc b")

    in_process(2, work)


# ---- DistributedDataParallel itself -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laws_that_hold() -> list[str]:
    """Printed by three processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "workers" / "ddp_hook.py")],
        capture_output=True, text=True, timeout=150,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("check", ["it_equals_gtc", "accumulation", "unused_parameters", "non_finite"])
def test_the_hook_keeps_its_laws_under_ddp(laws_that_hold: list[str], check: str, view: bool) -> None:
    assert f"check_{check} gradient_as_bucket_view={view}" in laws_that_hold


@pytest.mark.parametrize(
    "law", ["check_it_equals_gtc static_graph=True", "check_joining", "check_other_workers_are_refused"]
)
def test_static_graphs_uneven_data_and_wrong_workers(laws_that_hold: list[str], law: str) -> None:
    assert law in laws_that_hold
