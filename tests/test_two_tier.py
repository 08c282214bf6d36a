"""Two tiers: GTC or exact averaging inside groups of workers, BMUF across them."""

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from tiny_bmuf import NUM_ELEMENTS, give_step, global_weights_of, gradient_of, make_parameter
from torch import Tensor
from worker_errors import errors_of
from workers.collectives import check_collectives

from teacherstudent.distributed import BMUF, GTC, Communicator, ExactAveraging, TwoTier, in_process
from teacherstudent.distributed.groups import Groups
from teacherstudent.distributed.optimizers import STATE_KEY, DistributedOptimizer

GTC_OPTIONS = {"density": 0.2}
BLOCK_OPTIONS = {"block_steps": 4, "block_momentum": 0.5, "local_state": "average"}
# Of GTC and of BMUF, together in two groups of two workers.
OPTIONS: dict[str, dict] = {
    "gtc": {"inner_options": GTC_OPTIONS},
    "exact": {"inner": "exact"},
    "warm-up": {"inner_options": {**GTC_OPTIONS, "warmup_steps": 9}, "warmup_steps": 6},
    "gtc with momentum": {"inner_options": {**GTC_OPTIONS, "momentum": 0.5}, "local_state": "reset"},
    "gtc with delay": {"inner_options": {**GTC_OPTIONS, "delay": True}},
    "block delay": {"inner": "exact", "delay_steps": 2, "wire": "int8"},
    "fragments": {"inner_options": GTC_OPTIONS, "fragments": 2, "wire": "bf16", "outlier_factor": 9.0},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
Make = Callable[[torch.optim.Optimizer, Communicator], DistributedOptimizer]


def make_groups(comm: Communicator, size: int) -> Groups:
    group, place = divmod(comm.rank, size)
    return Groups(comm.split(group), comm.split(place))


def build(comm: Communicator, options: dict) -> tuple[list[torch.nn.Parameter], TwoTier]:
    parameters = [make_parameter(torch.float32), make_parameter(torch.float32)]
    momentum = 0.0 if "momentum" in options.get("inner_options", {}) else 0.5
    inner = torch.optim.SGD(parameters, lr=0.1, momentum=momentum)
    return parameters, TwoTier(inner, comm, group_size=2, block_steps=4, **options)


def train(
    comm: Communicator, parameters: list[torch.nn.Parameter], optimizer: DistributedOptimizer, step: int
) -> None:
    """A rank out of data, gradients that are not finite on one, and a learning rate that moves."""
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * 0.95**step
    for number, parameter in enumerate(parameters):
        parameter.grad = gradient_of(comm.rank, 100 * number + step, parameter.detach())
        if step == 6 and comm.rank == 1:
            parameter.grad[2] = math.inf
    if isinstance(optimizer, TwoTier):
        optimizer.report_loss(1.0 + 0.1 * ((step + comm.rank) % 5))
    optimizer.step(weight=(step + comm.rank) % 4)


def values_of(parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().clone() for parameter in parameters])


# ---- the communicator of groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_groups_exchange_as_single_ranks_do(size: int) -> None:
    in_process(2 * size, lambda comm: check_collectives(make_groups(comm, size)))


