"""What did the run measure? Rows of numbers, kept in order, as an Arrow table and a Parquet file.

One row a logging window (kind "train"), one a validation ("valid"), one a checkpoint ("checkpoint"). Columns that
a kind does not have are null.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from thawline.dataio.store.atomic import whole
from thawline.dataio.store.root import Root
from thawline.trainer.context import Row, Sink

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIRST = ("kind", "phase", "step", "epoch", "time_s", "unix_s", "loss", "lr", "momentum")

_OF_A_VALIDATION = ("train_loss", "valid_loss", "phase_step", "phase_steps")


class Recorder:
    """The rows of a run, and the sinks that see each as it is made."""

    def __init__(self, *, sinks: Iterable[Sink] = (), rows: Iterable[Row] = ()) -> None:
        self.rows: list[Row] = list(rows)
        self.sinks = tuple(sinks)

    def add(self, row: Row) -> None:
        """Keep a row and show it to every sink."""
        self.rows.append(row)
        self.show(row)

    def show(self, row: Row) -> None:
        """Show a row that is kept already to every sink."""
        for sink in self.sinks:
            sink.observe(row)

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]

    def epoch_loss(self) -> float:
        """Mean training loss over the samples since the last validation."""
        since = max((i for i, row in enumerate(self.rows) if row["kind"] == "valid"), default=-1)
        windows = [row for row in self.rows[since + 1 :] if row["kind"] == "train"]
        images = [int(row["images"] or 0) for row in windows]
        return sum(float(row["loss"] or 0) * n for row, n in zip(windows, images, strict=True)) / sum(images)

    def is_best(self, metric: str, *, higher: bool) -> bool:
        """Whether the last validation is the first with the best of a metric so far."""
        values = [float(value) for row in self.of_kind("valid") if (value := row.get(metric)) is not None]
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


def metric_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that validation rows carry, in the order of their columns; error_rate first where there is one.

    A metric is a number that a "valid" row has, that no "train" row has, and that is neither a loss, a place in the
    run, nor a time or a count by its unit.
    """
    valid: dict[str, None] = {}
    train = {*_FIRST, *_OF_A_VALIDATION}
    for row in rows:
        if row.get("kind") == "valid":
            valid |= dict.fromkeys(name for name, value in row.items() if isinstance(value, int | float))
        elif row.get("kind") == "train":
            train |= {name for name, value in row.items() if value is not None}
    names = [name for name in valid if name not in train and not name.endswith(("_s", "_samples", "_bytes"))]
    return sorted(names, key=lambda name: name != "error_rate")


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as an Arrow table, the columns in a stable order."""
    names = dict.fromkeys([*_FIRST, *(key for row in rows for key in row)])
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def write_parquet(table: pa.Table, file: str | Path) -> None:
    """Write a table, to a file or a URI; a reader sees the old one or the new one, never a part. Raises OSError."""
    root, name = Root.holding(file)
    with whole(root, name) as sink:
        pq.write_table(table, sink)
