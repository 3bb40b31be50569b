"""Where may a manifest be written? To a name with the right ending, and over nothing but another manifest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from thawline.dataio.errors import ManifestError, quoted
from thawline.dataio.store.root import Root

KEY = b"thawline"
"""The key of a manifest's entry in its table's metadata."""

ENDINGS = (".parquet", ".arrow")


def check_output(file: str | Path, *, read: Sequence[str | Path] = ()) -> None:
    """Check that writing a manifest to `file`, which need not exist, would destroy nothing of the user's.

    read: files that it is made from, which are never written over, manifests or not.

    Raises: ManifestError otherwise.
    """
    if not str(file).partition("?")[0].endswith(ENDINGS):
        raise ManifestError(
            f"{file} does not end in {' or '.join(ENDINGS)}, by which a manifest is known: nothing is written; give "
            "such a name"
        )
    if "\0" in str(file):
        raise ManifestError(
            f"{quoted(str(file))} holds a NUL, which no name can: nothing is written; give another name"
        )
    for source in read:
        if _same(file, source):
            raise ManifestError(
                f"{file} is what the manifest is made from: writing there would replace it; give another --out"
            )
    if _lies_there(file) and not is_manifest(file):
        raise ManifestError(
            f"{file} exists and is no thawline manifest: it is not written over; give another name, or move it away"
        )
    if "://" not in str(file):
        above = Path(file).expanduser().absolute().parent
        standing = next(place for place in (above, *above.parents) if os.path.lexists(place))
        if not (standing.is_dir() and os.access(standing, os.W_OK)):
            raise ManifestError(
                f"manifest {file} cannot be written: {standing} is no folder that this user may write; give another"
            )


def is_manifest(file: str | Path) -> bool:
    """Whether a file of this machine or a store says that it is a manifest; not whether it is whole."""
    try:
        root, name = Root.holding(file)
        with root.open(name) as stream:
            return KEY in (_schema(stream).metadata or {})
    except (pa.ArrowException, OSError, ValueError):
        return False


def _schema(stream: pa.NativeFile) -> pa.Schema:
    magic = stream.read(6)
    stream.seek(0)
    return pa.ipc.open_file(stream).schema if magic == b"ARROW1" else pq.read_schema(stream)


def _lies_there(file: str | Path) -> bool:
    root, name = Root.holding(file)
    try:
        return root.exists(name)
    except OSError:  # a store that does not tell is asked again by writing
        return False


def _same(one: str | Path, other: str | Path) -> bool:
    if "://" in str(one) or "://" in str(other):
        return str(one) == str(other)
    try:
        return Path(one).expanduser().samefile(Path(other).expanduser())
    except (OSError, ValueError):  # one of them is not there
        return False
