"""Where a training's workers and its optimiser come from.

Under a launcher (torchrun, mpirun, srun) the launched processes are the workers; otherwise
`[distributed] workers` of them run in this process.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from teacherstudent.config import Distributed, Optimisation
from teacherstudent.distributed import BMUF, GTC, Communicator, ExactAveraging, TwoTier, in_process
from teacherstudent.distributed.launchers import is_launched
from teacherstudent.distributed.optimizers import DistributedOptimizer

Result = TypeVar("Result")
Method = Callable[[torch.optim.Optimizer, Communicator, Optimisation], DistributedOptimizer]


def _gtc_options(settings: Optimisation) -> dict[str, Any]:
    names = ("density", "multi_quantum", "ramp_steps", "codec")
    return {name: getattr(settings, name) for name in names}


def _block_options(settings: Optimisation) -> dict[str, Any]:
    names = ("block_steps", "block_momentum", "local_state", "wire")
    return {name: getattr(settings, name) for name in names} | {"warmup_steps": settings.exact_steps}


METHODS: dict[str, Method] = {
    "exact": lambda inner, comm, _: ExactAveraging(inner, comm),
    "gtc": lambda inner, comm, settings: GTC(
        inner,
        comm,
        warmup_steps=settings.exact_steps,
        momentum=settings.momentum if settings.momentum_correction else 0.0,
        **_gtc_options(settings),
    ),
    "bmuf": lambda inner, comm, settings: BMUF(inner, comm, **_block_options(settings)),
    "two-tiers": lambda inner, comm, settings: TwoTier(
        inner,
        comm,
        group_size=settings.group_size,
        inner_options=_gtc_options(settings) if settings.group_size > 1 else None,
        **_block_options(settings),
    ),
}


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], comm: Communicator, settings: Optimisation
) -> DistributedOptimizer:
    """SGD with momentum, its steps shared by the configured method.

    What a method warns of when there is one worker is said in the configuration's words.
    """
    momentum = 0.0 if settings.momentum_correction else settings.momentum
    inner = torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=momentum)
    make = METHODS[settings.method]
    if comm.size > 1:
        return make(inner, comm, settings)
    with warnings.catch_warnings(record=True) as caught:
        optimizer = make(inner, comm, settings)
    for warning in caught:
        warnings.warn(
            f"optimisation.method = {settings.method!r}: {warning.message}. 'exact' is for one worker; "
            "distributed.workers, or a launcher, gives more",
            stacklevel=2,
        )
    return optimizer


def run_workers(
    comm: Communicator,
    settings: Distributed,
    function: Callable[[Communicator], Result],
    worker_bytes: int = 0,
) -> Result:
    """Run function(comm) on every worker; `comm` is what the launcher gave to this process.

    worker_bytes: what one worker holds; in-process workers that do not fit into memory together are refused.
    Returns what the function returned here; for in-process workers, what it returned on the first.
    """
    if comm.size > 1 or settings.workers == 1 or is_launched():
        return function(comm)
    if settings.threads_per_worker > 1:
        warnings.warn(
            f"distributed.threads_per_worker = {settings.threads_per_worker} counts for launched workers: the "
            f"{settings.workers} in-process workers compute in one thread each",
            stacklevel=2,
        )
    return in_process(
        settings.workers,
        function,
        timeout_seconds=settings.timeout_seconds,
        device=comm.device,
        worker_bytes=worker_bytes,
    )[0]
