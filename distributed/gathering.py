"""What ranks tell each other in a few bytes."""

import torch

from teacherstudent.distributed.communicators import Communicator


def gather_texts(comm: Communicator, text: str) -> list[str]:
    """Every rank's text, in rank order."""
    encoded = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
    return [bytes(part.numpy()).decode()[:-1] for part in comm.all_gather(encoded)]


def gather_integers(comm: Communicator, row: list[int]) -> list[list[int]]:
    """Every rank's row of integers, in rank order, by one all-reduce."""
    table = torch.zeros(comm.size, len(row), dtype=torch.int64)
    table[comm.rank] = torch.tensor(row)
    return comm.all_reduce(table).tolist()


def raise_together(comm: Communicator, text: str) -> None:
    """Raise on every rank what the ranks with a `text` have to say. Collective."""
    found = gather_texts(comm, text)
    if len(set(found)) > 1:
        found = [f"{comm.member} {rank}: {each}" for rank, each in enumerate(found) if each]
    raise ValueError("; ".join(dict.fromkeys(found)))
