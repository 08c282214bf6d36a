"""Where shards lie: in a local folder, or at any URL that fsspec opens (s3://, gs://, …) behind a local cache.

The cache holds whole shards, each checked against the SHA-256 beside the original, and no more bytes than it may, but
for downloads under way. Processes share it, by one lock: files come and go while nobody else looks, and the one that
was used longest ago makes room. A shard that several want is brought once.
"""

import fcntl
import hashlib
import os
import secrets
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import h5py

from teacherstudent.data.packed import Hold, PackedShard, count_shards, hash_line, hash_path, shard_path
from teacherstudent.data.packed_index import naming, read_index
from teacherstudent.files import hash_file, hash_text
from teacherstudent.locks import lock_file

CACHE_BYTES = 20 << 30
_ABANDONED_SECONDS = 3600.0  # a download that did not grow for so long is nobody's any more
_DOWNLOAD_LOCKS = 16  # one for very many shards: two of them rarely wait for each other
_REMOTE_BLOCK_BYTES = 1 << 16  # read at a time where only the ids of a shard are wanted


def default_cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teacherstudent"


class ShardFolder:
    """The shards stem.000000.h5, stem.000001.h5, … of a folder or URL; may be pickled.

    `cache_folder` and `cache_bytes` matter for URLs. Raises ValueError when there are no shards, or one is missing.
    """

    def __init__(
        self,
        url: Path | str,
        stem: str,
        cache_folder: Path | str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.url = str(url)
        self.stem = stem
        self.cache_folder = Path(cache_folder) if cache_folder else default_cache_folder()
        self.is_remote = "://" in self.url
        place = self.cache_folder / hash_text(self.url)[:16]
        self._local = place if self.is_remote else Path(self.url)
        self._hold: Hold | None = None
        if self.is_remote:
            self._hold = _Cache(self.cache_folder, self.url, cache_bytes).hold
        self.num_shards = count_shards(self._names(), self.url, stem)

    def open(self, number: int) -> PackedShard:
        """Not read before it is used."""
        return PackedShard(shard_path(self._local, self.stem, number), self._hold)

    def name(self, number: int) -> str:
        return shard_path(self.url, self.stem, number).name

    def num_bytes(self, number: int) -> int:
        """Of the shard and the hash beside it."""
        paths = (self._path(number), hash_path(self._path(number)))
        if not self.is_remote:
            return sum(path.stat().st_size for path in paths if path.exists())
        files, folder = _open_url(self.url)
        return sum(int(files.size(f"{folder}/{path.name}")) for path in paths)

    def ids(self, number: int) -> tuple[str, ...]:
        """The utterances of a shard, without fetching all of it."""
        if not self.is_remote:
            return PackedShard(self._path(number)).ids
        files, folder = _open_url(self.url)
        path = self._path(number)
        stream = files.open(f"{folder}/{path.name}", "rb", block_size=_REMOTE_BLOCK_BYTES)
        with naming(path), stream, h5py.File(stream, "r") as file:
            return read_index(file, path).ids

    def orphans(self) -> list[str]:
        """Hashes whose shard is missing."""
        names = set(self._names())
        ends = hash_path(Path(".h5")).name
        hashes = (name for name in names if name.startswith(f"{self.stem}.") and name.endswith(ends))
        return sorted(name for name in hashes if name.removesuffix(".sha256") not in names)

    def signature(self) -> str:
        """Changes when shards come, go or are written anew."""
        digest = hashlib.sha256(self.url.encode())
        for name, state in sorted(self._list()):
            if name.startswith(f"{self.stem}.") and name.endswith(".h5"):
                digest.update(f"{name} {state}\n".encode())
        return digest.hexdigest()

    def _path(self, number: int) -> Path:
        return shard_path(self._local, self.stem, number)

    def _names(self) -> Iterator[str]:
        """Of all files; of local ones without asking for the state of each, which takes long for very many."""
        if self.is_remote:
            return (name for name, _ in self._list())
        if not self._local.is_dir():
            raise ValueError(f"{self.url} is no folder: name one that holds {self.stem}.000000.h5, …")
        return iter(os.listdir(self._local))

    def _list(self) -> Iterator[tuple[str, str]]:
        """Name and state of each file: what changes with its contents."""
        if not self.is_remote:
            for entry in os.scandir(self._local):
                state = entry.stat()
                yield entry.name, f"{state.st_size} {state.st_mtime_ns}"
            return
        files, folder = _open_url(self.url)
        for item in files.ls(folder, detail=True):
            changed = next((item[key] for key in ("ETag", "mtime", "updated", "created") if key in item), "")
            yield item["name"].rsplit("/", 1)[-1], f"{item.get('size')} {changed}"


class _Cache:
    """Brings shards of one URL to a folder that holds those of many, `max_bytes` in all."""

    def __init__(self, folder: Path, url: str, max_bytes: int) -> None:
        self._folder = folder
        self._url = url
        self._max_bytes = max_bytes

    @contextmanager
    def hold(self, path: Path) -> Iterator[None]:
        """While it lasts `path`, a shard in the cache, is there and holds what the original held when it began.

        Whoever opens the shard meanwhile keeps it, also when it makes room afterwards.
        """
        line = self._original_line(path)
        while True:  # what was brought may have made room before it is held
            with self._locked(fcntl.LOCK_SH):
                if self._has(path, line):
                    now = time.time_ns()  # the file system's own clock ticks in milliseconds
                    os.utime(path, ns=(now, now))  # used now: the last to make room
                    yield
                    return
            self._bring(path, line)

    def _has(self, path: Path, line: str) -> bool:
        beside = hash_path(path)
        return path.exists() and beside.exists() and beside.read_text(encoding="utf-8") == line

    def _bring(self, path: Path, line: str) -> None:
        """Download the shard, unless another process does so at this moment: then wait for it."""
        place = zlib.crc32(str(path).encode()) % _DOWNLOAD_LOCKS
        with self._locked(fcntl.LOCK_EX, f".lock{place}"):
            with self._locked(fcntl.LOCK_SH):
                if self._has(path, line):
                    return
            partial, beside = self._download(path, line), hash_path(path)
            try:
                with self._locked(fcntl.LOCK_EX):
                    beside.unlink(missing_ok=True)  # a kill in between leaves a shard that is fetched anew
                    partial.replace(path)
                    beside.write_text(line, encoding="utf-8")
                    self._make_room(0)  # downloads side by side may have reserved more than there is
            finally:
                partial.unlink(missing_ok=True)

    def _original_line(self, path: Path) -> str:
        """What the file beside the original says that it holds."""
        files, folder = _open_url(self._url)
        name = hash_path(path).name
        try:
            return str(files.cat_file(f"{folder}/{name}").decode())
        except FileNotFoundError as error:
            what = f"{path.name} has no {name} beside it, which says what it must hold"
            raise ValueError(f"{self._url}: {what}. Copy it there too") from error

    def _download(self, path: Path, line: str) -> Path:
        """The shard, checked, beside the place that it shall have."""
        files, folder = _open_url(self._url)
        remote = f"{folder}/{path.name}"
        partial = self._reserve(path, int(files.size(remote)))
        try:
            files.get_file(remote, str(partial))
            if hash_line(path, hash_file(partial)) != line:
                what = f"{path.name} is not what {hash_path(path).name} says: it is damaged, or was being written"
                raise ValueError(f"{self._url}: {what}. Try again, or write the shard again")
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return partial

    def _reserve(self, path: Path, num_bytes: int) -> Path:
        """Take the room of a file before it is there, so that others who make room count it."""
        if num_bytes > self._max_bytes:
            what = f"the cache may hold {self._max_bytes} bytes, {path.name} has {num_bytes}"
            raise ValueError(f"{self._url}: {what}: raise cache_bytes")
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.{num_bytes}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_EX):
            self._make_room(num_bytes)
            partial.touch()
        return partial

    def _make_room(self, num_bytes: int) -> None:
        """Those used longest ago go first; who has one of them open keeps what is open."""
        states = []
        for path in (*self._folder.glob("*/*.h5"), *self._folder.glob("*/.*.partial")):
            try:
                states.append((path.stat().st_mtime, path, _bytes_of(path)))
            except FileNotFoundError:
                continue  # a download that failed, or what somebody removed
        total = sum(size for _, _, size in states) + num_bytes
        for time_used, path, size in sorted(states):
            if total <= self._max_bytes:
                return
            if path.suffix == ".h5" or time.time() - time_used > _ABANDONED_SECONDS:
                hash_path(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                total -= size

    def _locked(self, kind: int, name: str = ".lock") -> ExitStack:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            return lock_file(self._folder / name, kind)
        except OSError as error:
            raise ValueError(
                f"{self._folder / name} cannot be locked ({error.strerror}): keep the cache on a local disk where you "
                "may write (cache_folder, or XDG_CACHE_HOME)"
            ) from error


def _bytes_of(path: Path) -> int:
    """What a file of the cache takes, or will take: a download has that in its name."""
    reserved = path.name.split(".")[-2] if path.suffix == ".partial" else ""
    return int(reserved) if reserved.isdecimal() else path.stat().st_size


def _open_url(url: str) -> tuple[Any, str]:
    """The file system and the folder on it. fsspec keeps one open for each process and thread."""
    try:
        files, folder = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"{url}: {error}. Install what fsspec needs for it, or copy the store here"
        ) from error
    return files, folder.rstrip("/")
