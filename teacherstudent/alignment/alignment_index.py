"""Alignments by utterance id, on disk: files that hold those of a whole corpus are read once, in their own order.

The archives of an alignment are in any order and know nothing of our shards, and the ids of a large corpus do not fit
into memory. So one pass over them fills an SQLite file, in which each shard's process then looks its utterances up.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from teacherstudent.alignment.alignments import AlignmentError

Record = bytes | str  # an utterance's alignment as it stands in its file, or where that file is


def write_index(path: Path, records: Iterable[tuple[str, Record]], join: bool = False) -> None:
    """Atomically. Records of one id are joined in their order; without `join` the id has none that can be used."""
    conflict = "record || excluded.record" if join else "NULL"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(temporary, isolation_level=None)) as base:
            base.execute("PRAGMA journal_mode = OFF")  # the file appears complete or not at all
            base.execute("PRAGMA synchronous = OFF")
            base.execute("CREATE TABLE records (id TEXT PRIMARY KEY, record)")
            base.execute("BEGIN")
            base.executemany(
                f"INSERT INTO records VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = {conflict}",
                records,
            )
            base.execute("COMMIT")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class AlignmentIndex:
    """Reads what write_index wrote; may be pickled (it is reopened by path)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._base: sqlite3.Connection | None = None

    def __reduce__(self) -> tuple[type["AlignmentIndex"], tuple[Path]]:
        return type(self), (self.path,)

    def __getitem__(self, utterance_id: str) -> Record | None:
        """None for an id that is not there. Raises AlignmentError for one that is there more than once."""
        found = self._select("SELECT record FROM records WHERE id = ?", utterance_id)
        row = next(found, None)
        if row is None:
            return None
        if row[0] is None:
            raise AlignmentError("more than one alignment: the id occurs again, in this or another file")
        return row[0]

    def __len__(self) -> int:
        return next(self._select("SELECT count(*) FROM records"))[0]

    def first_ids(self, number: int) -> list[str]:
        return [row[0] for row in self._select("SELECT id FROM records ORDER BY id LIMIT ?", number)]

    def _select(self, query: str, *values: object) -> Iterator[tuple]:
        if self._base is None:
            self._base = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)
        return self._base.execute(query, values)
