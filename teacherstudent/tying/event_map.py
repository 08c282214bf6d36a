"""Kaldi's decision trees as Kaldi writes them: any tree, read from and written to text or binary.

A tree maps an event to a pdf. An event gives a value to every key: keys 0 … width - 1 are the phones of the context,
-1 is the pdf class (which state of the phone). Source: Kaldi's tree/event-map.cc and tree/context-dep.cc. Trees may be
deep, so nothing here calls itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from teacherstudent.tying.kaldi_io import BINARY_HEADER, KaldiReader, KaldiWriter

PDF_CLASS = -1  # the key of the state


@dataclass(frozen=True)
class Constant:
    """CE: a leaf."""

    answer: int


@dataclass(frozen=True)
class Table:
    """TE: entry v is for the events whose key has value v; None (NULL) where there is no answer."""

    key: int
    entries: "tuple[EventMap | None, ...]"


@dataclass(frozen=True)
class Split:
    """SE: has the key one of these values?"""

    key: int
    members: tuple[int, ...]
    yes: "EventMap"
    no: "EventMap"


EventMap = Constant | Table | Split


def find_answer(place: EventMap | None, event: Mapping[int, int]) -> int | None:
    """The pdf of an event {key: value}; None where the tree has none."""
    while place is not None and not isinstance(place, Constant):
        value = event[place.key]
        if isinstance(place, Split):
            place = place.yes if value in place.members else place.no
        else:
            place = place.entries[value] if 0 <= value < len(place.entries) else None
    return None if place is None else place.answer


@dataclass
class _Open:
    """A node whose children are being read."""

    make: "Callable[[list[EventMap | None]], EventMap]"
    size: int
    close: str
    children: "list[EventMap | None]"


def read_event_map(reader: KaldiReader) -> EventMap | None:
    """Raises ValueError naming file and place."""
    stack: list[_Open] = []
    while True:
        done: EventMap | None = None
        word = reader.token()
        if word == "CE":
            done = Constant(reader.integer())
        elif word in ("TE", "SE"):
            stack.append(_open_table(reader) if word == "TE" else _open_split(reader))
        elif word != "NULL":
            raise reader.error("CE, TE, SE or NULL", word)
        if word in ("CE", "NULL"):
            if not stack:
                return done
            stack[-1].children.append(done)
        while len(stack[-1].children) == stack[-1].size:
            closed = stack.pop()
            reader.expect(closed.close)
            if closed.close == "}" and None in closed.children:
                raise reader.error("an answer to yes and no", "NULL")
            done = closed.make(closed.children)
            if not stack:
                return done
            stack[-1].children.append(done)


def _open_table(reader: KaldiReader) -> _Open:
    key, size = reader.integer(), reader.integer()
    if size < 0:
        raise reader.error("the size of a table", str(size))
    reader.expect("(")
    return _Open(lambda children: Table(key, tuple(children)), size, ")", [])


def _open_split(reader: KaldiReader) -> _Open:
    key, members = reader.integer(), reader.integers()
    reader.expect("{")

    def make(children: list[EventMap | None]) -> EventMap:
        yes, no = children
        assert yes is not None
        assert no is not None
        return Split(key, members, yes, no)

    return _Open(make, 2, "}", [])


def write_event_map(writer: KaldiWriter, event_map: EventMap | None) -> None:
    """As Kaldi lays it out."""
    waiting: list[EventMap | str | None] = [event_map]
    while waiting:
        place = waiting.pop()
        if place is None:
            writer.token("NULL")
        elif isinstance(place, str):
            writer.token(place)
            writer.end_line()
        elif isinstance(place, Constant):
            writer.token("CE")
            writer.integer(place.answer)
        elif isinstance(place, Table):
            writer.token("TE")
            writer.integer(place.key)
            writer.unsigned(len(place.entries))
            writer.token("(")
            waiting += [")", *reversed(place.entries)]
        else:
            writer.token("SE")
            writer.integer(place.key)
            writer.integers(place.members)
            writer.token("{")
            waiting += ["}", place.no, place.yes]


@dataclass(frozen=True)
class ContextDependency:
    """A tree over a window of `width` phones, of which `centre` (from 0) is the phone that the pdf belongs to."""

    width: int
    centre: int
    tree: EventMap

    def pdf(self, phones: tuple[int, ...], pdf_class: int) -> int | None:
        """phones: of the window, 0 where the utterance has none."""
        return find_answer(self.tree, {PDF_CLASS: pdf_class, **dict(enumerate(phones))})

    @property
    def num_pdfs(self) -> int:
        """The highest pdf and one."""
        highest, waiting = -1, [self.tree]
        while waiting:
            place = waiting.pop()
            if isinstance(place, Constant):
                highest = max(highest, place.answer)
            else:
                children = place.entries if isinstance(place, Table) else (place.yes, place.no)
                waiting += [child for child in children if child is not None]
        return highest + 1

    @classmethod
    def parse(cls, contents: bytes, name: str) -> "ContextDependency":
        """From text or binary. name: what errors call it. Raises ValueError."""
        reader = KaldiReader(contents, name)
        reader.expect("ContextDependency")
        width, centre = reader.integer(), reader.integer()
        word = reader.token()
        if word == "ToLength":  # an old form, which told the number of states as well
            read_event_map(reader)
            word = reader.token()
        if word != "ToPdf":
            raise reader.error("ToPdf", word)
        tree = read_event_map(reader)
        reader.expect("EndContextDependency")
        if tree is None or not 0 <= centre < width:
            raise ValueError(f"{name}: a tree over {width} phones around number {centre} has no pdfs")
        return cls(width, centre, tree)

    @classmethod
    def read(cls, path: Path) -> "ContextDependency":
        """Raises ValueError naming the file."""
        if not path.is_file():
            raise ValueError(f"no decision tree at {path}: Kaldi's file `tree` is needed, binary or text")
        return cls.parse(path.read_bytes(), str(path))

    def text(self) -> str:
        return self._written(KaldiWriter(binary=False)).decode()

    def binary(self, header: bool = True) -> bytes:
        return (BINARY_HEADER if header else b"") + self._written(KaldiWriter(binary=True))

    def _written(self, writer: KaldiWriter) -> bytes:
        writer.token("ContextDependency")
        writer.integer(self.width)
        writer.integer(self.centre)
        writer.token("ToPdf")
        write_event_map(writer, self.tree)
        writer.token("EndContextDependency")
        return writer.contents()
