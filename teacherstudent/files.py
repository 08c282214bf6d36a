"""Files that are whole or absent, and their hashes."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from teacherstudent.locks import create_locked


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk_files(folder: Path) -> list[Path]:
    """Every file at any depth but hidden ones, sorted. Links to folders are followed, each folder once."""
    found: list[Path] = []
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link to a folder above it would lead here for ever
            folders.clear()
            continue
        entered.add(real)
        folders.sort()  # the order in which they are entered
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def split_lines(text: str) -> list[str]:
    """The lines as other tools count them: str.splitlines also cuts at form feeds, U+0085, U+2028 and the like."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old contents or the new, never half."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with create_locked(temporary) as file:
        file.write(text.encode("utf-8"))
        file.flush()
        temporary.replace(path)


def write_json(path: Path, contents: Any) -> None:
    """In the order given, which the caller makes the same every time. Raises ValueError for numbers that are not
    finite, which JSON cannot hold: None says that there is none.
    """
    write_text(path, json.dumps(contents, indent=1, allow_nan=False) + "\n")
