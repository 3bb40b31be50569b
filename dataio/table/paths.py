"""What is a file's path below its root? Paths of a list in the form of a table's, or an error for what is none.

Nothing is opened; a file's existence is checked only to tell Windows' slashes from characters of a name.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from thawline.dataio.errors import SourceError, quoted
from thawline.dataio.store.root import Root

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def tidy(paths: Iterable[Any], root: str, source: str) -> list[str]:
    """Return posix paths relative to root, or absolute ones when they lie outside a local root.

    Raises: SourceError for what is no path, or one that is not below the root.
    """
    home = Root.of(root)
    clean = _below_uri if home.remote else _below_folder
    beginning = root.partition("?")[0].rstrip("/")
    tidied = []
    backslashes: bool | None = None  # whether they are Windows' slashes: unless a file has one in its name
    for row, path in enumerate(paths):
        if not isinstance(path, str) or not path or "\0" in path:
            raise SourceError(
                f"{source} has no usable path in row {row + 1} ({quoted(repr(path))}): fill it in, or drop the row"
            )
        if "\\" in path and not home.remote:
            if backslashes is None:
                backslashes = not home.exists(path)
            if backslashes and _DRIVE.match(path):
                raise SourceError(
                    f"{source} has a path of Windows in row {row + 1} ({quoted(path)}), and that drive is not here: "
                    f"write paths from {root} on, or give --root and cut off what lies above it"
                )
            path = path.replace("\\", "/") if backslashes else path
        name = clean(path, beginning)
        if name is None:
            raise SourceError(
                f"{source} has a path in row {row + 1} that is not below the root {root} ({quoted(path)}): a manifest "
                "has one root; give one that holds them all, or index each store by itself"
            )
        tidied.append(name)
    return tidied


def _below_folder(path: str, root: str) -> str | None:
    if path.startswith("file://"):
        path = urlsplit(path).path
    if "://" in path:
        return None
    full = posixpath.normpath(path if path.startswith("/") else f"{root}/{path}")
    return full.removeprefix(f"{root}/")


def _below_uri(path: str, root: str) -> str | None:
    if "://" in path:
        if not path.startswith(f"{root}/"):
            return None
        path = path[len(root) + 1 :]
    path = posixpath.normpath(path)
    return None if path.startswith(("/", "../")) or path in (".", "..") else path


def as_texts(values: list[str]) -> pa.Array:
    """A column of paths. Raises SourceError for a name that is not UTF-8."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        raise SourceError(f"the file name {quoted(repr(error.object))} is not UTF-8: rename the file") from error
