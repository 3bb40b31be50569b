"""Where do bytes lie? In a folder of this machine, or below a URI that pyarrow's filesystems understand.

A root is a text: an absolute folder, or a URI such as s3://bucket/photos, gs://..., hdfs://... with whatever options
pyarrow.fs takes behind a question mark. Below it, files go by relative names. Local files are read without pyarrow,
which costs less and tells errors apart better.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from dataio.errors import ResourceError, SourceError, quoted

OBJECT_STORES = ("s3", "gcs", "abfs")
"""pyarrow's names of filesystems without folders: an object appears when its stream is closed, and none is renamed."""
_RETRIES_S = (0.1, 1.0)
_TEXT_BYTES = 64 << 20


class UnfitError(OSError):
    """What lies at a name is not what may be read there: its text says why, in a few words."""


_HOPELESS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, UnfitError)
_EXHAUSTED = {
    errno.EMFILE: "this process has as many files open as it may: raise the limit (ulimit -n 65536)",
    errno.ENFILE: "this machine has as many files open as it may: end what holds them (sysctl fs.file-max)",
    errno.ENOMEM: "this machine has no memory left: end other processes, or give smaller batches",
}
"""Not the file's fault: the process could not read any other."""


def normal_root(root: str | Path) -> str:
    """The root as manifests keep it: an absolute folder, links resolved, or a URI without a slash at its end.

    Raises: SourceError for a URI with a password in it, which would end in manifests and logs; for a name with a NUL.
    """
    text = plain(root)
    if "\0" in text:
        raise SourceError(f"{quoted(text)} holds a NUL, which no name can: nothing lies there; correct it")
    if "://" not in text:
        return Path(text).expanduser().resolve().as_posix()
    parts = urlsplit(text)
    if parts.password is not None:
        raise SourceError(
            f"the URI of {parts.hostname} carries a password, which would be written into manifests and logs: give it "
            "by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the store's own way)"
        )
    return parts._replace(path=parts.path.rstrip("/")).geturl()


def plain(file: str | Path) -> str:
    """A file's name without file:// in front, links as they are: what lies here is looked at before it is read."""
    text = str(file)
    return unquote(urlsplit(text).path) if text.startswith("file://") else text


def is_remote(root: str) -> bool:
    """Whether the root is a URI."""
    return "://" in root


def below(root: str, name: str) -> str:
    """The root of what lies at `name` below `root`; for folders, messages, and `normal_root` once more."""
    if not is_remote(root):
        return name if name.startswith("/") else f"{root.rstrip('/')}/{name}"
    parts = urlsplit(root)
    return parts._replace(path=f"{parts.path}/{name}").geturl()


def above(name: str) -> str:
    """The root in which a file of this full name lies; a URI keeps its options."""
    if not is_remote(name):
        return name.rpartition("/")[0] or "/"
    parts = urlsplit(name)
    return parts._replace(path=parts.path.rpartition("/")[0]).geturl()


def last(name: str) -> str:
    """The last part of a full name: what the file is called within `above(name)`."""
    return (urlsplit(name).path if is_remote(name) else name).rpartition("/")[2]


