"""An inventory in Kaldi's words: the topology of a phone, and the tree as a binary ContextDependency."""

import struct

from teacherstudent.senones import Inventory

CONTEXT_WIDTH, CENTRAL_POSITION = 3, 1
_KEYS = (0, 1, 2, -1)  # Kaldi's names for left, centre, right and state (its pdf class)
_MISSING = b"NULL "


def topology_text(num_phones: int) -> str:
    """One emitting state a phone: its first frame reads state 0, its later frames, if any, read state 1.

    Both ways out of it are as likely, so that durations weigh nothing: every frame costs the same on any path.
    """
    phones = " ".join(map(str, range(1, num_phones + 1)))
    return (
        f"<Topology>\n<TopologyEntry>\n<ForPhones> {phones} </ForPhones>\n"
        "<State> 0 <ForwardPdfClass> 0 <SelfLoopPdfClass> 1\n"
        "<Transition> 0 0.5\n<Transition> 1 0.5\n</State>\n"
        "<State> 1\n</State>\n</TopologyEntry>\n</Topology>\n"
    )


def kaldi_tree_bytes(inventory: Inventory) -> bytes:
    """Kaldi's binary format (its tree/event-map.cc and tree/context-dep.cc); pdf = senone."""
    maps: list[bytes] = [b""] * len(inventory.nodes)

    def event_map(place: int) -> bytes:
        return maps[place] if place >= 0 else b"CE " + _int32(~place)

    for index in reversed(range(len(inventory.nodes))):  # children come after their parents
        position, question, yes, no = inventory.nodes[index]
        answers = inventory.questions[question]
        members = b"\x04" + struct.pack(f"<i{len(answers)}i", len(answers), *answers)
        maps[index] = b"".join(
            [b"SE ", _int32(_KEYS[position]), members, b"{ ", event_map(yes), event_map(no), b"} "]
        )
    phones = [_table(-1, [event_map(place) for place in states]) for states in inventory.roots]
    body = _table(1, [_MISSING, *phones])
    head = b"ContextDependency " + _int32(CONTEXT_WIDTH) + _int32(CENTRAL_POSITION)
    return head + b"ToPdf " + body + b"EndContextDependency "


def _table(key: int, entries: list[bytes]) -> bytes:
    return (
        b"TE " + _int32(key) + b"\xfc" + struct.pack("<I", len(entries)) + b"( " + b"".join(entries) + b") "
    )


def _int32(value: int) -> bytes:
    return b"\x04" + struct.pack("<i", value)
