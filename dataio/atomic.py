"""How does a file appear whole or not at all? Hashed as it is written; in a folder, or below a URI."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import xxhash

from dataio import files

_AT_CLOSE = ("s3", "gcs", "abfs")  # an object appears when its stream is closed; elsewhere files are moved into place


class Sink(io.RawIOBase):
    """Passes bytes on, counts and hashes them."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self.bytes = 0
        self.digest = xxhash.xxh3_128()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self._out.write(data)
        written = memoryview(data).nbytes
        self.bytes += written
        return written


@contextmanager
def whole(dest: str, name: str) -> Iterator[Sink]:
    """Where to write a file that appears in `dest` when the block has ended well, and not before; else not at all."""
    filesystem, base = files.open_root(dest)
    at_once = filesystem.type_name in _AT_CLOSE
    temporary = f"{base}/{name}" if at_once else f"{base}/.{name}.tmp"
    out = filesystem.open_output_stream(temporary)
    try:
        yield Sink(out)
        out.close()
        if not files.is_remote(dest):
            _sync(temporary)
        if not at_once:
            filesystem.move(temporary, f"{base}/{name}")
    except BaseException:
        with contextlib.suppress(OSError):
            out.close()  # which makes an object of what there is
        with contextlib.suppress(OSError):
            filesystem.delete_file(temporary)
        raise
    if not files.is_remote(dest):
        _sync(base)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
