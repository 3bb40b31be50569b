"""What rows does a run leave? Every kind with its columns: what the recorder keeps, a sink sees and a log carries.

A row is a plain dictionary, as JSON and Parquet have it, and "kind" says which of these it is: what reads `row["kind"]`
knows the columns. Rows of before a column was there lack it. Nothing is written or read here.
"""

from collections.abc import Iterable, Mapping
from math import isnan
from typing import Any, Literal, NotRequired, TypedDict, cast


class Place(TypedDict):
    """Where in the run a row was made."""

    phase: str
    step: int
    phase_step: int
    phase_steps: int
    epoch: float
    time_s: float
    """Of training since the run began, over every process that worked on it."""
    unix_s: float


class WindowNumbers(TypedDict):
    """What a logging window gave, over all ranks."""

    loss: float
    """Mean over the window's samples."""
    grad_norm: float
    """The last step's, before clipping."""
    skipped: int
    """Steps that fp16 lost."""
    images: int
    window_s: float
    images_per_s: float
    data_wait_s: float
    data_wait_fraction: float
    busy_s: float
    """How long ranks were at work before they waited for one another: the mean, the longest, and whose that was."""
    busy_max_s: float
    straggler: int


class TrainRow(Place, WindowNumbers):
    """A logging window has closed."""

    kind: Literal["train"]
    lr: float
    """Of the last layer group."""
    momentum: float | None


class ClassRecall(TypedDict):
    """How many of a class's validation samples were found."""

    name: str
    recall: float | None
    """None where it has no sample."""


class ValidRow(Place):
    """A validation. Its metrics are further columns, by their names: see `metric_columns`."""

    kind: Literal["valid"]
    train_loss: float
    """Mean over the samples since the validation before."""
    valid_loss: float
    valid_s: float
    valid_samples: int
    recalls: NotRequired[list[ClassRecall]]
    """Of every class, where classes are weighted or balanced."""


class CheckpointRow(TypedDict):
    """A checkpoint was written."""

    kind: Literal["checkpoint"]
    step: int
    unix_s: float
    checkpoint_s: float


class CheckpointFailedRow(TypedDict):
    """A checkpoint was refused by the storage."""

    kind: Literal["checkpoint_failed"]
    step: int
    unix_s: float
    reason: str


class QuarantineRow(TypedDict):
    """A file turned out to be unusable."""

    kind: Literal["quarantine"]
    step: int
    unix_s: float
    split: str
    id: int
    reason: str
    """The file, and what is wrong with it."""
    quarantined: int
    """Files so far, this one counted."""


class NoteRow(TypedDict):
    """A line of text for whoever watches; not recorded, as are those below."""

    kind: Literal["note"]
    text: str


class ResumedRow(TypedDict):
    """The run goes on from a checkpoint of that step."""

    kind: Literal["resumed"]
    step: int
    unix_s: float


class TargetsRow(TypedDict):
    """Where the workers answer Prometheus."""

    kind: Literal["targets"]
    endpoints: str
    """HOST:PORT of every rank, in order, with spaces between."""


class GroupRow(TypedDict):
    """A group of so many workers has begun, after so many before it."""

    kind: Literal["group"]
    workers: int
    restarts: int
    unix_s: float


class BegunRow(TypedDict):
    """A job's driver has looked at the job and at the cluster."""

    kind: Literal["begun"]
    device: str
    targets: NotRequired[str]
    """Where Prometheus finds the workers."""


Recorded = TrainRow | ValidRow | CheckpointRow | CheckpointFailedRow | QuarantineRow
"""What `rows.parquet` and checkpoints hold."""
Row = Recorded | NoteRow | ResumedRow | TargetsRow | GroupRow | BegunRow
"""What is published."""

FIRST = ("kind", "phase", "step", "epoch", "time_s", "unix_s", "loss", "lr", "momentum")
"""The first columns of a table of rows."""


def valid_row(
    place: Place,
    *,
    train_loss: float,
    valid_s: float,
    valid_samples: int,
    metrics: Mapping[str, float],
    recalls: Mapping[str, float],
) -> ValidRow:
    """The row of a validation. metrics: valid_loss, and the others by their columns. recalls: by class, or none."""
    numbers = {"train_loss": train_loss, "valid_s": valid_s, "valid_samples": valid_samples}
    row = cast(ValidRow, {"kind": "valid", **place, **numbers, **metrics})
    if recalls:
        row["recalls"] = [{"name": name, "recall": None if isnan(r) else r} for name, r in recalls.items()]
    return row


def metric_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that validation rows carry, in the order of their columns; error_rate first where there is one.

    A metric is a number that a "valid" row has, that no "train" row has, and that is neither a loss, a place in the
    run, nor a time or a count by its unit.
    """
    valid: dict[str, None] = {}
    fixed = {*FIRST, *ValidRow.__annotations__}
    for row in rows:
        if row.get("kind") == "valid":
            valid |= dict.fromkeys(name for name, value in row.items() if isinstance(value, int | float))
        elif row.get("kind") == "train":
            fixed |= {name for name, value in row.items() if value is not None}
    names = [name for name in valid if name not in fixed and not name.endswith(("_s", "_samples", "_bytes"))]
    return sorted(names, key=lambda name: name != "error_rate")
