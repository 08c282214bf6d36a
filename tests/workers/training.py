"""Trains a small network by every method; prints a hash of the weights of all steps for each.

Run in process by the tests, and as a program under a launcher: the hashes must be the same.
"""

import hashlib
import json
from typing import Any

import torch
from torch.nn import functional

from teacherstudent.distributed import BMUF, GTC, Communicator, ExactAveraging, TwoTier, connect

METHODS = (
    "exact",
    "gtc",
    "gtc_dense",
    "gtc_adam",
    "gtc_every_option",
    "gtc_overlap",
    "gtc_delay",
    "bmuf",
    "bmuf_classical",
    "bmuf_average",
    "bmuf_int8",
    "bmuf_fragments",
    "bmuf_delay",
    "bmuf_buffers",
)
# name -> in place of the plain BMUF
BMUF_OPTIONS: dict[str, dict[str, Any]] = {
    "bmuf": {},
    "bmuf_classical": {"nesterov": False},
    "bmuf_average": {"local_state": "average", "warmup_steps": 10},
    "bmuf_int8": {"wire": "int8"},
    "bmuf_fragments": {"wire": "bf16", "fragments": 2},
    "bmuf_delay": {"delay_steps": 3},
    "bmuf_buffers": {},
}
EVERY_GTC_OPTION: dict[str, Any] = {
    "density": 5e-3,
    "multi_quantum": True,
    "codec": "rice",
    "capacity": 0.02,
    "ramp_steps": 20,
    "warmup_steps": 3,
    "momentum": 0.5,
    "clip_norm": 1.0,
}
# For 4 workers: with 2 there is one group, and each equals a plain method.
TWO_TIER_OPTIONS: dict[str, dict[str, Any]] = {
    "two_tier_gtc": {"inner": "gtc", "inner_options": {"density": 0.05}, "warmup_steps": 5},
    "two_tier_exact": {"inner": "exact", "wire": "int8", "delay_steps": 2},
    "two_tier_buffers": {"inner": "gtc", "inner_options": {"density": 0.05}},
}
METHODS_OF_SIZE = {2: METHODS, 4: tuple(TWO_TIER_OPTIONS)}
NUM_STEPS = 40


def make_model(method: str) -> torch.nn.Module:
    layers = [torch.nn.Linear(20, 60), torch.nn.Tanh(), torch.nn.Linear(60, 5)]
    if method.endswith("buffers"):
        layers.insert(1, torch.nn.BatchNorm1d(60))
    return torch.nn.Sequential(*layers)


def make_optimizer(method: str, model: torch.nn.Module, comm: Communicator) -> torch.optim.Optimizer:
    parameters = model.parameters()
    whole = model if method.endswith("buffers") else None
    if method == "gtc_adam":
        return GTC(torch.optim.Adam(parameters, lr=0.01), comm, density=0.02)
    if method == "gtc_every_option":
        return GTC(torch.optim.SGD(parameters, lr=0.2, weight_decay=0.01), comm, **EVERY_GTC_OPTION)
    inner = torch.optim.SGD(parameters, lr=0.2, momentum=0.5)
    if method == "gtc_overlap":
        return GTC(inner, comm, density=0.03, overlap=True, bucket_bytes=1000)
    if method == "gtc_delay":
        return GTC(inner, comm, density=0.03, delay=True)
    if method == "exact":
        return ExactAveraging(inner, comm)
    if method.startswith("gtc"):
        return GTC(inner, comm, density=0.5 if method == "gtc_dense" else 0.02)
    if method in TWO_TIER_OPTIONS:
        return TwoTier(inner, comm, group_size=2, block_steps=7, model=whole, **TWO_TIER_OPTIONS[method])
    return BMUF(inner, comm, block_steps=7, model=whole, **BMUF_OPTIONS[method])


def hash_weights(model: torch.nn.Module) -> bytes:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()


def train(comm: Communicator, method: str) -> str:
    """A hash over the weights after each step; checks that all ranks have the same weights where they should."""
    model = make_model(method)
    start = torch.Generator().manual_seed(comm.rank)  # rank 0's weights are the ones that count
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=start)
    optimizer = make_optimizer(method, model, comm)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.98**step * (3 if step % 5 == 0 else 1)
    )
    generator = torch.Generator().manual_seed(100 + comm.rank)
    hidden = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    history = hashlib.sha256()
    for step in range(NUM_STEPS):
        weight = (step + 3 * comm.rank) % 6  # 0 now and then, on different ranks
        inputs = torch.randn(8, 20, generator=generator)
        optimizer.zero_grad()
        if method == "gtc_overlap":
            optimizer.begin_step(weight=weight)
        functional.cross_entropy(model(inputs), (inputs @ hidden).argmax(dim=1)).backward()
        optimizer.step(weight=weight)
        schedule.step()
        with optimizer.global_weights():
            common = hash_weights(model)
        gathered = comm.all_gather(torch.frombuffer(bytearray(common), dtype=torch.uint8))
        assert all(torch.equal(other, gathered[0]) for other in gathered), (
            f"{method}: replicas differ at {step}"
        )
        history.update(common)
    optimizer.synchronize()
    history.update(hash_weights(model))
    return history.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with connect(timeout_seconds=60) as comm:
        hashes = {method: train(comm, method) for method in METHODS_OF_SIZE[comm.size]}
        if comm.rank == 0:
            print(json.dumps(hashes))
