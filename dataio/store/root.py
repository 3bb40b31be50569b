"""Where do bytes lie? In a folder of this machine, or below a URI: an object store, HDFS, whatever fsspec knows.

A `Root` is that place, parsed once; below it, files go by relative names. Local files are read without pyarrow, which
costs less and tells errors apart better. All else goes through a pyarrow filesystem, opened when it is first needed and
shared by all roots below: pyarrow's own for s3://, gs://, abfs:// and hdfs://; fsspec's, where that is installed, for
what pyarrow does not know (memory://, sftp://, az://, ...), with the options behind the question mark. Atomic writes
are in atomic.py, the meaning of errors in files.py.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from thawline.dataio.errors import SourceError, quoted
from thawline.dataio.store import files

_OBJECT_STORES = ("s3", "gcs", "abfs")
"""pyarrow's names of object stores: an object appears when its stream is closed, and cannot be renamed."""
_FSSPEC_OBJECT_STORES = frozenset(
    ("memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf")
)
"""fsspec's protocols of object stores. Others may show a file while it is written, so files are moved into place."""
_SECRETS = ("key", "secret", "token", "password", "credential", "connection_string")
"""Parts of the names of options whose values must not get into manifests or logs."""
_RETRIES_S = (0.1, 1.0)


@dataclass(frozen=True)
class Root:
    """A folder of this machine or a place below a URI; made by `Root.of`, `Root.holding` and `child`."""

    text: str
    """As in manifests: an absolute folder, links resolved, or a URI without a trailing slash."""
    _within: tuple[Root, str] | None = field(default=None, repr=False, compare=False)
    """The root that this one is a child of, and its name there."""

    @classmethod
    def of(cls, place: str | Path | Root) -> Root:
        """The root of a folder or URI that a user gave; file:// is a folder. Opens nothing.

        Raises: SourceError for a URI with a secret, which would get into manifests and logs; for a name with a NUL.
        """
        if isinstance(place, Root):
            return place
        text = files.plain(place)
        if "\0" in text:
            raise SourceError(f"{quoted(text)} holds a NUL, which no name can: nothing lies there; correct it")
        if "://" not in text:
            return cls(Path(text).expanduser().resolve().as_posix())
        parts = urlsplit(text)
        secrets = [name for name, _ in parse_qsl(parts.query) if any(word in name.lower() for word in _SECRETS)]
        if secrets or parts.password is not None:
            raise SourceError(
                f"the URI of {parts.hostname} carries a {[*secrets, 'password'][0]}, which would be written into "
                "manifests and logs: give it by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "the store's own way)"
            )
        return cls(parts._replace(path=parts.path.rstrip("/")).geturl())

    @classmethod
    def holding(cls, file: str | Path) -> tuple[Root, str]:
        """The root that a file lies in, and its name there; a link is not followed. Raises as `of` does."""
        text = files.plain(file)
        if "://" not in text:
            path = Path(text).expanduser()
            return cls.of(path.parent), path.name
        parts = urlsplit(text)
        above, _, name = parts.path.rpartition("/")
        return cls.of(parts._replace(path=above).geturl()), unquote(name)

    def __str__(self) -> str:
        return self.text

    @property
    def remote(self) -> bool:
        """Whether it is a URI."""
        return "://" in self.text

    @cached_property
    def folder(self) -> Path:
        """The folder of this machine. Raises: ValueError for a URI."""
        if self.remote:
            raise ValueError(f"{self.text} is no folder of this machine")
        return Path(self.text)

    def child(self, name: str) -> Root:
        """The root of the folder `name` in this one."""
        return Root(self.full(quote(name) if self.remote else name), (self, name))

    def full(self, name: str) -> str:
        """The path or URI of a file here, for messages. An absolute path of this machine is returned unchanged."""
        if not self.remote:
            return name if name.startswith("/") else f"{self.text.rstrip('/')}/{name}"
        parts = urlsplit(self.text)
        return parts._replace(path=f"{parts.path}/{name}").geturl()

    @cached_property
    def opened(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem, and the root's path within it. Raises: SourceError when there is no such filesystem."""
        if not self.remote:
            return pafs.LocalFileSystem(), self.text
        if self._within is None:
            return _open(self.text)
        above, name = self._within
        filesystem, base = above.opened
        return filesystem, f"{base}/{name}"

    # Reading ----------------------------------------------------------------------------------------------

    def read(self, name: str, *, size: int | None = None, most: int | None = None) -> bytes:
        """The bytes of a file. Raises OSError; UnfitError before anything is read, see `files.read_local`.

        Errors that may be temporary (a network file system) are retried twice within about a second; a hanging one
        cannot be interrupted.
        """
        for wait_s in (*_RETRIES_S, None):
            try:
                if not self.remote:
                    return files.read_local(self.full(name), size=size, most=most)
                filesystem, base = self.opened
                with filesystem.open_input_file(f"{base}/{name}") as file:
                    files.check_size(file.size(), size, most)
                    return bytes(file.read())
            except files.HOPELESS:
                raise
            except OSError:
                if wait_s is None:
                    raise
                time.sleep(wait_s)
        raise AssertionError

    def buffer(self, name: str) -> pa.Buffer:
        """The bytes of a file; mapped, not read, where it lies on this machine. Raises OSError."""
        if self.remote:
            return pa.py_buffer(self.read(name))
        size = files.check_regular(self.full(name)).st_size
        return pa.memory_map(self.full(name)).read_buffer() if size else pa.py_buffer(b"")

    def open(self, name: str) -> pa.NativeFile:
        """Open a file to read any of its bytes. Raises OSError."""
        if self.remote:
            filesystem, base = self.opened
            return filesystem.open_input_file(f"{base}/{name}")
        files.check_regular(self.full(name))
        return pa.OSFile(self.full(name))

    def stream(self, name: str) -> pa.NativeFile:
        """Open a file to read it once from beginning to end, in one request. Raises OSError."""
        if not self.remote:
            return self.open(name)
        filesystem, base = self.opened
        return filesystem.open_input_stream(f"{base}/{name}")

    # Looking ----------------------------------------------------------------------------------------------

    def listing(self) -> dict[str, int | None]:
        """The entries directly here, by name: a file's size in bytes, None for others. Raises OSError.

        A root that does not exist has none; one whose bucket does not exist raises FileNotFoundError.
        """
        if not self.remote:
            try:
                with os.scandir(self.text) as entries:
                    return {entry.name: _bytes(entry) for entry in entries}
            except FileNotFoundError:
                return {}
        filesystem, base = self.opened
        infos = filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True))
        bucket = base.partition("/")[0]
        if not infos and bucket and filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
            raise FileNotFoundError(f"there is no {bucket} in the store")
        return {info.base_name: info.size if info.type == pafs.FileType.File else None for info in infos}

    def walk(self) -> Iterator[tuple[str, int]]:
        """(relative name, size in bytes) of every file below a URI, in no particular order. Raises OSError."""
        filesystem, base = self.opened
        for info in filesystem.get_file_info(pafs.FileSelector(base, recursive=True)):
            if info.type == pafs.FileType.File:
                yield info.path.removeprefix(f"{base}/"), info.size

    def missing(self, names: Sequence[str]) -> list[str]:
        """The names that are not files; a store is asked for all of them at once."""
        if not self.remote:
            return [name for name in names if not _is_file(self.full(name))]
        filesystem, base = self.opened
        infos = filesystem.get_file_info([f"{base}/{name}" for name in names])
        return [name for name, info in zip(names, infos, strict=True) if info.type != pafs.FileType.File]

    def size(self, name: str) -> int | None:
        """A file's size in bytes; None for what is not a file, or does not exist. Raises OSError."""
        if not self.remote:
            return Path(self.full(name)).stat().st_size if _is_file(self.full(name)) else None
        filesystem, base = self.opened
        info = filesystem.get_file_info(f"{base}/{name}")
        return int(info.size) if info.type == pafs.FileType.File else None

    def changed_s(self, name: str) -> float:
        """When a file was last written, in Unix time; infinity where its place does not say. Raises OSError."""
        if not self.remote:
            return Path(self.full(name)).stat().st_mtime
        filesystem, base = self.opened
        written = filesystem.get_file_info(f"{base}/{name}").mtime
        return math.inf if written is None else float(written.timestamp())

    def exists(self, name: str) -> bool:
        """Whether the name exists, broken links included. Raises OSError."""
        if not self.remote:
            return os.path.lexists(self.full(name))
        filesystem, base = self.opened
        return bool(filesystem.get_file_info(f"{base}/{name}").type != pafs.FileType.NotFound)

    # Changing ---------------------------------------------------------------------------------------------

    @property
    def at_once(self) -> bool:
        """Whether a file appears only when its stream is closed, as in object stores, so that none is renamed."""
        filesystem, _ = self.opened
        if isinstance(filesystem, pafs.PyFileSystem) and isinstance(filesystem.handler, pafs.FSSpecHandler):
            protocol = filesystem.handler.fs.protocol
            return not _FSSPEC_OBJECT_STORES.isdisjoint((protocol,) if isinstance(protocol, str) else protocol)
        return filesystem.type_name in _OBJECT_STORES

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its contents, if it exists. Raises OSError."""
        if not self.remote:
            path = Path(self.full(name))
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path)
            return
        filesystem, base = self.opened
        kind = filesystem.get_file_info(f"{base}/{name}").type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(f"{base}/{name}")
        elif kind != pafs.FileType.NotFound:
            filesystem.delete_file(f"{base}/{name}")

    def move(self, name: str, dest: Root) -> None:
        """Move a file, or a folder with its contents, under the same name to another root of the same filesystem.

        In an object store everything is copied before anything is removed. Raises OSError.
        """
        if not self.remote:
            dest.folder.mkdir(parents=True, exist_ok=True)
            Path(self.full(name)).rename(dest.full(name))
            return
        (filesystem, base), (_, target) = self.opened, dest.opened
        if not self.at_once:
            filesystem.create_dir(target, recursive=True)
            filesystem.move(f"{base}/{name}", f"{target}/{name}")
            return
        here = filesystem.get_file_info(f"{base}/{name}")
        inside = pafs.FileSelector(here.path, recursive=True)
        for each in [here] if here.type == pafs.FileType.File else filesystem.get_file_info(inside):
            if each.type == pafs.FileType.File:
                filesystem.copy_file(each.path, f"{target}/{each.path.removeprefix(f'{base}/')}")
        self.remove(name)


@lru_cache(maxsize=64)
def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI, and the path within it. Raises SourceError."""
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        try:
            opened = _open_by_fsspec(uri) if "Unrecognized filesystem" in str(error) else None
        except Exception as other:  # each filesystem has errors of its own for options that it does not know
            error, opened = other, None
        if opened is None:
            raise SourceError(
                f"{uri} cannot be opened ({error}): nothing can be listed or read there; give a folder, or a URI that "
                "pyarrow.fs understands (s3://, gs://, hdfs://) or, where it is installed, fsspec"
            ) from error
        filesystem, path = opened
    return filesystem, path.rstrip("/")


def _open_by_fsspec(uri: str) -> tuple[pafs.FileSystem, str] | None:
    """The same by fsspec; None where that is not installed. Raises whatever the filesystem of that name raises."""
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        return None
    place, _, options = uri.partition("?")
    # a cached listing would hide what another machine writes
    filesystem, path = fsspec.core.url_to_fs(unquote(place), use_listings_cache=False, **dict(parse_qsl(options)))
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), str(path)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:
        return False


def _bytes(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:  # links in a circle
        return None
