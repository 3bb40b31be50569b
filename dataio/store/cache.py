"""Where do shards of an object store lie on this machine? In a folder of bounded size that all processes share.

Each data set has a folder there. A process that uses it holds a shared lock on its `use` file, so that its shards are
not evicted meanwhile; `bytes` beside it says how much it needs. Each shard is locked during its download: the first
process fetches it, the others wait for it. A name without .part is a whole shard, compared with its hash. Locks are the
kernel's (flock): they end with their process, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from thawline.dataio.errors import ShardError
from thawline.dataio.store.private import cache_home
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Shard

_WAITS_S = (0.2, 1.0, 4.0)
_THREADS = 4  # shards at a time: one connection rarely fills a link
_CHUNK_BYTES = 8 << 20
_GIB = 1 << 30
_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the local folder, which another attempt to download would meet again."""

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all), from any thread, one call at a time"""


class Held:
    """Shards on this machine that are not evicted until `release`, or the end of this process."""

    def __init__(self, paths: Sequence[Path], lock: int) -> None:
        self.paths = paths
        self._close = weakref.finalize(self, os.close, lock)

    def release(self) -> None:
        """Allow their eviction; a second call does nothing."""
        self._close()


class _BrokenError(OSError):
    """A download that is not the shard."""


def default_folder() -> Path:
    """$XDG_CACHE_HOME/thawline/shards, or the same below ~/.cache."""
    return cache_home() / "thawline" / "shards"


def hold(
    home: Root,
    shards: Sequence[Shard],
    *,
    folder: str | Path | None = None,
    limit_gib: float = 100.0,
    progress: Progress | None = None,
) -> Held:
    """Download these shards from the URI `home` into the cache, and hold them there.

    Data sets that are not in use are evicted to make room, the least recently used first. `limit_gib` bounds the cache.
    Raises: ShardError when the shards exceed the limit, arrive damaged repeatedly, or cannot be written.
    """
    cache = default_folder() if folder is None else Path(folder).expanduser()
    limit, need = int(limit_gib * _GIB), sum(shard.bytes for shard in shards)
    if need > limit:
        raise ShardError(
            f"the {len(shards)} shards in {home} have {_gib(need)}, and the cache {cache} may hold {_gib(limit)}: they "
            "cannot be kept here; raise data.cache_gib, or train from the loose files"
        )
    key = xxhash.xxh3_128_hexdigest("\n".join(shard.hash for shard in shards).encode())
    try:
        mine, lock = _claim(cache, key, need, limit)
    except OSError as error:
        raise ShardError(_unwritable(cache, error)) from error
    held = Held([mine / f"{k:05}.arrow" for k in range(len(shards))], lock)
    try:
        _Fetching(home, shards, held.paths, progress).all()
    except BaseException:
        held.release()
        raise
    return held


# What may stay there ---------------------------------------------------------------------------------------


def _claim(cache: Path, key: str, need: int, limit: int) -> tuple[Path, int]:
    """Mark a data set as in use, and evict others to make room: its folder, and the lock to be closed."""
    mine = cache / key
    mine.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        mine.mkdir(exist_ok=True)  # it may just have been evicted
        (mine / "bytes").write_text(str(need), encoding="utf-8")
        lock = os.open(mine / "use", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)  # at once: the exclusive lock is taken only under the lock above
            _make_room(cache, mine, limit - need)
        except BaseException:
            os.close(lock)
            raise
    return mine, lock


@dataclass(frozen=True, order=True)
class _Idle:
    """A file that is not in use; in order of eviction."""

    used_ns: int
    path: Path
    bytes: int


def _make_room(cache: Path, mine: Path, allowed: int) -> None:
    """Evict until all other data sets together have `allowed` bytes; one in use counts with all that it will need."""
    in_use, idle, folders = 0, list[_Idle](), list[Path]()
    for claim in sorted(cache.glob("*/bytes")):  # only files of the cache: the folder may hold others
        folder = claim.parent
        if folder == mine:
            continue
        if _is_used(folder):
            said = claim.read_text(encoding="utf-8")
            in_use += int(said) if said.isdecimal() else 0  # cut short by a kill while it was written
            continue
        folders.append(folder)
        for file in (*folder.glob("*.arrow"), *folder.glob("*.arrow.part")):
            status = file.stat()
            whole = file.suffix == ".arrow"  # what a dead process left unfinished is of no use
            idle.append(_Idle(status.st_mtime_ns if whole else 0, file, status.st_size))
    if in_use > allowed:
        raise ShardError(
            f"runs that go on now use {_gib(in_use)} of the cache {cache}, and only {_gib(allowed)} can be spared "
            "beside this data set: nothing more fits; raise data.cache_gib, or wait until one has ended"
        )
    total = in_use + sum(file.bytes for file in idle)
    for old in sorted(idle):
        if total > allowed or old.path.suffix != ".arrow":
            old.path.unlink()
            total -= old.bytes
    for folder in folders:
        if not any(folder.glob("*.arrow")):
            for file in (*folder.glob("*.lock"), folder / "use", folder / "bytes"):
                file.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


def _is_used(folder: Path) -> bool:
    lock = os.open(folder / "use", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """A lock between all processes and threads of this machine that name the same file; waits for it."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


