"""What is each image?

A labeller is a function from a row to its label: a text, a list of texts, numbers, points, or the path of a mask.
`label` runs it over a table and fixes the task, whose record (tasks.py) checks the labels. No file is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from thawline.dataio.errors import LabelError, SourceError, listed, quoted
from thawline.dataio.labels.keypoints import Pairs, check_pairs
from thawline.dataio.labels.names import check_lines, some
from thawline.dataio.table.sources import Table, from_paths
from thawline.dataio.table.tasks import TASKS, Labels

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Labeller:
    """A function with a name for messages, and the task and classes of its labels. A bare function will do, too."""

    fn: Callable[[Row], Any]
    name: str
    task: str | None = None
    classes: tuple[str, ...] | None = None

    def __call__(self, row: Row) -> Any:
        """The label of one row; None where there is none."""
        return self.fn(row)


def by_parent() -> Labeller:
    """Label an image with the name of its folder; one directly in the root has no label."""
    # texts, not pathlib: 0.4 instead of 6 microseconds a row
    return Labeller(lambda row: row["path"].rpartition("/")[0].rpartition("/")[2] or None, "by_parent()")


def by_regex(pattern: str, *, whole_path: bool = False) -> Labeller:
    """Label an image with the match of `pattern` in its file name: group 1 if there is one, else the whole match.

    With whole_path the pattern is searched in the path below the root, folders included.

    Raises: LabelError for a malformed pattern.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise LabelError(
            f"pattern {quoted(repr(pattern))} is not a regular expression ({error}): correct or escape it"
        ) from error

    def search(row: Row) -> str | None:
        match = regex.search(row["path"] if whole_path else row["path"].rpartition("/")[2])
        return match.group(1 if regex.groups else 0) if match else None

    return Labeller(search, f"by_regex({quoted(repr(pattern))})")


def by_column(name: str, *, delimiter: str | None = None) -> Labeller:
    """Label an image with a column's value, or with the values between delimiters (multi_label).

    With a delimiter the values are stripped and empty ones dropped; an empty cell is an image without any of the
    classes. A column of lists is multi_label without a delimiter. With `label(..., task="mask")` the value is the path
    of the mask's file, with task="points" a list of numbers x0, y0, x1, y1, ...

    Raises (when called on a row): LabelError when there is no such column.
    """
    if delimiter == "":
        raise LabelError("delimiter '' separates nothing: give the character between the labels, or None")

    def cell(row: Row) -> Any:
        value = _cell(row, name)
        if delimiter is None or isinstance(value, list):
            return value
        return [item.strip() for item in str(value or "").split(delimiter) if item.strip()]

    return Labeller(cell, f"by_column({quoted(repr(name))})")


def by_function(fn: Callable[[Row], Any]) -> Labeller:
    """Label an image with what `fn` returns for its row ('path' and the source's columns)."""
    if not callable(fn):
        raise LabelError(f"{quoted(repr(fn))} is not a function: it cannot label; give one from a row to a label")
    return Labeller(fn, f"by_function({getattr(fn, '__name__', fn)})")


def by_list(labels: Iterable[Any]) -> Labeller:
    """Label the images with these labels, in order; for one call of `label`."""
    remaining = iter(labels)
    return Labeller(lambda row: next(remaining), "the list of labels")


def mask_path(template: str | Callable[[Row], Any]) -> Labeller:
    """Label an image with the file that holds its mask, relative to the table's root (or an absolute local path).

    `place` is a function from a row to the path, or a template such as "annotations/{parent}/{stem}.png": {parent} is
    the folder of the image below the root, {name} its file name, {stem} the name without its suffix.

    Raises: LabelError for a template with any other placeholder.
    """
    if not isinstance(template, str):
        return Labeller(template, f"mask_path({getattr(template, '__name__', template)})", "mask")
    try:
        same = template.format(parent="a", name="b", stem="c") == template.format(parent="d", name="e", stem="f")
    except (LookupError, ValueError, AttributeError, MemoryError) as error:
        raise LabelError(
            f"mask template {quoted(repr(template))} cannot be filled ({quoted(repr(error))}): its placeholders are "
            "{parent}, {name}, {stem}"
        ) from error
    if same:
        raise LabelError(
            f"mask template {quoted(repr(template))} is one file for all images: put {{stem}} or {{name}} where the "
            "names differ"
        )

    def fill(row: Row) -> str:
        path = PurePosixPath(row["path"])
        return template.format(parent=path.parent, name=path.name, stem=path.stem)

    return Labeller(fill, f"mask_path({quoted(repr(template))})", "mask")


