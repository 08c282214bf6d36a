"""Kaldi's topologies: the states that a phone goes through, read from text or from a model, written as text.

Source: Kaldi's hmm/hmm-topology.cc.
"""

from dataclasses import dataclass
from pathlib import Path

from teacherstudent.tying.kaldi_io import KaldiReader, KaldiWriter

NO_PDF = -1


@dataclass(frozen=True)
class HmmState:
    """One state of a phone; transitions: (next state, probability). The last state of a phone has nothing of all."""

    forward_class: int = NO_PDF  # the pdf class of the frame that enters the state
    loop_class: int = NO_PDF  # and of the frames that stay in it
    transitions: tuple[tuple[int, float], ...] = ()


States = tuple[HmmState, ...]


@dataclass(frozen=True)
class Topology:
    """The states of every phone: entries are (phone ids, states)."""

    entries: tuple[tuple[tuple[int, ...], States], ...]

    def states(self, phone: int) -> States | None:
        """None for a phone that the topology does not have."""
        return next((states for phones, states in self.entries if phone in phones), None)

    @classmethod
    def read(cls, path: Path) -> "Topology":
        """From a file `topo`, or from the beginning of a model (final.mdl). Raises ValueError naming the file."""
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, contents: bytes, name: str) -> "Topology":
        return cls.take(KaldiReader(contents, name))

    @classmethod
    def take(cls, reader: KaldiReader) -> "Topology":
        """The reader goes on after it: in a model, with its transition states."""
        word = reader.token()
        if word == "<TransitionModel>":
            word = reader.token()
        if word != "<Topology>":
            raise reader.error("<Topology>, or a model with one", word)
        entries = tuple(_read_binary(reader) if reader.binary else _read_text(reader))
        for phones, states in entries:
            _check_states(states, f"{reader.name}: the topology of phones {' '.join(map(str, phones[:5]))}")
        return cls(entries)

    def text(self) -> str:
        writer = KaldiWriter(binary=False)

        def line(token: str) -> None:
            writer.token(token)
            writer.end_line()

        line("<Topology>")
        as_hmm = all(
            state.forward_class == state.loop_class for _, states in self.entries for state in states
        )
        for phones, states in self.entries:
            line("<TopologyEntry>")
            line("<ForPhones>")
            line(" ".join(map(str, phones)))
            line("</ForPhones>")
            for number, state in enumerate(states):
                _write_state(writer, number, state, as_hmm)
                line("</State>")
            line("</TopologyEntry>")
        line("</Topology>")
        return writer.contents().decode()


def _write_state(writer: KaldiWriter, number: int, state: HmmState, as_hmm: bool) -> None:
    writer.token("<State>")
    writer.integer(number)
    if state.forward_class != NO_PDF:
        writer.token("<PdfClass>" if as_hmm else "<ForwardPdfClass>")
        writer.integer(state.forward_class)
        if not as_hmm:
            writer.token("<SelfLoopPdfClass>")
            writer.integer(state.loop_class)
    for following, probability in state.transitions:
        writer.token("<Transition>")
        writer.integer(following)
        writer.number(probability)


def _read_text(reader: KaldiReader) -> list[tuple[tuple[int, ...], States]]:
    entries = []
    while (word := reader.token()) != "</Topology>":
        if word != "<TopologyEntry>":
            raise reader.error("<TopologyEntry> or </Topology>", word)
        reader.expect("<ForPhones>")
        phones = []
        while (word := reader.token()) != "</ForPhones>":
            if not word.isdecimal():
                raise reader.error("a phone's number or </ForPhones>", word)
            phones.append(int(word))
        states: list[HmmState] = []
        while (word := reader.token()) != "</TopologyEntry>":
            if word != "<State>":
                raise reader.error("<State> or </TopologyEntry>", word)
            if (number := reader.integer()) != len(states):
                raise reader.error(f"state {len(states)}", str(number))
            states.append(_read_state(reader))
        entries.append((tuple(phones), tuple(states)))
    return entries


def _read_state(reader: KaldiReader) -> HmmState:
    forward = loop = NO_PDF
    transitions = []
    while (word := reader.token()) != "</State>":
        if word == "<PdfClass>":
            forward = loop = reader.integer()
        elif word == "<ForwardPdfClass>":
            forward = reader.integer()
        elif word == "<SelfLoopPdfClass>":
            loop = reader.integer()
        elif word == "<Transition>":
            transitions.append((reader.integer(), reader.number()))
        else:
            raise reader.error("<PdfClass>, <Transition> or </State>", word)
    return HmmState(forward, loop, tuple(transitions))


def _read_binary(reader: KaldiReader) -> list[tuple[tuple[int, ...], States]]:
    phones, entry_of = reader.integers(), reader.integers()
    for phone in phones:
        if not 0 < phone < len(entry_of):
            raise reader.error(f"phones from 1 to {len(entry_of) - 1}, each with an entry", str(phone))
    num_entries = reader.integer()
    two_classes = num_entries == -1  # Kaldi's mark of states with a class for entering and one for staying
    if two_classes:
        num_entries = reader.integer()
    entries = []
    for index in range(num_entries):
        states = []
        for _ in range(reader.integer()):
            forward = reader.integer()
            loop = reader.integer() if two_classes else forward
            transitions = tuple((reader.integer(), reader.number()) for _ in range(reader.integer()))
            states.append(HmmState(forward, loop, transitions))
        entries.append((tuple(phone for phone in phones if entry_of[phone] == index), tuple(states)))
    reader.expect("</Topology>")
    return entries


def _check_states(states: States, where: str) -> None:
    """Raises ValueError for a phone that cannot be gone through."""
    last = len(states) - 1
    follow = {following for state in states for following, _ in state.transitions}
    if last < 1 or states[last].transitions or not follow <= set(range(last + 1)):
        raise ValueError(
            f"{where} has {last + 1} states: it needs a last one without transitions, reached by others"
        )
    if shortest_duration(states) > last:
        raise ValueError(f"{where}: no way leads from its first state to its last")


def shortest_duration(states: States) -> int:
    """Frames that a phone lasts at least; more than there are states where none leads through."""
    frames, places = 0, {0}
    while len(states) - 1 not in places and frames <= len(states):
        frames += 1
        places = {following for place in places for following, _ in states[place].transitions}
    return frames


def first_and_later_frames(states: States) -> bool:
    """Whether the phone's first frame has pdf class 0, every later one class 1, and it may last any number of frames.

    So in Kaldi's topology for chain models, of one state, and in the older one, of two.
    """
    last = len(states) - 1
    places, classes = {0}, {states[0].forward_class}
    for frame in range(len(states) + 1):
        if classes != {min(frame, 1)}:
            return False
        steps = [(place, following) for place in places for following, _ in states[place].transitions]
        if not any(following == last for _, following in steps):
            return False
        steps = [(place, following) for place, following in steps if following != last]
        places = {following for _, following in steps}
        classes = {
            states[place].loop_class if following == place else states[following].forward_class
            for place, following in steps
        }
    return True
