"""How is a file written whole or not at all, and hashed meanwhile? In a folder, or below a URI."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import io
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import xxhash

from thawline.dataio.store.root import Root

_BUFFER_BYTES = 1 << 20
"""For files that torch and Arrow write in many small pieces."""


class Sink(io.RawIOBase):
    """Writes bytes through to a file; counts and hashes them."""

    def __init__(self, out: Any, digest: Any) -> None:
        self._out = out
        self.bytes = 0
        self.digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self._out.write(data)
        written = memoryview(data).nbytes
        self.bytes += written
        return written


@contextmanager
def atomic_write(root: Root, name: str, *, digest: Callable[[], Any] = xxhash.xxh3_128) -> Iterator[Sink]:
    """A sink for a file that appears in `root` when the block ends without an error, and otherwise not at all.

    A missing folder is made. digest: makes the hash, as hashlib's and xxhash's constructors do.
    """
    with _in_store(root, name) if root.remote else _in_folder(root.folder, name) as out:
        yield Sink(out, digest())


@contextmanager
def _in_folder(folder: Path, name: str) -> Iterator[IO[bytes]]:
    _make_folder(folder)
    temporary = folder / f".{name}.{uuid.uuid4().hex[:12]}.tmp"  # another writer may be at the same file
    out = io.BufferedWriter(_create(temporary), _BUFFER_BYTES)
    alive = _lock(str(temporary))
    try:
        yield out
        out.close()
        _sync(str(temporary))
        temporary.replace(folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            out.close()
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        if alive is not None:
            os.close(alive)
    _sync(str(folder))


@contextmanager
def _in_store(root: Root, name: str) -> Iterator[pa.NativeFile]:
    filesystem, base = root.opened
    temporary = f"{base}/{name}" if root.at_once else f"{base}/.{name}.{uuid.uuid4().hex[:12]}.tmp"
    if not root.at_once:
        filesystem.create_dir(base, recursive=True)
    out = filesystem.open_output_stream(temporary)
    try:
        yield out
        out.close()
        if not root.at_once:
            filesystem.move(temporary, f"{base}/{name}")
    except BaseException:
        with contextlib.suppress(OSError):
            out.close()  # which makes an object of what there is
        with contextlib.suppress(OSError):
            filesystem.delete_file(temporary)
        raise


def _create(file: Path) -> io.RawIOBase:
    return io.FileIO(file, "xb")


def sweep(root: Root, *, of: str | None = None) -> None:
    """Remove the temporary files of killed writers from a local folder, of one file or of all. Raises OSError."""
    if root.remote:
        return
    for left in root.folder.glob(".*.tmp" if of is None else f".{glob.escape(of)}.*.tmp"):
        if (fd := _lock(str(left))) is not None:
            left.unlink(missing_ok=True)
            os.close(fd)


def _lock(temporary: str) -> int | None:
    """A descriptor that locks the file until it is closed; None where another has the lock, or there are no locks."""
    fd = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _make_folder(folder: Path) -> None:
    """A folder is an entry in the one above it, which has to reach the disk as well."""
    if folder.is_dir():
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in made:
        _sync(str(each.parent))


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