def numbers_by_columns(columns: Sequence[str]) -> Labeller:
    """Label an image with the numbers in these columns, named after them; or in one column of lists.

    An image that lacks one of them has no label: see `skip_unlabelled` of `label`.

    Raises: LabelError for no column, or one that comes twice.
    """
    columns = list(columns)
    name = f"numbers_by_columns({listed(columns)})"
    if not columns or len(set(columns)) < len(columns):
        raise LabelError(f"{name} repeats a column or has none: give each column of numbers once")

    def cells(row: Row) -> Any:
        values = [_cell(row, column) for column in columns]
        return values[0] if len(values) == 1 else values

    return Labeller(cells, name, "number", tuple(columns))


def points_by_columns(columns: Sequence[str]) -> Labeller:
    """Label an image with the points in columns x0, y0, x1, y1, ..., in px of the upright image.

    A pair of columns that differ only in one 'x' and 'y' names its point: left_x, left_y is 'left'; others are
    'point 0' and so on. An empty pair is a point that the image does not show.

    Raises: LabelError for columns that do not pair up.
    """
    columns = list(columns)
    name = f"points_by_columns({listed(columns)})"
    if not columns or len(columns) % 2 or len(set(columns)) < len(columns):
        raise LabelError(
            f"{name} has {len(columns)} columns that do not pair up: give x and y for every point, once each"
        )
    names = [
        _point_name(x, y) or f"point {i}" for i, (x, y) in enumerate(zip(columns[::2], columns[1::2], strict=True))
    ]
    if len(set(names)) < len(names):
        names = [f"point {i}" for i in range(len(names))]
    return Labeller(lambda row: [_cell(row, column) for column in columns], name, "points", tuple(names))


def points_by_function(fn: Callable[[Row], Any]) -> Labeller:
    """Label an image with the points that `fn` returns for its row: (k, 2) numbers x, y in px of the upright image.

    None or NaN stands for a point that the image does not show. Images may have different numbers of points; those with
    fewer lack the last ones, and an image may lack all.
    """

    def points_of(row: Row) -> Any:
        points = _plain(fn(row))
        if not isinstance(points, list):
            return points
        return [(None, None) if point is None else point for point in points]

    return Labeller(points_of, f"points_by_function({getattr(fn, '__name__', fn)})", "points")


def label(
    table: Table,
    labeller: Labeller | Callable[[Row], Any],
    *,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    values: Sequence[int] | None = None,
    swap: Sequence[tuple[str, str]] | None = None,
    skip_unlabelled: bool = False,
) -> Table:
    """Return the table with its `label` column, its task, and what the labels mean.

    `task` is by default the labeller's, or inferred: lists are multi_label, all else single_label. `classes` is the
    vocabulary, in the order of the targets: class names (by default those that occur, sorted), the names of the points,
    or the names of a mask's classes. `values` are the pixel values of these, 0, 1, 2, ... by default; for a mask with
    neither, `split` uses the values that occur, each named by its number.
    `swap` are the pairs of points that change places in a mirror image, such as [("left eye", "right eye")]: only with
    it does training mirror images, since a mirrored left eye would keep its name. Empty: no point has a side.
    With `skip_unlabelled`, images without a label are left out and counted in `notes`. Class names are normalised: see
    names.py.

    Raises: LabelError when an image has no label, when a label is not in the given vocabulary, when all have the same
        (single_label without one), when some have one label and others a list, when points are not finite pairs,
        when `swap` is no pairs of their names, or when the labeller fails; SourceError for the path of a mask that is
        none.
    """
    name = str(getattr(labeller, "name", None) or getattr(labeller, "__name__", labeller))
    labels = [_label_of(labeller, name, row) for row in _rows_of(table.rows)]
    task = task or getattr(labeller, "task", None) or _task(labels)
    if task not in TASKS:
        raise LabelError(f"task {quoted(repr(task))} is not known: give {', '.join(TASKS)}")
    if TASKS[task].names:
        check_lines(labels, table.rows["path"], name)
    if skip_unlabelled:
        table, labels = _labelled(table, labels, name, task)
    names = classes or getattr(labeller, "classes", None)
    vocabulary, numbers = _vocabulary(names, values, task)
    column, vocabulary, notes = TASKS[task].read(Labels(labels, table.rows["path"], table.root, name, vocabulary))
    rows = table.rows.drop_columns(["label"]) if "label" in table.rows.column_names else table.rows
    return replace(
        table,
        rows=rows.append_column("label", pa.array(column, TASKS[task].column)),
        task=task,
        classes=vocabulary,
        values=numbers,
        counted=values is None and numbers is not None,
        swap=_swap(swap, vocabulary, task),
        notes=(*table.notes, *notes),
    )


