"""What did the run measure? Rows of numbers, kept in order, as an Arrow table and a Parquet file.

Which kinds there are is told by rows. Columns that a kind does not have are null.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import pyarrow as pa
import pyarrow.parquet as pq

from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root
from thawline.trainer.context import Sink
from thawline.trainer.records.rows import FIRST, QuarantineRow, Recorded, TrainRow, ValidRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Recorder:
    """The rows of a run, and the sinks that see each as it is made."""

    def __init__(self, *, sinks: Iterable[Sink] = (), rows: Iterable[Recorded] = ()) -> None:
        self.rows: list[Recorded] = list(rows)
        self.sinks = tuple(sinks)

    def add(self, row: Recorded) -> None:
        """Keep a row and show it to every sink."""
        self.rows.append(row)
        self.show(row)

    def show(self, row: Recorded) -> None:
        """Show a row that is kept already to every sink."""
        for sink in self.sinks:
            sink.observe(row)

    @overload
    def of_kind(self, kind: Literal["train"]) -> list[TrainRow]: ...
    @overload
    def of_kind(self, kind: Literal["valid"]) -> list[ValidRow]: ...
    @overload
    def of_kind(self, kind: Literal["quarantine"]) -> list[QuarantineRow]: ...
    def of_kind(self, kind: str) -> Sequence[Recorded]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]

    def epoch_loss(self) -> float:
        """Mean training loss over the samples since the last validation."""
        since = max((i for i, row in enumerate(self.rows) if row["kind"] == "valid"), default=-1)
        windows = [row for row in self.rows[since + 1 :] if row["kind"] == "train"]
        return sum(row["loss"] * row["images"] for row in windows) / sum(row["images"] for row in windows)

    def last_metric(self, name: str) -> float:
        """What the last validation measured; NaN for no number. Raises KeyError for what it did not."""
        row: Mapping[str, Any] = self.of_kind("valid")[-1]
        return math.nan if (value := row[name]) is None else float(value)

    def is_best(self, metric: str, *, higher: bool) -> bool:
        """Whether the last validation is the first with the best of a metric so far."""
        valid: list[Mapping[str, Any]] = [*self.of_kind("valid")]
        values = [float(value) for row in valid if (value := row.get(metric)) is not None]
        best = max if higher else min
        return bool(values) and values.index(best(values)) == len(values) - 1

    def table(self) -> pa.Table:
        """All rows as an Arrow table; columns that a row lacks are null."""
        return to_table(self.rows)

    def plot_loss(self) -> "Figure":
        """Training loss by window, as recorded and smoothed, and the validation loss of each epoch."""
        from thawline.trainer.analysis import plots  # matplotlib takes a second to import; a worker never draws

        return plots.plot_loss(self.table())

    def plot_lr(self) -> "Figure":
        """Learning rate of the last layer group, and momentum."""
        from thawline.trainer.analysis import plots

        return plots.plot_schedule(self.table())

    def plot_metrics(self) -> "Figure":
        """Every validation metric by epoch, side by side."""
        from thawline.trainer.analysis import plots

        return plots.plot_metrics(self.table())


def to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as an Arrow table, the columns in a stable order."""
    names = dict.fromkeys([*FIRST, *(key for row in rows for key in row)])
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def write_parquet(table: pa.Table, file: str | Path) -> None:
    """Write a table, to a file or a URI; a reader sees the old one or the new one, never a part. Raises OSError."""
    root, name = Root.holding(file)
    with atomic_write(root, name) as sink:
        pq.write_table(table, sink)
