"""Gradient threshold compression as a communication hook of torch's DistributedDataParallel.

    comm = connect()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(GTCState(ddp, comm, density=1e-3), gtc_hook)

N. Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015.
"""
# N ranks, g gradient, r residual, τ threshold, c sum of all ranks' counts

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.gtc import GTC
from teacherstudent.distributed.optimizers import STATE_KEY

# What a state of GTC holds as lists in the order of the parameters.
BY_PARAMETER = ("residuals", "velocities")
REFUSED_OPTIONS = ("overlap", "bucket_bytes", "delay", "initial_weights")


class GTCState:
    """What `gtc_hook` keeps between backward passes: a residual for each parameter, and the threshold.

    model    the DistributedDataParallel; it says which parameters there are, and their names
    comm     the same workers, from connect(); the constructor is collective
    scaler   the GradScaler, if there is one: residuals are kept without its scale, which moves. Where it is not
             given, what has not been sent yet counts for more or less after every change of scale
    options  those of GTC, such as density, threshold, multi_quantum

    **Equal weights.** DDP does not say how much data a gradient is the mean of, so every rank counts the same.
    Where batches differ in size, GTC takes step(weight=…).

    **Gradient units.** DDP does not say the learning rate either: r accumulates gradients, and a quantum is applied
    at the rate of the step that sends it, not of the steps that earned it. At a constant rate that is GTC with τ
    divided by the rate. Where the rate falls, what is sent late moves the weights by less than it was worth when
    it was earned; where it rises, by more; at a rate of 0 it is lost to the weights. The gradients are conserved
    whatever the rate does: Σ sent·τ + r is the sum of all gradients as rounded, for every element. Where rates
    move much, as with a rate for each source of data, GTC keeps what each step has earned.

    A parameter whose gradient is 0 on every rank sends nothing in that step and keeps its residual, since DDP leaves
    the gradient of an unused parameter as it was and would drop what arrives for it. A gradient that is not finite
    on any rank makes the step count for nothing: residuals stay as they are and every gradient is NaN on every
    rank, where GradScaler and whatever else looks at gradients finds it. metrics() counts these steps.

    Raises ValueError on every rank where an option is out of range, the model has no trainable parameter, options
    or shapes differ between ranks, or `comm` is not the workers of the DDP.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        comm: Communicator,
        *,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        for name in REFUSED_OPTIONS:
            if name in options:
                raise ValueError(
                    f"a DDP hook cannot have {name}={options[name]!r}; use GTC without DDP for it"
                )
        parameters = find_parameters(model)
        if isinstance(model, DistributedDataParallel):
            check_workers(model, comm)
        self._scaler = scaler
        self._names = list(parameters)
        self._slots = {parameter: make_slot(parameter) for parameter in parameters.values()}
        self._handover = Handover(list(self._slots.values()))
        self._gtc = GTC(self._handover, comm, initial_weights="check", **options)
        # The buckets of this backward pass, and the gradients in them.
        self._waiting: list[tuple[torch.futures.Future[Tensor], Tensor]] = []
        self._gradients: dict[Tensor, Tensor] = {}

    def metrics(self) -> dict[str, float]:
        """As those of GTC; the threshold is in units of gradients."""
        return self._gtc.metrics()

    def state_dict(self) -> dict[str, Any]:
        """That of GTC, and the names of the parameters that its residuals belong to. Every rank has its own.

        As in torch the tensors are the live ones: save them, or copy them, before the next backward pass.
        """
        return {**self._gtc.state_dict(), "names": self._names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state_dict of the same rank, or from what fold_states makes of several.

        Residuals go where their names are, whatever the order. Raises ValueError where names or shapes differ.
        """
        saved = state_dict.get("names")
        if saved is None:
            raise ValueError("this is not the state of a GTCState; load what its state_dict() returned")
        differing = sorted(set(saved) ^ set(self._names))
        if differing:
            raise ValueError(
                f"{len(differing)} parameters are only in the state or only in the model, such as {differing[0]!r}; "
                "build the model that the state was saved for"
            )
        order = [saved.index(name) for name in self._names]
        hidden = dict(state_dict[STATE_KEY])
        for key in BY_PARAMETER:
            hidden[key] = [hidden[key][place] for place in order] if hidden[key] else []
        self._gtc.load_state_dict({**state_dict, STATE_KEY: hidden})

    # ---- the step -----------------------------------------------------------------------------------------

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Wait for all buckets of a backward pass, then step with all of them together.

        So a gradient that is not finite stops the step before anything has been sent, and DDP may cut its buckets
        anew: they are only where gradients come from.
        """
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._waiting.append((future, bucket.buffer()))
        self._gradients.update(zip(bucket.parameters(), bucket.gradients()))
        if bucket.is_last():
            self._step()
            for waiting, buffer in self._waiting:
                waiting.set_result(buffer)
            self._waiting.clear()
            self._gradients.clear()
        return future

    def _step(self) -> None:
        """Write what all ranks have sent over all gradients, in the DDP's own buffers."""
        if self._gradients.keys() != self._slots.keys():
            raise ValueError(
                f"the DDP has brought gradients of {len(self._gradients)} parameters, and the GTCState knows "
                f"{len(self._slots)}; make both of the same model, after the last change of requires_grad"
            )
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        self._multiply(1.0 / scale)
        for (parameter, slot), group, moving in zip(
            self._slots.items(), self._gtc.param_groups, self._find_moving(), strict=True
        ):
            slot.grad = self._gradients[parameter]
            group["lr"] = float(moving)  # at a rate of 0 GTC keeps the residual and sends nothing
        self._handover.has_update = False
        self._gtc.step()
        self._multiply(scale if self._handover.has_update else torch.nan)
        for slot in self._slots.values():
            slot.grad = None

    def _multiply(self, factor: float) -> None:
        if factor != 1.0:
            for gradient in self._gradients.values():
                gradient.mul_(factor)

    def _find_moving(self) -> list[bool]:
        """For each parameter, whether any rank has a gradient that is not all 0."""
        moving = torch.tensor([bool(self._gradients[parameter].count_nonzero()) for parameter in self._slots])
        return (self._gtc.comm.all_reduce(moving.to(torch.int64)) > 0).tolist()


