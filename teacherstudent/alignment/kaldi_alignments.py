"""Alignments that Kaldi made: archives ali.*.gz of transition ids, and the model that says what those mean.

An archive holds an utterance's id and its list of int32, as text or binary, frame by frame. A transition id is an arc
of a phone's states: its model (final.mdl, of which only the <TransitionModel> is read) gives the phone, and whether
the arc stays in its state or leaves the phone. Source: Kaldi's hmm/transition-model.cc, hmm/hmm-utils.cc
(SplitToPhones), util/kaldi-holder-inl.h (BasicVectorHolder).

Times. Kaldi's features, unless made with snip_edges=false, take frame i from 10 i to 10 i + 25 ms: it is centred at
10 i + 12.5 ms, where ours of that number is centred at 10 i + 5 ms. So its alignments lie 7.5 ms, 0.75 frame, later
than its frame numbers say. Every third such frame is one of a chain model's, which stands for the time of that one.
"""
# N transition ids, T frames of Kaldi's

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacherstudent.alignment.alignments import LENGTH_TOLERANCE_SECONDS, AlignmentError, PhoneSegments
from teacherstudent.files import split_lines
from teacherstudent.tying.kaldi_io import BINARY_HEADER, KaldiReader
from teacherstudent.tying.kaldi_topology import Topology

_ELEMENT = np.dtype([("width", "u1"), ("value", "<i4")])
_CENTRES_SECONDS = {True: 0.0125, False: 0.005}  # of frame 0, by snip_edges


@dataclass(frozen=True)
class KaldiFrames:
    """How Kaldi made its frames."""

    shift_seconds: float
    snip_edges: bool

    @property
    def offset_seconds(self) -> float:
        """What is added to frame number × shift: a boundary lies half-way between the centres of two frames."""
        return round(_CENTRES_SECONDS[self.snip_edges] - self.shift_seconds / 2, 8)

    def boundaries(self, num_frames: int, duration: float) -> NDArray[np.float64]:
        """(num_frames + 1,) seconds between which frame i lies; the first begins, the last ends with the audio.

        Raises AlignmentError when so many frames do not make the duration.
        """
        if abs(num_frames * self.shift_seconds - duration) > LENGTH_TOLERANCE_SECONDS or not num_frames:
            raise AlignmentError(
                f"alignment of other audio: {num_frames} frames of {self.shift_seconds * 1000:g} ms for "
                f"{duration:.2f} s (align.frame_shift_seconds is 0.03 for a chain model)"
            )
        times = np.arange(num_frames + 1) * self.shift_seconds + self.offset_seconds
        times[0], times[-1] = 0.0, duration
        return np.maximum.accumulate(np.clip(times, 0.0, duration))


