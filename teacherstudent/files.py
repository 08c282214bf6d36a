"""Files that are whole or absent, and their hashes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old contents or the new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, contents: Any) -> None:
    """In the order given, which the caller makes the same every time."""
    write_text(path, json.dumps(contents, indent=1) + "\n")