def gtc_hook(state: GTCState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """For ddp.register_comm_hook(GTCState(ddp, comm, density=1e-3), gtc_hook); GTCState says what it does.

    All collectives are made in the call for the last bucket, and none in a callback: callbacks that wait for each
    other lock up under gloo.
    """
    return state.take(bucket)


class Handover(torch.optim.Optimizer):
    """The optimiser inside GTC that leaves the update where it is: in the gradients, for DDP to fetch."""

    def __init__(self, slots: list[Tensor]) -> None:
        groups = [{"params": [slot]} for slot in slots] or [{"params": [torch.zeros(0)]}]
        super().__init__(groups, {"lr": 1.0})
        self.has_update = False

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.has_update = True


def find_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that a DDP reduces, by their names in the module inside it."""
    ignored: set[str] = getattr(model, "parameters_to_ignore", set())
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and name not in ignored
    }


def make_slot(parameter: Tensor) -> Tensor:
    """A stand-in of the same shape, dtype and device that holds a gradient, and a single number as its values."""
    return parameter.new_zeros(()).expand(parameter.shape).requires_grad_()


def check_workers(ddp: DistributedDataParallel, comm: Communicator) -> None:
    group = ddp.process_group
    if (dist.get_rank(group), dist.get_world_size(group)) != (comm.rank, comm.size):
        raise ValueError(
            f"this is worker {dist.get_rank(group)} of {dist.get_world_size(group)} of the DDP, and worker {comm.rank} "
            f"of {comm.size} of the communicator; give the DDP and GTCState the same workers"
        )
