"""How is a manifest stored? As Parquet, which any tool reads, or as Arrow (.arrow), mapped into memory.

Mapped, ten million rows open at once and are shared by all ranks of a machine. What a manifest holds besides its rows
is JSON in the table's metadata, which is checked here; manifest.py checks that the rows are those that were written.
"""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from thawline.dataio.checks import integrity
from thawline.dataio.errors import ManifestError, SourceError, quoted
from thawline.dataio.labels.numbers import Moments
from thawline.dataio.store.atomic import atomic_write, sweep
from thawline.dataio.store.outputs import KEY
from thawline.dataio.store.root import Root
from thawline.dataio.table import lists
from thawline.dataio.table.tasks import TASKS

VERSION = 2
_ARROW_MAGIC = b"ARROW1"


def located(file: str | Path) -> tuple[Root, str]:
    """The root of a manifest's file, and its name below it; links are resolved."""
    return Root.holding(file if "://" in str(file) else Path(file).expanduser().resolve())


def write_table(rows: pa.Table, file: str | Path) -> None:
    """Write Parquet or Arrow, by the ending .parquet or .arrow; whole or not at all, to a file or a URI.

    Raises: ManifestError when the file cannot be written.
    """
    root, name = located(file)
    try:
        sweep(root, of=name)
        with atomic_write(root, name) as sink:
            if name.endswith(".parquet"):
                pq.write_table(rows, sink, compression="zstd")
            else:
                rows = rows.unify_dictionaries().combine_chunks()
                with pa.ipc.new_file(sink, rows.schema) as writer:
                    writer.write_table(rows)
    except OSError as error:
        raise ManifestError(
            f"manifest {file} cannot be written ({error.strerror or error}): nothing was changed; "
            "give a file in a folder that you may write to"
        ) from error


def read_table(file: str | Path) -> pa.Table:
    """The table, validated in full: with one wrong offset, Arrow would read memory that is not the table's.

    Raises: ManifestError for a file that is no manifest, or cannot be read.
    """
    try:
        root, name = located(file)
        if root.remote:
            source = pa.BufferReader(root.buffer(name))
        else:
            file = Path(file).expanduser()
            if file.is_dir() or (file.is_file() and lists.ending(file) in (*lists.TEXTS, *lists.JSONS)):
                raise ManifestError(
                    f"no manifest at {file}, but a {'folder' if file.is_dir() else 'list'}, which has no classes and "
                    "splits: index it first with thawline index, and give what that writes"
                )
            if not file.is_file():
                raise ManifestError(f"no manifest at {file}: check the path, or make one with thawline index")
            source = pa.memory_map(str(file))
        magic = source.read(len(_ARROW_MAGIC))
        source.seek(0)
        if magic == _ARROW_MAGIC:
            arrow = pa.ipc.open_file(source)
            read_about(arrow.schema.metadata, file)  # before the rows: a large foreign file is refused at once
            rows = arrow.read_all()
        else:
            with pq.ParquetFile(source) as parquet:
                read_about(parquet.schema_arrow.metadata, file)
                rows = parquet.read()
        rows.validate(full=True)
        return rows
    except (pa.ArrowException, OSError, ValueError, SourceError) as error:
        raise ManifestError(
            f"{file} cannot be read ({quoted(str(error))}): it is no manifest, or a broken one; make one with thawline "
            "index"
        ) from error


def read_moments(about: dict[str, Any], file: str | Path) -> Moments | None:
    """What the metadata give to standardise numbers by: a mean and a deviation of each. Raises ManifestError."""
    try:
        if about.get("moments") is None:
            return None
        mean, std = about["moments"]
        both = tuple(map(float, mean)), tuple(map(float, std))
        if not len(both[0]) == len(both[1]) == len(about["classes"]) or not all(0 < each < inf for each in both[1]):
            raise ValueError(f"they are {integrity.shown(about['moments'])}")
        return both
    except (TypeError, ValueError) as error:
        raise ManifestError(
            f"manifest {file} has no moments that numbers could be standardised by ({error}): it was changed since it "
            "was made; make it again with thawline index"
        ) from error


def read_about(metadata: dict[bytes, bytes] | None, file: str | Path) -> dict[str, Any]:
    """The metadata, checked. Raises ManifestError."""
    try:
        about = integrity.parsed((metadata or {})[KEY])
        version, task, _, _ = int(about["version"]), about["task"], about["root"], about["classes"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ManifestError(f"{file} is not a thawline manifest; make one with thawline index") from error
    if version != VERSION or not isinstance(task, str) or task not in TASKS:
        age = "an older" if version < VERSION else "a newer"
        raise ManifestError(
            f"manifest {file} (version {version}, task {integrity.shown(task)}) is from {age} thawline: this one reads "
            f"version {VERSION} for {', '.join(TASKS)}; index again, or install the thawline that made it"
        )
    about = {"fingerprint": "", "shards": [], "values": [], **about}
    try:
        integrity.check_about(about)
    except ValueError as error:
        raise ManifestError(f"manifest {file} {error}: it is damaged; make it again with thawline index") from error
    return about