def test_a_message_crosses_between_groups_once_whatever_the_number_of_members() -> None:
    def work(comm: Communicator) -> tuple[int, int]:
        groups = make_groups(comm, 3)
        groups.all_reduce(torch.ones(6000))
        assert groups.bytes_sent == groups.across.bytes_sent + groups.inside.bytes_sent
        return groups.rank, groups.across.bytes_sent

    sent = in_process(6, work)
    for group in range(2):  # a ring of two: each sends half of the sum, and half of its parts
        assert sum(num_bytes for other, num_bytes in sent if other == group) == 4 * 6000
    assert {num_bytes for _, num_bytes in sent} == {4 * 6000 // 3}


# ---- tiers of one member ---------------------------------------------------------------------------------------------

PLAIN: dict[str, tuple[Make, Make]] = {
    "groups of one": (
        lambda inner, comm: TwoTier(inner, comm, group_size=1, **BLOCK_OPTIONS),
        lambda inner, comm: BMUF(inner, comm, **BLOCK_OPTIONS),
    ),
    "one group, gtc": (
        lambda inner, comm: TwoTier(inner, comm, group_size=3, inner_options=GTC_OPTIONS, block_steps=4),
        lambda inner, comm: GTC(inner, comm, **GTC_OPTIONS),
    ),
    "one group, exact": (
        lambda inner, comm: TwoTier(inner, comm, group_size=3, inner="exact", block_steps=4),
        ExactAveraging,
    ),
}


@pytest.mark.parametrize(("make", "make_plain"), PLAIN.values(), ids=PLAIN.keys())
def test_a_tier_of_one_member_is_left_out_bit_for_bit(make: Make, make_plain: Make) -> None:
    def work(comm: Communicator, make: Make) -> tuple[list[Tensor], dict[str, float]]:
        parameters = [make_parameter(torch.float32), make_parameter(torch.float32)]
        inner = torch.optim.SGD(parameters, lr=0.1, momentum=0.5)
        optimizer = make(inner, comm)
        sent_before, found = optimizer.metrics()["bytes_sent"], []
        for step in range(11):
            if step == 6:  # by way of a checkpoint
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make(inner, comm)
                optimizer.load_state_dict(state)
            train(comm, parameters, optimizer, step)
            found.append(values_of(parameters))
            with optimizer.global_weights():
                found.append(values_of(parameters))
        optimizer.synchronize()
        found.append(values_of(parameters))
        metrics = {key: value for key, value in optimizer.metrics().items() if key != "seconds_in_exchange"}
        metrics["bytes_sent"] -= sent_before
        if getattr(optimizer, "num_groups", 3) == 1:
            # 2 blocks and synchronize: 6 numbers for each of 2 ranks, with the header of a gather; and once, whether
            # all of them synchronize
            metrics["bytes_sent"] -= 3 * 2 * (6 * 8 + 80) + 2 * 6 * 8
        return found, metrics

    for rank, (found, metrics) in enumerate(in_process(3, lambda comm: work(comm, make))):
        wanted, wanted_metrics = in_process(3, lambda comm: work(comm, make_plain))[rank]
        assert all(map(torch.equal, found, wanted))
        assert metrics == wanted_metrics


def test_one_worker_has_its_inner_optimizer_and_is_told_what_is_left_out() -> None:
    def work(comm: Communicator) -> None:
        parameter, plain = make_parameter(torch.float32), make_parameter(torch.float32)
        with pytest.warns(UserWarning, match="one worker has neither .*; density, block_lr without effect"):
            optimizer = TwoTier(
                torch.optim.SGD([parameter], lr=0.1),
                comm,
                group_size=1,
                inner_options=GTC_OPTIONS,
                block_lr=0.5,
            )
        inner = torch.optim.SGD([plain], lr=0.1)
        for step in range(9):
            give_step(optimizer, parameter, 0, step)
            plain.grad = gradient_of(0, step, plain.detach())
            inner.step()
        assert torch.equal(parameter, plain)

    in_process(1, work)


# ---- the arithmetic of both tiers ------------------------------------------------------------------------------------


def test_exact_averaging_inside_is_bmuf_whose_workers_see_the_batches_of_a_group() -> None:
    """float64, 3 groups of 2: against an oracle that has all gradients at hand."""
    weight_of = lambda rank, step: (rank + step) % 3  # noqa: E731

    def work(comm: Communicator) -> tuple[list[Tensor], dict[str, float]]:
        parameter = make_parameter()
        optimizer = TwoTier(
            torch.optim.SGD([parameter], lr=0.1), comm, group_size=2, inner="exact", block_steps=4
        )
        found = []
        for step in range(12):
            parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            if comm.rank == 0 and step == 5:
                parameter.grad[1] = math.inf
            optimizer.step(weight=weight_of(comm.rank, step))
            found.append(global_weights_of(optimizer, parameter))
        return found, optimizer.metrics()

    common, update, eta = make_parameter().detach(), torch.zeros(NUM_ELEMENTS, dtype=torch.float64), 2 / 3
    start, wanted = common.clone(), []
    for block in range(3):
        models, weights = [start.clone() for _ in range(3)], [0] * 3
        for step in range(4 * block, 4 * block + 4):
            wanted.append(common.clone())
            for group in range(3):
                if group == 0 and step == 5:
                    continue  # skipped by both of its ranks, whose weights do not count then
                pair = [(rank, weight_of(rank, step)) for rank in (2 * group, 2 * group + 1)]
                gradient = sum(weight * gradient_of(rank, step, models[group]) for rank, weight in pair)
                total = sum(weight for _, weight in pair)
                models[group] = models[group] - 0.1 * gradient / total
                weights[group] += total
        mean = sum(weight * (model - start) for weight, model in zip(weights, models)) / sum(weights)
        update = eta * update + mean
        common = common + update
        start = common + eta * update
        wanted[-1] = common.clone()
    for found, metrics in in_process(6, work):
        assert metrics["blocks"] == 3 and metrics["steps"] == 12
        for weights_found, weights_wanted in zip(found, wanted, strict=True):
            assert float((weights_found - weights_wanted).abs().max()) < 1e-12


@every_option
def test_a_group_holds_one_model_bit_for_bit_and_all_groups_hold_w(options: dict) -> None:
    def work(comm: Communicator) -> None:
        inside = comm.split(comm.rank // 2)
        parameters, optimizer = build(comm, options)
        num_apart = 0
        for step in range(14):
            train(comm, parameters, optimizer, step)
            own = values_of(parameters)
            assert all(torch.equal(own, other) for other in inside.all_gather(own))
            num_apart += any(not torch.equal(own, other) for other in comm.all_gather(own))
            with optimizer.global_weights():
                common = values_of(parameters)
            assert all(torch.equal(common, other) for other in comm.all_gather(common))
        assert num_apart > 3  # or else no group has trained alone
        optimizer.synchronize()
        assert all(
            torch.equal(values_of(parameters), other) for other in comm.all_gather(values_of(parameters))
        )
        metrics = optimizer.metrics()
        assert metrics["bytes_sent"] > metrics["bytes_between_groups"] > 0
        if not options.get("warmup_steps"):
            assert metrics["skipped_nonfinite"] == (comm.rank < 2)  # the group of the bad gradient, together

    in_process(4, work)


@every_option
def test_going_on_from_a_checkpoint_at_any_step_is_going_on_and_saving_changes_nothing(options: dict) -> None:
    num_steps = 13

    def uninterrupted(comm: Communicator, saving: bool) -> tuple[Tensor, list[dict], dict[str, float]]:
        parameters, optimizer = build(comm, options)
        saved = []
        for step in range(num_steps):
            if saving:
                saved.append(copy.deepcopy(optimizer.state_dict()))
            train(comm, parameters, optimizer, step)
        return values_of(parameters), saved, optimizer.metrics()

    def resumed(comm: Communicator, stop: int, state: dict) -> tuple[Tensor, dict[str, float]]:
        parameters, optimizer = build(comm, options)
        if not (options.get("warmup_steps", 0) > stop):
            with torch.no_grad():
                for parameter in parameters:
                    parameter.fill_(7.0)
        optimizer.load_state_dict(copy.deepcopy(state))
        for step in range(stop, num_steps):
            train(comm, parameters, optimizer, step)
        return values_of(parameters), optimizer.metrics()

    reference = in_process(4, lambda comm: uninterrupted(comm, False))
    saving = in_process(4, lambda comm: uninterrupted(comm, True))
    for stop in range(num_steps):
        ends = in_process(4, lambda comm, stop=stop: resumed(comm, stop, saving[comm.rank][1][stop]))
        for rank, (end, metrics) in enumerate(ends):
            assert torch.equal(saving[rank][0], reference[rank][0])
            assert torch.equal(end, reference[rank][0]), f"rank {rank}, from step {stop}"
            for name in ("steps", "blocks", "skipped_nonfinite", "skipped_empty"):
                assert metrics[name] == reference[rank][2][name]


def test_momentum_follows_the_number_of_groups() -> None:
    def work(comm: Communicator) -> float:
        parameter = make_parameter()
        optimizer = TwoTier(torch.optim.SGD([parameter], lr=0.1), comm, group_size=2, inner="exact")
        assert optimizer._across is not None
        return optimizer._across.block_momentum

    assert in_process(6, work) == [1 - 1 / 3] * 6


# ---- common decisions ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:one|TwoTier")
def test_a_group_whose_model_is_not_finite_is_left_out_and_starts_again_with_nothing_waiting() -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        inner = torch.optim.SGD([parameter], lr=0.1)
        optimizer = TwoTier(
            inner, comm, group_size=2, inner_options=GTC_OPTIONS, block_steps=3, block_momentum=0.0
        )
        for step in range(2):
            give_step(optimizer, parameter, comm.rank, step)
        if comm.rank >= 2:
            with torch.no_grad():
                parameter[3] = float("nan")
        parameter.grad = gradient_of(comm.rank, 2, torch.zeros_like(parameter))
        optimizer.step()
        starts = comm.all_gather(parameter.detach())
        assert all(torch.equal(start, starts[0]) for start in starts) and bool(starts[0].isfinite().all())
        residuals = optimizer.state_dict()[STATE_KEY]["tiers"]["inside"]["residuals"]
        assert bool(residuals[0].any()) == (comm.rank < 2)
        assert optimizer.metrics()["ranks_left_out"] == 1

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_process(4, work)
    messages = [str(one.message) for one in caught]
    assert len(messages) == 4 and all(
        message.startswith("block 0: group 1 is left out") for message in messages
    )


def test_where_no_group_can_be_used_all_workers_get_the_error() -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        optimizer = TwoTier(
            torch.optim.SGD([parameter], lr=0.1), comm, group_size=2, inner="exact", block_steps=1
        )
        parameter.grad = torch.ones_like(parameter)
        with torch.no_grad():
            parameter[0] = math.inf
        with pytest.raises(
            FloatingPointError, match=r"\(group 0: its model is not finite; group 1: its model"
        ):
            optimizer.step()

    in_process(4, work)


def test_a_groups_loss_is_the_mean_of_its_workers_by_weight() -> None:
    def work(comm: Communicator, losses: list[float]) -> float:
        parameter = make_parameter()
        optimizer = TwoTier(
            torch.optim.SGD([parameter], lr=0.1),
            comm,
            group_size=2,
            inner="exact",
            block_steps=2,
            outlier_factor=2.0,
        )
        for step in range(2):
            optimizer.report_loss(losses[comm.rank])
            give_step(optimizer, parameter, comm.rank, step, weight=1 + 2 * (comm.rank % 2))
        return optimizer.metrics()["ranks_left_out"]

    assert in_process(6, lambda comm: work(comm, [1, 1, 1, 1, 4.0, 1.1])) == [0] * 6  # (4 + 3·1.1)/4 < 2
    with pytest.warns(UserWarning, match="group 2 is left out .*its loss is 3.275, the median 1"):
        assert in_process(6, lambda comm: work(comm, [1, 1, 1, 1, 1.1, 4.0])) == [1] * 6


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_what_one_worker_requests_all_hear_of_at_the_blocks_end(group_size: int) -> None:
    def work(comm: Communicator) -> list[tuple[bool, bool]]:
        parameter = make_parameter()
        optimizer = TwoTier(
            torch.optim.SGD([parameter], lr=0.1), comm, group_size=group_size, inner="exact", block_steps=3
        )
        heard = []
        for step in range(9):
            if comm.rank == 1 and step == 1:
                optimizer.request("stop")
            if comm.rank == 2 and step == 4:
                optimizer.request("checkpoint")
            give_step(optimizer, parameter, comm.rank, step)
            heard.append((optimizer.agreed("stop"), optimizer.agreed("checkpoint")))
        with pytest.raises(ValueError, match="choose one of"):
            optimizer.request("pause")
        return heard

    expected = [(False, False)] * 2 + [(True, False)] * 3 + [(False, True)] * 3 + [(False, False)]
    assert in_process(4, work) == [expected] * 4


# ---- surface ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_scaled_gradients_give_the_same_bits_and_scales_stay_equal_in_a_group(overlap: bool) -> None:
    def work(comm: Communicator, scaled: bool) -> tuple[Tensor, float]:
        parameter = make_parameter(torch.float32)
        inner = torch.optim.SGD([parameter], lr=0.1)
        options = {**GTC_OPTIONS, "overlap": overlap}
        optimizer = TwoTier(inner, comm, group_size=2, inner_options=options, block_steps=3, warmup_steps=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(8):
            optimizer.zero_grad()
            if overlap:
                optimizer.begin_step(scaler=scaler if scaled else None)
            wanted = gradient_of(comm.rank, step, parameter.detach())
            if step == 4 and comm.rank == 1:
                wanted[0] = math.inf
            scaler.scale((parameter * wanted).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.metrics()["skipped_nonfinite"] == (comm.rank < 2)
        return parameter.detach(), scaler.get_scale()

    plain, scaled = (in_process(4, lambda comm, on=on: work(comm, on)) for on in (False, True))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(plain, scaled))
    assert [scale for _, scale in scaled] == [512.0, 512.0, 1024.0, 1024.0]


def test_schedulers_move_the_rate_of_both_tiers_also_after_loading() -> None:
    def work(comm: Communicator) -> None:
        parameters, optimizer = build(comm, {"inner_options": GTC_OPTIONS})
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for tier in optimizer._tiers.values():
            assert tier.param_groups is optimizer.param_groups is optimizer.inner.param_groups
            assert tier.state is optimizer.inner.state
        optimizer.param_groups[0]["lr"] = 0.0
        before = values_of(parameters)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            optimizer.step()
        assert torch.equal(values_of(parameters), before)

    in_process(4, work)


BAD = {
    "group_size is 3, which does not divide the 4 workers": {"group_size": 3},
    "group_size is 0; give a whole number of workers, at least 1": {"group_size": 0},
    "group_size is 1.5; give a whole number": {"group_size": 1.5},
    "inner is 'bmuf'; choose one of gtc, exact": {"inner": "bmuf"},
    "inner_options has no option 'densty'; there is density, threshold": {"inner_options": {"densty": 0.1}},
    "inner_options has no option 'density'; there is none": {"inner": "exact", "inner_options": GTC_OPTIONS},
    "density is 2; give a share": {"inner_options": {"density": 2}},
    "BMUF has no option 'blocks'; there is block_steps": {"blocks": 3},
    "block_steps is 0; give a whole number": {"block_steps": 0},
}


@pytest.mark.parametrize(("message", "options"), BAD.items(), ids=BAD.keys())
@pytest.mark.parametrize("bad_ranks", [{0, 1, 2, 3}, {2}])
def test_bad_options_are_an_error_on_every_worker(message: str, options: dict, bad_ranks: set[int]) -> None:
    def work(comm: Communicator) -> None:
        settings = {"group_size": 2, **(options if comm.rank in bad_ranks else {})}
        with pytest.raises(ValueError, match="^" + message if len(bad_ranks) == 4 else f"^rank 2: {message}"):
            TwoTier(torch.optim.SGD([make_parameter()], lr=0.1), comm, **settings)

    in_process(4, work, timeout_seconds=10)


def test_settings_that_differ_between_groups_are_an_error_on_every_worker() -> None:
    def work(comm: Communicator) -> None:
        options = {"density": 0.1 + 0.1 * (comm.rank // 2)}
        with pytest.raises(ValueError, match=r"the settings differ between ranks: .*rank 2 has TwoTier"):
            TwoTier(torch.optim.SGD([make_parameter()], lr=0.1), comm, group_size=2, inner_options=options)

    in_process(4, work, timeout_seconds=10)


def test_a_state_of_other_groups_is_refused_and_one_of_fewer_groups_carries_on() -> None:
    def save(comm: Communicator) -> tuple[dict, Tensor]:
        parameters, optimizer = build(comm, {"inner": "exact"})
        for step in range(5):
            train(comm, parameters, optimizer, step)
        assert optimizer._across is not None
        return copy.deepcopy(optimizer.state_dict()), optimizer._across._fragments[0].filter.weights[
            0
        ].clone()

    states, weights = zip(*in_process(6, save))

    def load(comm: Communicator, group_size: int, inner: str) -> Tensor:
        parameter, other = make_parameter(torch.float32), make_parameter(torch.float32)
        inside = torch.optim.SGD([parameter, other], lr=0.1, momentum=0.5)
        optimizer = TwoTier(inside, comm, group_size=group_size, inner=inner, block_steps=4)
        optimizer.load_state_dict(states[comm.rank])
        with optimizer.global_weights():
            return values_of([parameter, other])

    for size, group_size, inner in ((4, 1, "exact"), (2, 2, "exact"), (4, 2, "gtc")):
        with pytest.raises(
            ValueError, match="was saved in groups of 2, by ExactAveraging and GroupBMUF, and is"
        ):
            in_process(size, lambda comm: load(comm, group_size, inner))  # noqa: B023
    with pytest.warns(UserWarning, match="the 1 steps since the last block are lost"):
        for found in in_process(4, lambda comm: load(comm, 2, "exact")):
            assert torch.equal(found, weights[0])


def test_a_delayed_step_belongs_to_the_block_in_which_it_was_taken() -> None:
    def work(comm: Communicator, delay: bool) -> list[Tensor]:
        parameters = [make_parameter(torch.float32)]
        inner = torch.optim.SGD(parameters, lr=0.1)
        options = {"density": 0.2, "delay": delay}
        optimizer = TwoTier(inner, comm, group_size=2, inner_options=options, block_steps=1)
        found = []
        for step in range(5):
            train(comm, parameters, optimizer, step)
            found.append(values_of(parameters))
        return found

    plain, delayed = (in_process(4, lambda comm, delay=delay: work(comm, delay)) for delay in (False, True))
    assert all(torch.equal(*pair) for one, other in zip(plain, delayed) for pair in zip(one, other))


def test_nothing_is_applied_to_w_while_it_is_shown() -> None:
    def work(comm: Communicator) -> None:
        parameters, optimizer = build(comm, {"inner_options": {**GTC_OPTIONS, "delay": True}})
        for step in range(2):
            train(comm, parameters, optimizer, step)
        with optimizer.global_weights():
            common = values_of(parameters)
            for call in (optimizer.step, optimizer.synchronize):
                with pytest.raises(RuntimeError, match=r"leave optimizer\.global_weights"):
                    call()
            assert torch.equal(values_of(parameters), common)

    in_process(4, work)


def test_begin_step_belongs_to_gtc() -> None:
    def work(comm: Communicator) -> None:
        optimizer = TwoTier(torch.optim.SGD([make_parameter()], lr=0.1), comm, group_size=2, inner="exact")
        with pytest.raises(ValueError, match=r"begin_step\(\) belongs to inner='gtc'"):
            optimizer.begin_step()

    in_process(4, work)


def test_a_worker_that_never_comes_is_named_by_its_number_among_all() -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        optimizer = TwoTier(
            torch.optim.SGD([parameter], lr=0.1), comm, group_size=2, inner="exact", block_steps=1
        )
        if comm.rank < 3:
            with pytest.raises(TimeoutError) as caught:
                give_step(optimizer, parameter, comm.rank, 0)
            awaited = {0: 2, 1: 3, 2: 3}[
                comm.rank
            ]  # its own place in the other group, or its own group's other rank
            assert str(caught.value).startswith(f"rank {comm.rank} waited for rank {awaited} until")

    in_process(4, work, timeout_seconds=3)


@pytest.mark.parametrize("inner", ["gtc", "exact"])
@pytest.mark.parametrize("size", [2, 4], ids=["one group", "two groups"])
def test_a_worker_that_takes_fewer_steps_than_the_others_is_an_error_on_all(inner: str, size: int) -> None:
    def work(comm: Communicator) -> None:
        parameters = [make_parameter(), make_parameter()]
        optimizer = TwoTier(
            torch.optim.SGD(parameters, lr=0.1), comm, group_size=2, inner=inner, block_steps=4
        )
        for step in range(7 - 2 * (comm.rank == size - 1)):
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            optimizer.step()
        optimizer.synchronize()

    [message] = set(errors_of(size, work))
    assert "1 of 2 ranks have called step, the others synchronize: every rank must call both" in message
