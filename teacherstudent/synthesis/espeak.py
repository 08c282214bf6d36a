"""The speech synthesiser espeak-ng, in a process of its own: text in, samples and events out.

espeak-ng is GPL-3 and an optional tool: no other process of ours loads it. `Voice` starts this very module as a
program (`python -m teacherstudent.synthesis.espeak NAME RATE PITCH`) and talks to it over pipes. Protocol: a line
with a JSON string, the text, goes in; a line of JSON `{"num_bytes": …, "events": […]}` and so many bytes of 16-bit
samples come out.

espeak-ng carries state from one text to the next: the same text gives other samples later on. A fresh process
that is given the same texts in the same order gives the same samples.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

from teacherstudent import wheels

SAMPLING_RATE = 22050  # what espeak-ng speaks at
WHEEL, EXTRA = "espeakng_loader", "corpus"

_SYNCHRONOUS, _PHONEME_EVENTS, _RATE, _PITCH = 2, 1, 1, 3  # espeak-ng/speak_lib.h
_BY_CHARACTER, _UTF8, _PHONEMES = 1, 1, 0x100
_KINDS = {1: "word", 7: "phoneme"}


@dataclass(frozen=True)
class Event:
    """Where a word or a phoneme begins."""

    kind: Literal["word", "phoneme"]
    sample: int
    character: int  # where its word begins in the text; the first character is 1
    name: str  # the phoneme, in espeak-ng's own notation, with stress marks


@dataclass(frozen=True)
class Speech:
    """What a voice made of a text. samples: 16-bit, mono, SAMPLING_RATE. events: in espeak-ng's order."""

    samples: bytes
    events: tuple[Event, ...]


class Voice:
    """One voice, speaking in a process of its own, as a context manager.

    name: accent+variant, as in "en-us+f1"; rate: words a minute; pitch: 0 to 99.
    """

    def __init__(self, name: str, rate: int, pitch: int) -> None:
        root = Path(__file__).resolve().parents[2]  # what holds the package
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "teacherstudent.synthesis.espeak", name, str(rate), str(pitch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )

    def speak(self, text: str) -> Speech:
        """Say a text; `[[…]]` in it holds phonemes in espeak-ng's notation.

        Raises RuntimeError when the synthesiser has ended; it says why on stderr.
        """
        incoming, outgoing = self._process.stdin, self._process.stdout
        assert incoming is not None and outgoing is not None
        try:
            incoming.write(json.dumps(text).encode() + b"\n")
            incoming.flush()
            header = json.loads(outgoing.readline() or b"null")
        except BrokenPipeError:
            header = None
        if header is None:
            raise RuntimeError(f"espeak-ng, voice {self._name!r}, ended with status {self._process.wait()}")
        events = tuple(Event(*event) for event in header["events"])
        return Speech(outgoing.read(header["num_bytes"]), events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()


# -- the program that loads espeak-ng ----------------------------------------------------------------------


class _Name(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Synthesiser:
    """espeak-ng through ctypes."""

    def __init__(self, voice: str, rate: int, pitch: int) -> None:
        loader = wheels.load(WHEEL, EXTRA)
        self._library = library = ctypes.CDLL(loader.get_library_path())
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
            ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        data = loader.get_data_path().encode()
        sampling_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, _PHONEME_EVENTS)
        if sampling_rate != SAMPLING_RATE:
            raise RuntimeError(
                f"espeak-ng speaks at {sampling_rate} samples a second, not at {SAMPLING_RATE}"
            )
        self._callback = _Callback(self._receive)  # kept: espeak-ng holds no reference to it
        library.espeak_SetSynthCallback(self._callback)
        if library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")
        library.espeak_SetParameter(_RATE, rate, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)

    def speak(self, text: str) -> Speech:
        self._samples: list[bytes] = []
        self._events: list[Event] = []
        data = text.encode()
        if self._library.espeak_Synth(
            data, len(data) + 1, 0, _BY_CHARACTER, 0, _UTF8 | _PHONEMES, None, None
        ):
            raise RuntimeError(f"espeak-ng could not say {text!r}")
        self._library.espeak_Synchronize()
        return Speech(b"".join(self._samples), tuple(self._events))

    def _receive(self, samples: Any, num_samples: int, events: Any) -> int:
        if samples and num_samples > 0:
            self._samples.append(ctypes.string_at(samples, 2 * num_samples))
        self._events.extend(_named_events(events))
        return 0


def _named_events(events: Any) -> Iterator[Event]:
    index = 0
    while events[index].type:  # the list ends with an event of type 0
        event = events[index]
        if kind := _KINDS.get(event.type):
            name = event.id.string.decode() if kind == "phoneme" else ""
            yield Event(kind, event.sample, event.text_position, name)  # type: ignore[arg-type]
        index += 1


def _serve(synthesiser: _Synthesiser, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
    for line in incoming:
        speech = synthesiser.speak(json.loads(line))
        events = [[event.kind, event.sample, event.character, event.name] for event in speech.events]
        header = json.dumps({"num_bytes": len(speech.samples), "events": events})
        outgoing.write(header.encode() + b"\n" + speech.samples)
        outgoing.flush()


def main() -> None:
    name, rate, pitch = sys.argv[1:]
    with os.fdopen(os.dup(1), "wb") as outgoing:
        os.dup2(2, 1)  # whatever the library prints must not get between the samples
        _serve(_Synthesiser(name, int(rate), int(pitch)), sys.stdin.buffer, outgoing)


if __name__ == "__main__":
    main()