@dataclass(frozen=True)
class TransitionModel:
    """What every transition id stands for; entry 0 is none, since Kaldi counts from 1.

    phones, states: (N + 1,) phone, and transition state (a phone's state with its pdf). loops: whether it stays in
    its state; finals: whether it leaves the phone.
    """

    phones: NDArray[np.int32]
    states: NDArray[np.int32]
    loops: NDArray[np.bool_]
    finals: NDArray[np.bool_]

    @classmethod
    def read(cls, path: Path) -> "TransitionModel":
        """Of final.mdl, text or binary. Raises ValueError naming the file, and where it is no such model."""
        reader = KaldiReader(path.read_bytes(), str(path))
        topology = Topology.take(reader)
        word = reader.token()
        if word not in ("<Triples>", "<Tuples>"):  # with one pdf a state, or with one for its self-loop too
            raise reader.error("<Triples> or <Tuples>", word)
        rows: list[tuple[int, int, bool, bool]] = [(0, 0, False, False)]
        for number in range(1, reader.integer() + 1):
            phone, state, *_ = (reader.integer() for _ in range(3 if word == "<Triples>" else 4))
            states = topology.states(phone)
            if states is None or not 0 <= state < len(states):
                raise reader.error("a phone and state of the topology", f"phone {phone}, state {state}")
            for following, _ in states[state].transitions:
                rows.append((phone, number, following == state, following == len(states) - 1))
        phones, numbers, loops, finals = (np.array(column) for column in zip(*rows))
        return cls(phones.astype(np.int32), numbers.astype(np.int32), loops, finals)

    def split(self, ids: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """The frames on which phones begin, and the phones, of an alignment of (T,) transition ids.

        Two of the same phone in a row are two. Raises AlignmentError for ids that another model made.
        """
        if len(ids) and not 1 <= ids.min() <= ids.max() < len(self.phones):
            raise AlignmentError(f"alignment of another model: transition ids up to {ids.max()}")
        left = self._leaves(ids)
        changes = np.append(np.diff(self.phones[ids]) != 0, True)
        if (changes & ~left).any():
            raise AlignmentError("alignment of another model: it changes the phone within a phone")
        starts = np.flatnonzero(np.concatenate([[True], left[:-1]]))
        return starts, self.phones[ids[starts]]

    def _leaves(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(T,) whether the phone ends with the frame.

        Kaldi's graphs are mostly reordered: a state's self-loops come after the transition out of it.
        """
        loops, finals = self.loops[ids], self.finals[ids]
        if not self._is_reordered(ids):
            return finals
        entered = np.maximum.accumulate(np.where(loops, 0, np.arange(len(ids))))
        return finals[entered] & ~np.append(loops[1:], False)

    def _is_reordered(self, ids: NDArray[np.int32]) -> bool:
        """As Kaldi tells: by what is a self-loop where the state changes; else, whether it begins with one."""
        loops = self.loops[ids]
        changing = np.flatnonzero(np.diff(self.states[ids]))
        before, after = loops[changing], loops[changing + 1]
        telling = np.flatnonzero(before | after)
        if len(telling):
            return bool(before[telling[0]])
        return not loops[0]


def phone_segments(
    ids: NDArray[np.int32],
    model: TransitionModel,
    names: dict[int, str],
    frames: KaldiFrames,
    duration: float,
) -> PhoneSegments:
    """Of (T,) transition ids; names: phones.txt. Raises AlignmentError for an alignment of other audio or model."""
    times = frames.boundaries(len(ids), duration)
    starts, phones = model.split(ids)
    missing = sorted(set(phones.tolist()) - set(names))
    if missing:
        raise AlignmentError(f"phones that phones.txt lacks: {' '.join(map(str, missing))}")
    ends = np.append(times[starts[1:]], times[-1])
    return PhoneSegments(times[starts], ends, tuple(names[phone] for phone in phones.tolist()))


def pdf_segments(ids: NDArray[np.int32], frames: KaldiFrames, duration: float) -> PhoneSegments:
    """Of (T,) pdf ids, whose numbers stand in the places of phones. Raises AlignmentError for other audio's."""
    times = frames.boundaries(len(ids), duration)
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    return PhoneSegments(
        times[starts], np.append(times[starts[1:]], times[-1]), tuple(map(str, ids[starts].tolist()))
    )


def read_phone_names(path: Path) -> dict[int, str]:
    """phones.txt: `name number` a line. Raises ValueError naming file and line."""
    names = {}
    try:
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdecimal():
            raise ValueError(f"{path}, line {number}: got {line!r}, `phone number` is needed")
        names[int(words[1])] = words[0]
    return names


def read_archives(paths: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """(utterance id, packed ids) of every utterance. Raises ValueError naming the file that is no such archive."""
    for path in paths:
        with gzip.open(path, "rb") as file:
            try:
                yield from _read_archive(file)
            except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
                raise ValueError(
                    f"{path}: {error}. A gzipped Kaldi archive of transition or pdf ids is needed, whole, as the "
                    "alignment scripts write it"
                ) from None


def _read_archive(file: gzip.GzipFile) -> Iterator[tuple[str, bytes]]:
    while key := _read_key(file):
        if file.peek(1)[:1] == BINARY_HEADER[:1]:  # of two bytes peek may give the first alone
            if _take(file, len(BINARY_HEADER), key) != BINARY_HEADER:
                raise ValueError(f"utterance {key!r} is no list of int32")
            size = np.frombuffer(_take(file, _ELEMENT.itemsize, key), _ELEMENT)[0]
            if size["width"] != 4 or size["value"] < 0:
                raise ValueError(f"utterance {key!r} is no list of int32")
            elements = np.frombuffer(_take(file, int(size["value"]) * _ELEMENT.itemsize, key), _ELEMENT)
            if (elements["width"] != 4).any():
                raise ValueError(f"utterance {key!r} is no list of int32")
            ids = elements["value"]
        else:
            line = file.readline()
            if not line.endswith(b"\n"):
                raise ValueError(f"utterance {key!r} has no end of its line")
            ids = np.array([int(word) for word in line.split()], "<i4")
        yield key, pack(ids)


def _read_key(file: gzip.GzipFile) -> str:
    """Up to the space after it, without empty lines before it; empty at the end of the file."""
    key = b""
    while (byte := file.read(1)) not in (b" ", b""):
        key += byte
    return key.decode("utf-8").lstrip("\n")


def _take(file: gzip.GzipFile, size: int, key: str) -> bytes:
    contents = file.read(size)
    if len(contents) < size:
        raise ValueError(f"the file ends within utterance {key!r}")
    return contents


def pack(ids: NDArray[np.int32]) -> bytes:
    return zlib.compress(ids.astype("<i4").tobytes(), level=1)


def unpack(packed: bytes) -> NDArray[np.int32]:
    return np.frombuffer(zlib.decompress(packed), "<i4").astype(np.int32)
