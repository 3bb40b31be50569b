"""Which errors can happen between a folder and a batch?

    DataError
    ├── SourceError      no folder, no images, a CSV without the column
    ├── LabelError       a pattern that matches nothing, a missing label, one class only
    ├── SplitError       a fraction out of range, an empty split
    ├── ManifestError    not a manifest, files that moved, an unknown version
    ├── SpecError        an ImageSpec that contradicts itself
    ├── ShardError       packed files that are missing, changed, or do not fit the cache
    ├── QuarantineError  too many files turned out unusable
    ├── PlaceError       no folder for a process's own files that others keep out of
    ├── ResourceError    open files or memory of the process or machine are used up: no file is at fault
    └── EngineError      an engine that cannot run here, a file that cannot be decoded

Every message says condition, value, consequence and remedy; every one is safe to show without a traceback. What comes
out of a user's table or folder is put into it by `quoted` or `listed`; the files that the user named stay whole.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from reprlib import Repr

_QUOTED = 80
_LISTED = 10

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _QUOTED


def quoted(value: object) -> str:
    """A user's value for use in a sentence: in one line, without control characters, cut at 80 characters.

    A string is itself, anything else is written as in Python, its long parts left out.
    """
    text = value if isinstance(value, str) else _repr.repr(value)
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: _QUOTED + 1])
    return plain if len(plain) <= _QUOTED else f"{plain[: _QUOTED - 3]}..."


def listed(values: Collection[object], *, most: int = _LISTED) -> str:
    """The first of a user's values, each as `quoted` has it, and how many more there are."""
    shown = ", ".join(map(quoted, islice(values, most)))
    return shown if len(values) <= most else f"{shown} and {len(values) - most:,} more"


class DataError(Exception):
    """Base of all that dataio raises for a user's input."""


class SourceError(DataError):
    """The images cannot be listed."""


class LabelError(DataError):
    """The images cannot be labelled."""


class SplitError(DataError):
    """The rows cannot be divided into train and valid."""


class ManifestError(DataError):
    """A manifest cannot be read, written or trusted."""


class SpecError(DataError):
    """An ImageSpec asks for what cannot be drawn."""


class ShardError(DataError):
    """Packed files are missing, are not what was packed, or cannot be kept here."""


class QuarantineError(DataError):
    """More files turned out unusable than the user allows."""


class PlaceError(DataError):
    """There is no folder that is private to this user."""


class ResourceError(DataError):
    """The process or its machine lacks a resource for reading: open files, memory, a storage that responds."""


class EngineError(DataError):
    """No engine can run this spec here, or one failed while decoding."""


def kind_of(reason: str) -> str:
    """The kind of a reason why a file cannot be used, without its details: there are few kinds, however many files."""
    return "its mask" if reason.startswith("its mask ") else reason.partition(":")[0]
