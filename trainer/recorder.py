"""What did the run measure? Rows of numbers, kept in order, as an Arrow table and a Parquet file.

One row a logging window (kind "train"), one a validation ("valid"), one a checkpoint ("checkpoint"). Columns that
a kind does not have are null.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.context import Row, Sink

_FIRST = ("kind", "phase", "step", "epoch", "time_s", "unix_s", "loss", "lr", "momentum")


class Recorder:
    """The rows of a run, and the sinks that see each as it is made."""

    def __init__(self, *, sinks: Iterable[Sink] = (), rows: Iterable[Row] = ()) -> None:
        self.rows: list[Row] = list(rows)
        self.sinks = tuple(sinks)

    def add(self, row: Row) -> None:
        """Keep a row and show it to every sink."""
        self.rows.append(row)
        for sink in self.sinks:
            sink.observe(row)

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]

    def table(self) -> pa.Table:
        """All rows as an Arrow table; columns that a row lacks are null."""
        return to_table(self.rows)


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as an Arrow table, the columns in a stable order."""
    names = dict.fromkeys([*_FIRST, *(key for row in rows for key in row)])
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def write_parquet(table: pa.Table, file: Path) -> None:
    """Write a table so that a reader sees the old file or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        pq.write_table(table, temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
