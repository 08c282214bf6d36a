"""Workers come from the launcher, or from the configuration; optimisers from the configured method."""

import typing
from typing import Any

import pytest
import torch

from teacherstudent.config import Distributed, Optimisation
from teacherstudent.distributed import GTC, Communicator, connect, in_process
from teacherstudent.training.workers import METHODS, make_optimizer, run_workers


def test_every_method_of_the_configuration_makes_an_optimizer_with_its_settings() -> None:
    assert set(METHODS) == set(typing.get_args(typing.get_type_hints(Optimisation)["method"]))
    for method in METHODS:
        settings = Optimisation(method=method, learning_rate=0.25, momentum=0.5)

        def groups(comm: Communicator, settings: Optimisation = settings) -> list[dict[str, Any]]:
            return make_optimizer(torch.nn.Linear(2, 2).parameters(), comm, settings).param_groups

        for group in (group for found in in_process(2, groups) for group in found):
            assert (group["lr"], group["momentum"]) == (0.25, 0.5)


def test_momentum_is_either_corrected_before_compression_or_left_to_the_inner_optimizer() -> None:
    settings = Optimisation(method="gtc", learning_rate=0.25, momentum=0.5, momentum_correction=True)

    def work(comm: Communicator) -> tuple[float, float]:
        optimizer = make_optimizer(torch.nn.Linear(2, 2).parameters(), comm, settings)
        assert isinstance(optimizer, GTC)
        return optimizer.param_groups[0]["momentum"], optimizer.options.momentum

    assert in_process(2, work) == [(0.0, 0.5)] * 2
    with pytest.raises(ValueError, match="momentum_correction = True: it must be false"):
        Optimisation(method="bmuf", momentum_correction=True)


def test_one_worker_is_told_which_setting_is_for_it() -> None:
    parameters = list(torch.nn.Linear(2, 2).parameters())
    for method in ("gtc", "bmuf"):
        with pytest.warns(UserWarning) as caught:
            make_optimizer(parameters, connect(), Optimisation(method=method))
        [warning] = caught
        assert str(warning.message).startswith(
            f"optimisation.method = '{method}': {method.upper()} with one worker"
        )
        assert "'exact' is for one worker; distributed.workers" in str(warning.message)


def test_without_a_launcher_the_configured_workers_run_and_under_one_those_that_were_launched() -> None:
    alone = connect()
    assert run_workers(alone, Distributed(workers=3), lambda comm: comm.size) == 3
    assert run_workers(alone, Distributed(workers=1), lambda comm: comm) is alone
    launched = in_process(2, lambda own: run_workers(own, Distributed(workers=3), lambda comm: comm.size))
    assert launched == [2, 2]
    with pytest.raises(ValueError, match="workers = 0"):
        Distributed(workers=0)