@lru_cache(maxsize=64)
def open_root(root: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a root, and the root's path within it. Raises SourceError when there is no such filesystem."""
    if not is_remote(root):
        return pafs.LocalFileSystem(), root
    try:
        filesystem, path = pafs.FileSystem.from_uri(root)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(
            f"{root} cannot be opened ({error}): nothing can be listed or read there; give a folder, or a URI that "
            "pyarrow.fs understands (s3://, gs://, hdfs://)"
        ) from error
    return filesystem, path.rstrip("/")


def read(root: str, name: str, *, size: int | None = None, most: int | None = None) -> bytes:
    """The bytes of a file below a root (or at an absolute local name). Raises OSError.

    UnfitError is raised before anything is read: for what is no regular file (a pipe or a device would block, or never
    end), for one whose bytes are not `size`, what it had when it was indexed, and for more than `most` bytes. Of a
    file that grows meanwhile no more is read than it had when it was opened. What may pass (a network file system that
    hiccups) is tried again twice within about a second; one that hangs cannot be interrupted.
    """
    for wait_s in (*_RETRIES_S, None):
        try:
            if not is_remote(root):
                return _read_local(below(root, name), size, most)
            filesystem, base = open_root(root)
            with filesystem.open_input_file(f"{base}/{name}") as file:
                _check_size(file.size(), size, most)
                return file.read()
        except _HOPELESS:
            raise
        except OSError:
            if wait_s is None:
                raise
            time.sleep(wait_s)
    raise AssertionError


def text(file: str | Path) -> str:
    """What a local file says in UTF-8, with or without a byte order mark; a small one, written by hand or for people.

    Raises: OSError, UnfitError for one of more than 64 MiB; ValueError.
    """
    return _read_local(str(Path(file).expanduser()), None, _TEXT_BYTES).decode("utf-8-sig")


def _read_local(path: str, size: int | None, most: int | None) -> bytes:
    # without O_NONBLOCK a pipe that nobody writes to would block in open
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket; a device that is not there
            raise UnfitError("not a regular file") from error
        raise
    with open(handle, "rb", buffering=0) as file:  # noqa: PTH123
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(found.st_mode):
            raise UnfitError("not a regular file")
        _check_size(found.st_size, size, most)
        parts, left = [], found.st_size  # 0 of what lies in /proc, and nothing of it is read
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def check_regular(path: str) -> os.stat_result:
    """What a local file is now. Raises UnfitError for a pipe or a device, which would block, or never end; OSError."""
    found = Path(path).stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(found.st_mode):
        raise UnfitError("not a regular file")
    return found


def _check_size(found: int, size: int | None, most: int | None) -> None:
    if size is not None and found != size:
        raise UnfitError(f"changed since it was indexed (it has {found:,} bytes now)")
    if most is not None and found > most:
        raise UnfitError(f"too large: {found:,} bytes, and no more than {most:,} are read")


def why_unreadable(error: OSError) -> str:
    """What an error in reading means, in a few words, for a manifest's status and a run's record.

    Raises: ResourceError where it is the process that cannot read, whatever the file: no image is at fault then.
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
    """What a storage's error means, in one line, for a sentence."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else str(error).partition("\n")[0] or type(error).__name__


def as_array(data: bytes) -> NDArray[np.uint8]:
    """Bytes as engines take them, (bytes,) uint8, without a copy."""
    return np.frombuffer(data, np.uint8)


def as_table(data: bytes) -> pa.Table:
    """The rows of a Parquet file. Raises pa.ArrowException for what is none.

    In this thread alone: pq.read_table leaves the bytes to Arrow's threads, and one that lets go of them while Python
    ends aborts the process.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(use_threads=False)


def missing(root: str, names: Sequence[str]) -> list[str]:
    """Those of the names that are no files; a store is asked for all at once."""
    if is_remote(root):
        filesystem, base = open_root(root)
        found = filesystem.get_file_info([f"{base}/{name}" for name in names])
        return [name for name, info in zip(names, found, strict=True) if info.type != pafs.FileType.File]
    return [name for name in names if not _is_file(below(root, name))]


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:
        return False


def names_below(root: str) -> Iterator[tuple[str, int]]:
    """(relative name, bytes) of every file below a remote root, in no promised order. Raises OSError."""
    filesystem, base = open_root(root)
    for info in filesystem.get_file_info(pafs.FileSelector(base, recursive=True)):
        if info.type == pafs.FileType.File:
            yield info.path.removeprefix(f"{base}/"), info.size


def listing(root: str) -> dict[str, int | None]:
    """What lies directly in a root, by name: a file's bytes, None for what is no file. Raises OSError.

    A root that is not there holds nothing; one whose bucket is not there raises FileNotFoundError.
    """
    if not is_remote(root):
        try:
            with os.scandir(root) as entries:
                return {entry.name: _bytes(entry) for entry in entries}
        except FileNotFoundError:
            return {}
    filesystem, base = open_root(root)
    found = filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True))
    bucket = base.partition("/")[0]
    if not found and bucket and filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
        raise FileNotFoundError(f"there is no {bucket} in the store")
    return {info.base_name: info.size if info.type == pafs.FileType.File else None for info in found}


def remove(root: str, name: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing where nothing is. Raises OSError."""
    if is_remote(root):
        filesystem, base = open_root(root)
        kind = filesystem.get_file_info(f"{base}/{name}").type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(f"{base}/{name}")
        elif kind != pafs.FileType.NotFound:
            filesystem.delete_file(f"{base}/{name}")
        return
    path = Path(below(root, name))
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def move(root: str, name: str, dest: str) -> None:
    """Move a file, or a folder with all that is in it, under its name to the root `dest`. Raises OSError.

    In an object store everything is copied before anything is removed.
    """
    if not is_remote(root):
        Path(dest).mkdir(parents=True, exist_ok=True)
        Path(below(root, name)).rename(below(dest, name))
        return
    filesystem, base = open_root(root)
    _, target = open_root(dest)
    if filesystem.type_name not in OBJECT_STORES:
        filesystem.create_dir(target, recursive=True)
        filesystem.move(f"{base}/{name}", f"{target}/{name}")
        return
    here = filesystem.get_file_info(f"{base}/{name}")
    inside = pafs.FileSelector(here.path, recursive=True)
    for each in [here] if here.type == pafs.FileType.File else filesystem.get_file_info(inside):
        if each.type == pafs.FileType.File:
            filesystem.copy_file(each.path, f"{target}/{each.path.removeprefix(f'{base}/')}")
    remove(root, name)


def _bytes(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:  # links in a circle
        return None
