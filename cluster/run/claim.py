"""Who may write into a run's folder? One launch at a time: it holds the folder's claim until it ends.

The claim is `claim.json` in the folder: the process, its host, its start, and a heartbeat. In a local folder the file
is also locked, and a lock ends with its process, however that ends: the next start on the same machine takes over at
once. Elsewhere (a store, a folder that several machines mount) only the heartbeat counts: a launch that meets a claim
watches it, and takes over a claim whose heartbeat has stopped. Clocks are never compared.

The launcher holds the claim, not its workers: a driver holds it through all their restarts.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import cache
from pathlib import Path

import pyarrow as pa

from thawline.cluster.errors import StorageError
from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root

FILE = "claim.json"
BEAT_S = 5.0
_MISSED = 6
"""Missed beats after which a claim has ended: a store may be slow for some of them."""
_SETTLE_S = 2.0
"""Stores have no locks: of two that claim at once, the one that wrote first sees the other's claim after this time."""
_BYTES = 512
_BOOT = Path("/proc/sys/kernel/random/boot_id")

_locked: set[int] = set()
"""Descriptors that a forked child must close: a lock would outlive us in it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder. machine: the scope of its locks; beat: the number of the heartbeat."""

    host: str
    pid: int
    since: str
    machine: str
    token: str
    beat_s: float
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def claimed(
    root: Root,
    *,
    tell: Callable[[str], None],
    beat_s: float = BEAT_S,
    lost: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold a run's folder, or its URI, until the block ends; it is made if it is missing.

    tell: called when a claim is watched or taken over. lost: called in a thread, with a sentence, when another launch
    has taken over the folder while this process was suspended; by default it ends the process at once.
    Raises StorageError when somebody else holds it; OSError, pa.ArrowException when the storage refuses.
    """
    claim = _Claim(root, beat_s, lost or _end)
    claim.acquire(tell)
    try:
        claim.begin()
        yield
    finally:
        claim.release()


class _Claim:
    def __init__(self, root: Root, beat_s: float, lost: Callable[[str], None]) -> None:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        self._root, self._lost = root, lost
        self._mine = Holder(socket.gethostname(), os.getpid(), now, _machine(), uuid.uuid4().hex, beat_s)
        self._fd: int | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, tell: Callable[[str], None]) -> None:
        """Write this process's claim."""
        alone = self._lock()
        try:
            holder = self._read()
            here = alone and holder is not None and holder.machine == self._mine.machine
            if holder is not None and not here and self._is_alive(holder, tell):
                raise self._refusal(self._read() or holder)
            self._write()
            if not alone:
                time.sleep(_SETTLE_S)
                if (other := self._read()) is not None and other.token != self._mine.token:
                    raise self._refusal(other)
        except BaseException:
            with suppress(OSError, pa.ArrowException):  # a full storage: leave nothing half-written
                if self._fd is not None and self._read() is None:
                    self._root.remove(FILE)
                    self._root.folder.rmdir()
            self._close()
            raise
        if holder is not None:
            tell(f"{self._root} was held by {holder}, which is gone: taken over")

    def begin(self) -> None:
        """Start the heartbeat."""
        self._thread = threading.Thread(target=self._beat, name="thawline-claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the folder."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError, pa.ArrowException):  # the claim is then stale, and the next start says so
            holder = self._read()
            if holder is not None and holder.token == self._mine.token:
                self._root.remove(FILE)
            if not self._root.remote:
                self._root.folder.rmdir()  # where nothing was written
        self._close()

    def _lock(self) -> bool:
        """Lock the file; return whether locks work here. Raises StorageError where another process holds it."""
        if self._root.remote:
            return False
        path = self._root.folder / FILE
        _close_in_forks()
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            _locked.add(self._fd)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._read()
                self._close()
                raise self._refusal(holder) from None
            except OSError:  # some network file systems have no locks
                return False
            if _is_at(self._fd, path):
                return True
            self._close()  # its holder has removed it in the meantime

    def _is_alive(self, holder: Holder, tell: Callable[[str], None]) -> bool:
        """Whether the holder of a claim is alive."""
        for_s = _MISSED * holder.beat_s
        tell(f"{self._root} is held by {holder}: waiting up to {for_s:.0f} s to see whether it is alive")
        until = time.monotonic() + for_s
        while time.monotonic() < until:
            time.sleep(min(1.0, holder.beat_s / 2))
            current = self._read()
            if current != holder:
                return current is not None  # None: it has ended
        return False

    def _beat(self) -> None:
        while not self._ended.wait(self._mine.beat_s):
            with suppress(OSError, pa.ArrowException):  # the storage failed: the next beat may succeed
                holder = self._read()
                if holder is not None and holder.token != self._mine.token:
                    self._lost(
                        f"{self._root} was taken over by {holder}, while this process was suspended: it ends here, "
                        "so that the two do not overwrite each other"
                    )
                    return
                self._write()

    def _read(self) -> Holder | None:
        try:
            data = self._root.read(FILE)
        except FileNotFoundError:
            return None
        try:
            values = json.loads(data)
            return Holder(**{field.name: field.type(values[field.name]) for field in fields(Holder)})  # type: ignore[operator]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None  # empty, as it is when it was just made

    def _write(self) -> None:
        self._mine = replace(self._mine, beat=self._mine.beat + 1)
        data = json.dumps(asdict(self._mine)).encode().ljust(_BYTES)
        if self._fd is not None:
            os.pwrite(self._fd, data, 0)  # in place: a new file would not be locked
        else:
            with atomic_write(self._root, FILE) as sink:
                sink.write(data)

    def _close(self) -> None:
        if self._fd is not None:
            _locked.discard(self._fd)
            os.close(self._fd)
            self._fd = None

    def _refusal(self, holder: Holder | None) -> StorageError:
        return StorageError(
            f"{self._root} is held by {holder or 'another process'}: two at once would overwrite each other; wait "
            "for it, stop it, or give another --name"
        )


def _machine() -> str:
    """The scope of a lock: the processes of one kernel, containers included."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _is_at(fd: int, path: Path) -> bool:
    try:
        at_path = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(fd)
    return (own.st_dev, own.st_ino) == (at_path.st_dev, at_path.st_ino)


@cache
def _close_in_forks() -> None:
    os.register_at_fork(after_in_child=_close_in_child)


def _close_in_child() -> None:
    for fd in _locked:
        with suppress(OSError):
            os.close(fd)
    _locked.clear()


def _end(sentence: str) -> None:
    """End the process at once: another one is writing there already."""
    with suppress(OSError):
        os.write(2, f"\nthawline: {sentence}\n".encode())
    os._exit(1)
