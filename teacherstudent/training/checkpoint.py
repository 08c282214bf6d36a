"""Files of tensors: whole or absent, and the same bytes for the same contents."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def save(path: Path, contents: Any) -> None:
    """Atomically. torch.save would bake the file's name into its bytes; a buffer has none."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def load(path: Path) -> Any:
    """Raises ValueError naming the file when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: the step that trains it has not run")
    try:
        with zipfile.ZipFile(path) as archive:  # torch reads past wrong checksums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor readers each raise their own
        raise ValueError(
            f"{path} cannot be read: {error}; remove the folder of that training and train again"
        ) from None