# Downloads ------------------------------------------------------------------------------------------------


class _Fetching:
    """The downloads of one process, and their progress."""

    def __init__(self, home: Root, shards: Sequence[Shard], paths: Sequence[Path], progress: Progress | None) -> None:
        self._home, self._shards, self._paths, self._progress = home, shards, paths, progress
        self._total = sum(shard.bytes for shard in shards)
        self._done = [0] * len(shards)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def all(self) -> None:
        """Wait until every shard is here. Raises ShardError for the first that cannot be downloaded."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="thawline-cache") as pool:
            try:
                for _ in pool.map(self._one, range(len(self._shards))):
                    pass
            finally:  # before the pool waits for its threads
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, k: int) -> None:
        shard, path = self._shards[k], self._paths[k]
        if self._stopped.is_set():
            return
        try:
            with locked(path.with_suffix(".lock")):
                if path.is_file() and path.stat().st_size == shard.bytes:
                    os.utime(path)  # used now: the last to be evicted
                else:
                    self._persist(k)
        except OSError as error:
            raise ShardError(_unwritable(path.parent.parent, error)) from error
        self._tell(k, shard.bytes)

    def _persist(self, k: int) -> None:
        shard = self._shards[k]
        for wait_s in (*_WAITS_S, None):
            try:
                self._attempt(k)
                return
            except OSError as error:
                if error.errno in _OUR_DISK:
                    raise
                if wait_s is None or self._stopped.is_set() or isinstance(error, FileNotFoundError):
                    raise ShardError(
                        f"{self._home.full(shard.name)} cannot be fetched ({error}): its {shard.rows:,} "
                        "samples would be missing; check the network and start again, or, if it is damaged there, "
                        "pack again"
                    ) from error
            self._stopped.wait(wait_s)

    def _attempt(self, k: int) -> None:
        shard, path = self._shards[k], self._paths[k]
        part = path.with_suffix(".arrow.part")
        digest, done = xxhash.xxh3_128(), 0
        try:
            with self._home.stream(shard.name) as source, part.open("wb") as out:
                while len(chunk := source.read_buffer(_CHUNK_BYTES)) and done <= shard.bytes:
                    if self._stopped.is_set():
                        raise _BrokenError("interrupted")
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    self._tell(k, min(done, shard.bytes))
                out.flush()
                os.fsync(out.fileno())
            if done != shard.bytes or digest.hexdigest() != shard.hash:
                raise _BrokenError(f"{done:,} of {shard.bytes:,} bytes came, with xxh3_128 {digest.hexdigest()}")
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink()

    def _tell(self, k: int, done: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done[k] = done
                self._progress(sum(self._done), self._total)


def _unwritable(cache: Path, error: OSError) -> str:
    return (
        f"the cache {cache} cannot be written ({error.strerror or error}): the shards cannot be kept here; make room "
        "there, or give another folder as data.cache"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:,.3g} GiB"
