"""What every transport must do alike; run in process by the tests, and as a program under a launcher."""

import torch

from teacherstudent.distributed import Communicator, connect


def values_of(rank: int, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of very different sizes, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(rank)
    normal = torch.randn(num_elements, generator=generator, dtype=torch.float64)
    return (normal * 10.0 ** torch.randint(-3, 4, (num_elements,), generator=generator)).to(dtype)


def check_collectives(comm: Communicator) -> None:
    check_reductions(comm)
    check_gathers(comm)
    check_split(comm)
    comm.barrier()


def check_reductions(comm: Communicator) -> None:
    ranks = range(comm.size)
    for num_elements in (0, 1, 5, 3001):  # below and above the size from which ranks share the work
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            total = sum(values_of(rank, num_elements, dtype).double() for rank in ranks)
            tensor = values_of(comm.rank, num_elements, dtype)
            assert comm.all_reduce(tensor) is tensor
            assert torch.equal(tensor, total.to(dtype)), (num_elements, dtype)
        tensor = values_of(comm.rank, num_elements, torch.float32)
        largest = torch.stack([values_of(rank, num_elements, torch.float32) for rank in ranks]).amax(0)
        assert torch.equal(comm.all_reduce(tensor, op="max"), largest)
    big = 2**53 + 1  # a double would lose the 1
    assert comm.all_reduce(torch.full((2, 3), big)).tolist() == [[comm.size * big] * 3] * 2
    assert comm.all_reduce(torch.tensor(comm.rank, dtype=torch.uint8), op="max") == comm.size - 1
    column = torch.arange(6.0).view(2, 3).t()  # not contiguous: still in place
    assert comm.all_reduce(column) is column
    assert column[:, 1].tolist() == [3.0 * comm.size, 4.0 * comm.size, 5.0 * comm.size]


def check_gathers(comm: Communicator) -> None:
    ragged = comm.all_gather(torch.full((comm.rank, 2), comm.rank, dtype=torch.int32))
    assert [part.tolist() for part in ragged] == [[[rank, rank]] * rank for rank in range(comm.size)]
    assert [part.shape for part in comm.all_gather(torch.empty(0, 3))] == [(0, 3)] * comm.size
    outgoing = [torch.full((rank,), 10.0 * comm.rank + rank) for rank in range(comm.size)]
    received = comm.all_to_all(outgoing)
    assert [part.tolist() for part in received] == [
        [10.0 * rank + comm.rank] * comm.rank for rank in range(comm.size)
    ]
    for root in range(comm.size):
        tensor = torch.full((3, 2), float(comm.rank))
        assert comm.broadcast(tensor, root) is tensor
        assert bool((tensor == root).all())
    first = comm.start_all_gather(torch.tensor([comm.rank]))
    second = comm.start_all_reduce(torch.ones(2000))
    for handle in (second, first) if comm.rank % 2 else (first, second):  # ranks may wait in different orders
        handle.wait()
    assert torch.cat(first.wait()).tolist() == list(range(comm.size))
    assert bool((second.wait() == comm.size).all())


def check_split(comm: Communicator) -> None:
    part = comm.split(comm.rank % 2)
    members = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
    assert (part.size, members[part.rank]) == (len(members), comm.rank)
    assert part.all_reduce(torch.tensor([comm.rank])).item() == sum(members)
    assert comm.all_reduce(torch.tensor([1])).item() == comm.size


if __name__ == "__main__":
    with connect(timeout_seconds=60) as comm:
        check_collectives(comm)
        tensor = torch.arange(5.0) * comm.rank
        assert torch.equal(
            comm.all_reduce(tensor, reduction="native"), torch.arange(5.0) * sum(range(comm.size))
        )
        print(f"collectives agree on rank {comm.rank} of {comm.size}")
