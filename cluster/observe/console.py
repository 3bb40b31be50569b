"""What does a person see while a run goes on? A bar and an epoch table on a terminal, plain lines elsewhere.

Reads the rows that rank 0 publishes, wherever it runs, and prints to stderr, since stdout is for data. What cannot be
printed is dropped (see outputs).
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from thawline.cluster.outputs import SafeStream, reason
from thawline.cluster.words import printable
from thawline.trainer.analysis.diagnosis import Finding
from thawline.trainer.records.rows import metric_columns

Row = Mapping[str, Any]
_RECALLS = 10
"""Classes below an epoch."""


def metric_names(row: Row) -> list[str]:
    """The metrics that a validation row carries, in order; error_rate first where there is one."""
    return metric_columns([row])


def table_header(row: Row) -> str:
    """The head of the epoch table, with this row's metrics."""
    names = ["epoch", "train_loss", "valid_loss", *metric_names(row), "time"]
    return "  ".join(f"{name:>{max(10, len(name))}}" for name in names)


def table_line(row: Row, *, since_s: float) -> str:
    """One epoch of the table. since_s: when the epoch before it ended."""
    names = ["train_loss", "valid_loss", *metric_names(row)]
    minutes, seconds = divmod(round(row["time_s"] - since_s), 60)
    cells = [f"{row['epoch']:>10.0f}", *(f"{row[name]:>{max(10, len(name))}.6f}" for name in names)]
    return "  ".join([*cells, f"{f'{minutes:02d}:{seconds:02d}':>10}"])


def recall_line(row: Row) -> str:
    """Below an epoch: the recall of its classes, the lowest first, ten at most; empty where it was not asked for."""
    known = [(each["recall"], each["name"]) for each in row.get("recalls") or () if each["recall"] is not None]
    shown = [f"{printable(name)} {recall:.3f}" for recall, name in sorted(known)[:_RECALLS]]
    which = "recall" if len(shown) == len(known) else f"recall, lowest of {len(known)}"
    return f"{'':10}  {which}: {', '.join(shown)}" if shown else ""


def epoch_table(rows: Sequence[Row]) -> str:
    """The whole table of a run, as fastai prints it."""
    valid = [row for row in rows if row["kind"] == "valid"]
    if not valid:
        return "no epoch has ended yet"
    starts = [0.0, *(float(row["time_s"]) for row in valid)]
    lines = [(table_line(row, since_s=start), recall_line(row)) for row, start in zip(valid, starts, strict=False)]
    return "\n".join([table_header(valid[0]), *(line for pair in lines for line in pair if line)])


def diagnosis_lines(findings: Sequence[Finding]) -> list[str]:
    """What to print of findings at the end of a run."""
    return [f"diagnosis: {finding}" for finding in findings]


class Console:
    """Shows rows as they come. Rows of epochs that were shown before are skipped (a worker was restarted)."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = SafeStream(stream or sys.stderr)
        self._rich = RichConsole(file=cast(TextIO, self._stream), highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_valid: Row | None = None

    @property
    def lost(self) -> int:
        """Lines that could not be printed."""
        return self._stream.lost

    def show(self, rows: Sequence[Row]) -> None:
        """Show published rows."""
        for row in rows:
            if row["kind"] == "note":
                self.say(str(row["text"]))
            elif row["kind"] == "train":
                self._progress(row)
            elif row["kind"] == "valid":
                self._epoch(row)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        (self._bar.console if self._bar else self._rich).print(printable(text), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar, and say how many lines were lost."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self.lost:
            self.say(f"{self.lost} lines could not be printed when they were due ({reason(self._stream.why)})")

    def _epoch(self, row: Row) -> None:
        last = self._last_valid
        if last is not None and row["step"] <= last["step"]:
            return
        if last is None:
            self.say(table_header(row))
        self.say(table_line(row, since_s=float(last["time_s"]) if last else 0.0))
        if recalls := recall_line(row):
            self.say(recalls)
        self._last_valid = row

    def _progress(self, row: Row) -> None:
        if not self._rich.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),  # a phase may be called [head]
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._rich,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None, numbers="")
        assert self._task is not None
        self._bar.update(
            self._task,
            description=printable(row["phase"]),
            completed=row["phase_step"],
            total=row["phase_steps"],
            numbers=(
                f"loss {math.nan if row['loss'] is None else row['loss']:.4f}  {row['images_per_s']:,.0f} images/s  "
                f"waiting for data {row['data_wait_fraction']:.0%}"
            ),
        )
