"""An inventory in Kaldi's words: a tree (ContextDependency), a topology and a phone table; pdf = senone."""

from collections.abc import Sequence
from pathlib import Path

from teacherstudent.files import write_text
from teacherstudent.tying.event_map import PDF_CLASS, Constant, ContextDependency, EventMap, Split, Table
from teacherstudent.tying.senones import Inventory

CONTEXT_WIDTH, CENTRAL_POSITION = 3, 1
_KEYS = (0, 1, 2, PDF_CLASS)  # Kaldi's names for left, centre, right and state (its pdf class)
_Group = tuple[tuple[int, ...], EventMap]  # phones that share their roots, and what grows from these


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


def to_kaldi(inventory: Inventory) -> ContextDependency:
    """The tree. As in Kaldi's own, phones that share roots are told apart from others by splits, not by a table."""
    maps: dict[int, EventMap] = {~senone: Constant(senone) for senone in range(inventory.num_senones)}
    for index in reversed(range(len(inventory.nodes))):  # children come after their parents
        position, question, yes, no = inventory.nodes[index]
        maps[index] = Split(_KEYS[position], inventory.questions[question], maps[yes], maps[no])
    phones_of: dict[tuple[int, ...], list[int]] = {}
    for phone, states in enumerate(inventory.roots, 1):
        phones_of.setdefault(tuple(states), []).append(phone)
    groups: list[_Group] = [
        (tuple(phones), Table(PDF_CLASS, tuple(maps[place] for place in states)))
        for states, phones in phones_of.items()
    ]
    if len(groups) == len(inventory.roots):
        tree: EventMap = Table(CENTRAL_POSITION, (None, *(states for _, states in groups)))
    else:
        tree = _split_groups(groups)
    return ContextDependency(CONTEXT_WIDTH, CENTRAL_POSITION, tree)


def _split_groups(groups: Sequence[_Group]) -> EventMap:
    """Halved again and again, until one is left."""
    if len(groups) == 1:
        return groups[0][1]
    half = len(groups) // 2
    members = sorted(phone for phones, _ in groups[:half] for phone in phones)
    return Split(CENTRAL_POSITION, tuple(members), _split_groups(groups[:half]), _split_groups(groups[half:]))


def kaldi_tree_bytes(inventory: Inventory) -> bytes:
    """The tree in Kaldi's binary format, without a file's header."""
    return to_kaldi(inventory).binary(header=False)


def export_kaldi(inventory: Inventory, folder: Path) -> list[Path]:
    """Write tree, topo and phones.txt as text. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table = "".join(f"{name} {phone}\n" for phone, name in enumerate(("<eps>", *inventory.phones)))
    contents = {
        "tree": to_kaldi(inventory).text(),
        "topo": topology_text(len(inventory.phones)),
        "phones.txt": table,
    }
    for name, text in contents.items():
        write_text(folder / name, text)
    return [folder / name for name in contents]
