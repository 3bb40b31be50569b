"""What is each image?

A labeller is a plain function from one row to a label, a list of labels (multi_label), or None for no label.
Its `__name__` is what errors call it by. Points and masks are not labels of this kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from dataio.errors import LabelError
from dataio.sources import Table

Row = Mapping[str, Any]
Labeller = Callable[[Row], "str | list[str] | None"]

LABEL_TYPES = {"single_label": pa.string(), "multi_label": pa.list_(pa.string())}


def by_parent() -> Labeller:
    """Label an image with the name of the folder it lies in; one directly in the root has no label."""

    def parent(row: Row) -> str | None:
        return PurePosixPath(row["path"]).parent.name or None

    return _named(parent, "by_parent()")


def by_regex(pattern: str) -> Labeller:
    """Label an image with what `pattern` finds in its file name: group 1 if it has one, else the match.

    Raises: LabelError for a malformed pattern.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise LabelError(f"pattern {pattern!r} is not a regular expression ({error}): correct or escape it") from error

    def search(row: Row) -> str | None:
        match = regex.search(row["path"].rpartition("/")[2])
        return match.group(1 if regex.groups else 0) if match else None

    return _named(search, f"by_regex({pattern!r})")


def by_column(name: str, *, delimiter: str | None = None) -> Labeller:
    """Label an image with a column's value, or with the values between delimiters (multi_label).

    With a delimiter the values are stripped and empty ones dropped; an empty cell is an image that shows none
    of the classes. A column of lists is multi_label without one.

    Raises (when called on a row): LabelError when there is no such column.
    """
    if delimiter == "":
        raise LabelError("delimiter '' separates nothing: give the character between the labels, or None")

    def cell(row: Row) -> str | list[str] | None:
        if name not in row:
            raise LabelError(f"no column {name!r} to take labels from; there are {', '.join(row)}: name one of these")
        value = row[name]
        if isinstance(value, list):
            return value
        if delimiter is None:
            return None if value is None else str(value)
        return [part.strip() for part in str(value or "").split(delimiter) if part.strip()]

    return _named(cell, f"by_column({name!r})")


def by_function(fn: Labeller) -> Labeller:
    """Label an image with what `fn` returns for its row ('path' and the source's columns)."""
    if not callable(fn):
        raise LabelError(f"{fn!r} is not a function: it cannot label; give one from a row to a label")
    return _named(lambda row: fn(row), f"by_function({getattr(fn, '__name__', fn)})")


def label(table: Table, labeller: Labeller) -> Table:
    """Return the table with its `label` column and its task, 'single_label' or 'multi_label'.

    Raises: LabelError when an image has no label, when all have the same (single_label), when some have one
        label and others a list, or when the labeller fails.
    """
    labels = [_one(labeller, row) for row in _each(table.rows)]
    task = "multi_label" if any(isinstance(value, list) for value in labels) else "single_label"
    _check(labels, table.rows["path"], getattr(labeller, "__name__", repr(labeller)), task)
    rows = table.rows.drop_columns(["label"]) if "label" in table.rows.column_names else table.rows
    return Table(rows.append_column("label", pa.array(labels, LABEL_TYPES[task])), table.root, task)


def _check(labels: list[str | list[str] | None], paths: pa.ChunkedArray, name: str, task: str) -> None:
    def names(indices: list[int]) -> str:
        return ", ".join(paths[index].as_py().rpartition("/")[2] for index in indices[:3])

    missing = [index for index, value in enumerate(labels) if value is None or value == ""]
    if len(missing) == len(labels) or not any(labels):
        raise LabelError(
            f"{name} gives none of the {len(labels)} images a label (tried {names([*range(len(labels))])}): "
            "there is nothing to learn; correct it, or label in another way"
        )
    if missing:
        raise LabelError(
            f"{name} gives {len(missing)} of {len(labels)} images no label ({names(missing)}): "
            "every image needs one; correct it, or remove these images"
        )
    singles = [index for index, value in enumerate(labels) if not isinstance(value, list)]
    if task == "multi_label" and singles:
        raise LabelError(f"{name} gives some images a list and others one text ({names(singles)}): give always lists")
    if task == "single_label" and len(set(map(str, labels))) == 1:
        raise LabelError(
            f"{name} gives one class only: all {len(labels)} images are {labels[0]!r}, so there is nothing "
            "to learn; give images of at least two classes"
        )


def _one(labeller: Labeller, row: Row) -> str | list[str] | None:
    try:
        value = labeller(row)
    except LabelError:
        raise
    except Exception as error:
        name = getattr(labeller, "__name__", repr(labeller))
        raise LabelError(f"{name} failed on {row['path']} with {error!r}: correct the function") from error
    if isinstance(value, list | tuple | set):
        return [str(item) for item in value]
    return None if value is None else str(value)


def _each(rows: pa.Table) -> Iterator[Row]:
    for batch in rows.to_batches(max_chunksize=65_536):  # a dict a row costs memory: never all at once
        yield from batch.to_pylist()


def _named(labeller: Labeller, name: str) -> Labeller:
    labeller.__name__ = name
    return labeller