def from_lists(
    paths: Sequence[str | Path],
    labels: Sequence[Any] | None = None,
    *,
    root: str | Path | None = None,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    values: Sequence[int] | None = None,
) -> Table:
    """Pair paths with labels: a text or a list of texts each, the path of a mask (task="mask"), or (k, 2) points in px
    of the upright image (task="points"). The table is labelled, see `label` for task, classes and values; without
    labels it is that of any other source.

    Raises: SourceError as `from_csv`, or when the lengths differ; LabelError as `label`.
    """
    table = from_paths(paths, root=root)
    if labels is None:
        return table
    if len(paths) != len(labels):
        raise SourceError(f"{len(paths)} paths but {len(labels)} labels: they cannot be paired; give one label a path")
    return label(table, by_list(labels), task=task, classes=classes, values=values)


def _labelled(table: Table, labels: list[Any], name: str, task: str) -> tuple[Table, list[Any]]:
    """A table and its labels without the images that have none."""
    labelled = [index for index, value in enumerate(labels) if not TASKS[task].missing(value)]
    unlabelled = sorted(set(range(len(labels))) - set(labelled))
    if not unlabelled or not labelled:  # none at all is an error, raised later
        return table, labels
    note = (
        f"WARNING: {len(unlabelled):,} of {len(labels):,} images are left out, since {name} gives them no label "
        f"({some(table.rows['path'], unlabelled)})"
    )
    table = replace(table, rows=table.rows.take(pa.array(labelled, pa.int64())), notes=(*table.notes, note))
    return table, [labels[index] for index in labelled]


# Vocabularies ---------------------------------------------------------------------------------------------


def _vocabulary(
    classes: Sequence[str] | None, values: Sequence[int] | None, task: str
) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """The classes if they are fixed, and the pixel values of a mask's: 0, 1, 2, ... if none were given."""
    names = None if classes is None else tuple(map(str, classes))
    if names is not None and (len(set(names)) < len(names) or "" in names):
        raise LabelError(f"the classes ({listed(names)}) repeat or lack a name: give each one once")
    if values is None:
        return names, tuple(range(len(names))) if names and TASKS[task].masks else None
    if not TASKS[task].masks:
        raise LabelError(f"values are the pixel values of masks, and the task is {task}: leave them out")
    if not values or len(set(values)) < len(values) or not all(0 <= value <= 255 for value in values):
        raise LabelError(
            f"values {quoted(repr(list(values)))} are not the pixel values of classes: give each once, 0 to 255"
        )
    if names is not None and len(names) != len(values):
        raise LabelError(f"{len(names)} classes but {len(values)} values: give each class its pixel value")
    return names or tuple(map(str, values)), tuple(map(int, values))


def _task(labels: list[Any]) -> str:
    return "multi_label" if any(isinstance(value, list) for value in labels) else "single_label"


def _swap(pairs: Sequence[tuple[str, str]] | None, names: tuple[str, ...] | None, task: str) -> Pairs | None:
    if pairs is None:
        return None
    if not TASKS[task].sided:
        raise LabelError(f"swap names points that change places in a mirror, and the task is {task}: leave it out")
    try:
        return check_pairs(pairs, names or ())
    except ValueError as error:
        raise LabelError(
            f"swap cannot be used ({error}): a mirrored image would get wrong names; name two points that change "
            "places, each once, such as left_eye,right_eye"
        ) from error


def _point_name(x: str, y: str) -> str:
    """The common part of two column names that differ only in an x and a y; '' for others."""
    differ = [i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b]
    if len(x) != len(y) or len(differ) != 1 or (x[differ[0]] + y[differ[0]]).lower() != "xy":
        return ""
    return (x[: differ[0]] + x[differ[0] + 1 :]).strip("_-. ")


# All of them ----------------------------------------------------------------------------------------------


def _label_of(labeller: Callable[[Row], Any], name: str, row: Row) -> Any:
    try:
        return _plain(labeller(row))
    except LabelError:
        raise
    except Exception as error:
        raise LabelError(
            f"{name} failed on {quoted(row['path'])} with {quoted(repr(error))}: correct the function"
        ) from error


def _plain(value: Any) -> Any:
    """Arrays, tuples and sets as lists, down to the numbers; everything else as it is."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _cell(row: Row, name: str) -> Any:
    if name not in row:
        available = f"there are {listed(row)}: name one of these"
        if list(row) == ["path"]:  # perhaps the separator was not detected
            available = "there is none but that of the paths: if the list has more, name their separator (--separator)"
        raise LabelError(f"no column {quoted(repr(name))} to take labels from; {available}")
    return row[name]


def _rows_of(rows: pa.Table) -> Iterator[Row]:
    for batch in rows.to_batches(max_chunksize=65_536):  # a dict a row takes memory: never all at once
        yield from batch.to_pylist()
