"""How is one file of this machine read, and what does it mean when it cannot be?

Local files are read without pyarrow, which costs less and tells errors apart better. Where files lie, here or in a
store, is root.py's question.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thawline.dataio.errors import ResourceError

_TEXT_BYTES = 64 << 20


class UnfitError(OSError):
    """A file that may not be read: its text says why, in a few words."""


HOPELESS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, UnfitError)
"""Errors for which another attempt would not help."""
_EXHAUSTED = {
    errno.EMFILE: "this process has as many files open as it may: raise the limit (ulimit -n 65536)",
    errno.ENFILE: "this machine has as many files open as it may: end what holds them (sysctl fs.file-max)",
    errno.ENOMEM: "this machine has no memory left: end other processes, or give smaller batches",
}
"""Errors that are not the file's fault: the process cannot read any file."""


def plain(file: str | Path) -> str:
    """A file's name without file:// in front; links stay as they are."""
    text = str(file)
    return unquote(urlsplit(text).path) if text.startswith("file://") else text


def text(file: str | Path) -> str:
    """The text of a small local file in UTF-8, with or without a byte order mark.

    Raises: OSError, UnfitError for one of more than 64 MiB; ValueError.
    """
    return read_local(str(Path(file).expanduser()), most=_TEXT_BYTES).decode("utf-8-sig")


def read_local(path: str, *, size: int | None = None, most: int | None = None) -> bytes:
    """The bytes of a file of this machine. Raises OSError.

    UnfitError is raised before anything is read: for what is not a regular file (a pipe or a device would block, or
    never end), for a size other than `size`, the one when it was indexed, and for more than `most` bytes. If the file
    grows meanwhile, no more is read than it had when it was opened.
    """
    # without O_NONBLOCK a pipe without a writer would block in open
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket; a device that is not there
            raise UnfitError("not a regular file") from error
        raise
    with open(handle, "rb", buffering=0) as file:  # noqa: PTH123
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(status.st_mode):
            raise UnfitError("not a regular file")
        check_size(status.st_size, size, most)
        pieces, left = [], status.st_size  # 0 of what lies in /proc, and nothing of it is read
        while left and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_regular(path: str) -> os.stat_result:
    """The status of a local file. Raises UnfitError for a pipe or a device, which would block or never end; OSError."""
    status = Path(path).stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise UnfitError("not a regular file")
    return status


def check_size(actual: int, size: int | None, most: int | None) -> None:
    """Raises UnfitError for a file of `actual` bytes that should have `size`, or has more than `most`."""
    if size is not None and actual != size:
        raise UnfitError(f"changed since it was indexed (it has {actual:,} bytes now)")
    if most is not None and actual > most:
        raise UnfitError(f"too large: {actual:,} bytes, and no more than {most:,} are read")


def why_unreadable(error: OSError) -> str:
    """Why a file cannot be read, in a few words, for a manifest's status and a run's record.

    Raises: ResourceError where the process cannot read any file: no image is at fault then.
    """
    if error.errno in _EXHAUSTED:
        raise ResourceError(
            f"{error.filename or 'a file'} could not be read ({os.strerror(error.errno)}), nor could any other: "
            f"{_EXHAUSTED[error.errno]}, and start again"
        ) from error
    if isinstance(error, UnfitError):
        return str(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "missing"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a file"
    if isinstance(error, PermissionError):
        return "permission denied"
    return f"cannot be read: {error.strerror or error}"


def why_refused(error: Exception) -> str:
    """A storage's error in one line, for a sentence."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else str(error).partition("\n")[0] or type(error).__name__


def as_array(data: bytes) -> NDArray[np.uint8]:
    """Bytes as engines take them, (bytes,) uint8, without a copy."""
    return np.frombuffer(data, np.uint8)


def as_table(data: bytes) -> pa.Table:
    """The rows of a Parquet file. Raises pa.ArrowException for another kind of file.

    In this thread alone: pq.read_table leaves the bytes to Arrow's threads, and one that releases them while Python
    shuts down aborts the process.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(use_threads=False)
