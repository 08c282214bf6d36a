"""Kaldi's basic types, as text and as binary: tokens, integers, lists of integers, single-precision numbers.

A binary file begins with "\\0B", a text file with its contents. Source: Kaldi's base/io-funcs.
"""

import re
import struct
from collections.abc import Callable, Iterable
from typing import TypeVar

BINARY_HEADER = b"\0B"
Number = TypeVar("Number", int, float)
_WORD, _BINARY_WORD = re.compile(rb"\s*(\S+)\s?"), re.compile(rb"(\S+) ")


class KaldiReader:
    """Reads one file's contents in order. What is not there is a ValueError naming the file and the byte."""

    def __init__(self, contents: bytes, name: str) -> None:
        self.binary = contents.startswith(BINARY_HEADER)
        self.name = name
        self._contents = contents
        self._place = len(BINARY_HEADER) if self.binary else 0

    def token(self) -> str:
        """The next word; in a text file also a number or a bracket."""
        match = (_BINARY_WORD if self.binary else _WORD).match(self._contents, self._place)
        if match is None:
            raise self.error("a word", self._contents[self._place :].strip()[:1])
        self._place = match.end()
        return match[1].decode("utf-8", errors="replace")

    def expect(self, token: str) -> None:
        start = self._place
        got = self.token()
        if got != token:
            self._place = start
            raise self.error(token, got)

    def integer(self) -> int:
        """An int32, or a uint32."""
        if not self.binary:
            return self._parsed(int, "a whole number")
        width = self._take(1)
        if width not in (b"\x04", b"\xfc"):
            raise self.error("a whole number of 4 bytes", width)
        return int(struct.unpack("<i" if width == b"\x04" else "<I", self._take(4))[0])

    def integers(self) -> tuple[int, ...]:
        """`[ 1 2 3 ]`"""
        if self.binary:
            width = self._take(1)
            (size,) = struct.unpack("<i", self._take(4))
            if width != b"\x04" or size < 0:
                raise self.error("a list of whole numbers", width)
            return tuple(struct.unpack(f"<{size}i", self._take(4 * size)))
        self.expect("[")
        end = self._contents.find(b"]", self._place)
        if end < 0:
            raise self.error("] after a list of whole numbers", b"")
        words = self._contents[self._place : end].split()
        try:
            numbers = tuple(map(int, words))
        except ValueError:
            raise self.error("a list of whole numbers", b" ".join(words)[:40]) from None
        self._place = end + 1
        return numbers

    def number(self) -> float:
        """A float, in single precision."""
        if not self.binary:
            return self._parsed(float, "a number")
        width = self._take(1)
        if width != b"\x04":
            raise self.error("a number of 4 bytes", width)
        return float(struct.unpack("<f", self._take(4))[0])

    def error(self, needed: str, got: str | bytes) -> ValueError:
        found = repr(got) if got else "the end of the file"
        return ValueError(f"{self.name}, near byte {self._place}: {needed} is needed, got {found}")

    def _take(self, size: int) -> bytes:
        taken = self._contents[self._place : self._place + size]
        if len(taken) < size:
            raise self.error(f"{size} bytes more", b"")
        self._place += size
        return taken

    def _parsed(self, kind: Callable[[str], Number], needed: str) -> Number:
        word = self.token()
        try:
            return kind(word)
        except ValueError:
            raise self.error(needed, word) from None


class KaldiWriter:
    """Collects one file's contents, of either kind, byte for byte as Kaldi writes them."""

    def __init__(self, binary: bool) -> None:
        self.binary = binary
        self._parts: list[bytes] = []

    def token(self, token: str) -> None:
        self._parts.append(token.encode() + b" ")

    def integer(self, value: int) -> None:
        self._parts.append(b"\x04" + struct.pack("<i", value) if self.binary else b"%d " % value)

    def unsigned(self, value: int) -> None:
        self._parts.append(b"\xfc" + struct.pack("<I", value) if self.binary else b"%d " % value)

    def integers(self, values: Iterable[int]) -> None:
        values = tuple(values)
        if self.binary:
            self._parts.append(b"\x04" + struct.pack(f"<i{len(values)}i", len(values), *values))
        else:
            self._parts.append(b"[ " + b"".join(b"%d " % value for value in values) + b"]\n")

    def number(self, value: float) -> None:
        self._parts.append(b"\x04" + struct.pack("<f", value) if self.binary else f"{value:.7g} ".encode())

    def end_line(self) -> None:
        """Only in text."""
        if not self.binary:
            self._parts.append(b"\n")

    def contents(self) -> bytes:
        """Without the header of a binary file."""
        return b"".join(self._parts)
