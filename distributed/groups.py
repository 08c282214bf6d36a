"""Groups of ranks that talk to each other as if each were one rank."""
# G groups, M ranks in each, n bytes of a message

import torch
from torch import Tensor

from teacherstudent.distributed.communicators import Communicator, Transfer


class Groups(Communicator):
    """A communicator whose ranks are groups of equal size; the members of a group all hold the same bits.

    inside    this group's members, in the order of their places
    across    the ranks of this place in all groups, in the order of the groups

    Every member gives the same tensors, bit for bit, and every member gets the same. Of a message between two groups
    each member sends its own share, n / M, to the member of the same place, and the members of the receiving group
    put the shares together among themselves. A message thus crosses once between two nodes, as with one leader a
    group, but on M connections at once, and no member waits while another one works. (If each place exchanged by
    itself what all of them hold, it would cross M times.) Whatever a group receives, its members receive as the same
    bytes: they stay equal without being compared.

    Reductions are ordered. `inside` and `across` are for nothing else: their tags are those of this communicator.
    """

    member = "group"

    def __init__(self, inside: Communicator, across: Communicator) -> None:
        super().__init__(across.rank, across.size, across.device, across.timeout_seconds, "ordered")
        self.inside = inside
        self.across = across

    def split(self, color: int) -> "Groups":
        return Groups(self.inside.split(0), self.across.split(color))

    def close(self) -> None:
        super().close()
        self.inside.close()
        self.across.close()

    def _transfer(
        self, outgoing: dict[int, Tensor], incoming: dict[int, int], own: Tensor, tag: int
    ) -> Transfer:
        return _GroupTransfer(self, outgoing, incoming, own, tag)

    def _count_bytes(self) -> None:
        """What this rank has sent itself, and not the whole group."""
        self.bytes_sent = self.inside.bytes_sent + self.across.bytes_sent


class _GroupTransfer(Transfer):
    """The shares are under way between the groups; `finish` puts them together."""

    def __init__(
        self, groups: Groups, outgoing: dict[int, Tensor], incoming: dict[int, int], own: Tensor, tag: int
    ) -> None:
        self._groups = groups
        self._incoming = incoming
        self._own = own
        self._tag = tag
        place = groups.inside.rank
        shares = [
            message.split(self._share_sizes(message.numel()))[place]
            for message in (outgoing.get(group, own[:0]) for group in range(groups.size))
        ]
        sizes = [self._share_sizes(incoming.get(group, 0))[place] for group in range(groups.size)]
        self._across = groups.across._exchange(shares, sizes, tag)
        groups._count_bytes()

    def finish(self, deadline: float) -> list[Tensor]:
        groups, own = self._groups, self._own
        shares = self._across.finish(deadline)
        received = [own if group == groups.rank else own[:0] for group in range(groups.size)]
        if not self._incoming:
            return received
        mine = torch.cat([shares[group] for group in self._incoming])
        sizes = list(zip(*map(self._share_sizes, self._incoming.values())))  # of each place, for each message
        gathering = groups.inside._exchange([mine] * groups.inside.size, list(map(sum, sizes)), self._tag)
        gathered = [part.split(list(lengths)) for part, lengths in zip(gathering.finish(deadline), sizes)]
        for group, parts in zip(self._incoming, zip(*gathered)):
            received[group] = torch.cat(parts)
        groups._count_bytes()
        return received

    def _share_sizes(self, num_bytes: int) -> list[int]:
        """How many bytes of a message each place takes."""
        size = self._groups.inside.size
        return [num_bytes * (place + 1) // size - num_bytes * place // size for place in range(size)]
