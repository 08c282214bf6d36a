"""Which shard an utterance is in, for a store of any size: a sorted file on disk, nothing in memory.

A million hours are some 10⁸ utterances in 10⁵ shards: their ids alone would take ten gigabytes of memory. The
catalogue is an SQLite file of (64-bit hash of the id, shard), about 40 bytes an utterance, made once and shared by
all processes; a look-up reads a handful of its pages. Two ids of one hash both name their shards: who looks up asks
the shard.
"""

import hashlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

_here = threading.local()


def build_catalogue(path: Path, ids_of_shards: Iterable[Iterable[str]]) -> None:
    """Write it under another name and rename it: processes that do so at the same time write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        connection = sqlite3.connect(partial)
        connection.execute("PRAGMA journal_mode = OFF")  # a file that is not complete is thrown away
        connection.execute("CREATE TABLE utterances (hash INTEGER, shard INTEGER)")
        for shard, ids in enumerate(ids_of_shards):
            rows = ((_hash(utterance_id), shard) for utterance_id in ids)
            connection.executemany("INSERT INTO utterances VALUES (?, ?)", rows)
        connection.execute("CREATE INDEX by_hash ON utterances (hash, shard)")  # sorted on disk
        connection.commit()
        connection.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def find_shards(path: Path, utterance_id: str) -> list[int]:
    """The shards that may hold the utterance, nearly always one or none."""
    rows = _connect(path).execute(
        "SELECT shard FROM utterances WHERE hash = ? ORDER BY shard", (_hash(utterance_id),)
    )
    return [shard for (shard,) in rows]


def _hash(utterance_id: str) -> int:
    digest = hashlib.blake2b(utterance_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _connect(path: Path) -> sqlite3.Connection:
    """Each thread and process, also a forked one, has its own; the file never changes, so nothing is locked."""
    key = (os.getpid(), path)
    if getattr(_here, "key", None) != key:
        _here.connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
        _here.key = key
    connection: sqlite3.Connection = _here.connection
    return connection
