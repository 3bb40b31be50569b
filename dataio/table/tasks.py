"""What is each kind of label? A record a task: its column, which labels are wrong, its targets, its words.

A task has a record on each floor, in a plain dict under the same name: here, in models/heads.py and trainer/tasks.py,
and one in dataio/show.py draws its targets. A new task is an entry in each; no other code depends on a task's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thawline.dataio.labels import keypoints, masks, names, numbers
from thawline.dataio.labels.keypoints import Pairs
from thawline.dataio.labels.numbers import Moments
from thawline.dataio.labels.on_images import masks_on_images, points_on_images
from thawline.dataio.labels.targets import (
    Targets,
    View,
    class_flags,
    class_indices,
    drawn_by_the_engine,
    placed_points,
    plain_numbers,
)
from thawline.dataio.pixels.geometry import Geometry
from thawline.dataio.table.paths import tidy


@dataclass(frozen=True)
class Labels:
    """A labeller's labels of a table's images, before they are checked."""

    values: list[Any]
    """One an image; tuples and arrays are converted to lists, down to the numbers."""
    paths: pa.ChunkedArray
    root: str
    labeller: str
    """Its name, for messages."""
    classes: tuple[str, ...] | None
    """The vocabulary, where it is fixed."""


Column = tuple[list[Any], tuple[str, ...] | None, Sequence[str]]
"""Labels in the form of a table's column, the vocabulary if it is known, and notes for people."""


@dataclass(frozen=True)
class Meaning:
    """What the labels of a manifest mean, see manifest.Manifest; `counted`: `values` are 0, 1, 2, ... by default."""

    classes: tuple[str, ...]
    values: tuple[int, ...]
    swap: Pairs | None
    counted: bool


def _no_remarks(rows: pa.Table, checks: pa.Table, meaning: Meaning) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of label."""

    column: pa.DataType
    """The type of the column of labels in tables and manifests."""
    read: Callable[[Labels], Column]
    """Checks a labeller's labels and converts them. Raises LabelError, SourceError."""
    wrong: Callable[[pa.Array, Sequence[str]], NDArray[np.bool_]]
    """(labels of a manifest, its classes) -> which are invalid, (n,)."""
    targets: Callable[[pa.Array, View], Targets]
    """Labels of n samples -> their targets, (n, ...), for the images as the model sees them."""
    missing: Callable[[Any], bool] = names.is_missing
    """Whether a labeller gave an image no label."""
    remarks: Callable[[pa.Table, pa.Table, Meaning], Iterator[str]] = _no_remarks
    """(usable rows, checks of their files, what labels mean) -> notes on labels that look like mistakes."""
    names: Callable[[pa.Array], pa.Array] | None = None
    """For labels that are names of classes: all names in n labels, one after another."""
    one_class: bool = False
    """A label is the name of one class, so that training can draw images by class."""
    moments: Callable[[pa.Array, Sequence[str]], Moments] | None = None
    """For labels that are numbers: mean and deviation to standardise them by, from the training images."""
    mixes: tuple[str, ...] = ()
    """Which of mixup and cutmix allow targets to be mixed by the same shares as the images."""
    least_classes: int = 1
    """With fewer classes there is nothing to learn."""
    masks: bool = False
    """A label is the path of a second file, a picture of the classes; its hash is in the column `mask_hash`."""
    sided: bool = False
    """Names may have sides: images are mirrored only if the pairs that change places were given."""
    resized: Callable[[Any, tuple[float, float]], Any] | None = None
    """(label, factors of width and height) -> the label in the resized image; None where it does not change."""
    on_images: Callable[[NDArray[Any], Geometry, int], Sequence[NDArray[Any]]] | None = None
    """(what a model says of n squares, their geometry, side in px) -> the same of each image, in its own pixels; None
    where it lies nowhere."""
    option: str = "column"
    """The name of a column of these labels in `thawline index --label`."""
    labels_word: str = "labels"
    classes_word: str = "classes"

    @property
    def content(self) -> str:
        """The column that identifies a target."""
        return "mask_hash" if self.masks else "label"


# Reading --------------------------------------------------------------------------------------------------


def _read_names(labels: Labels, *, task: str, lists: bool) -> Column:
    column, notes = names.class_names(labels.values, labels.paths, labels.labeller, task, labels.classes, lists=lists)
    return column, labels.classes, notes


def _read_numbers(labels: Labels) -> Column:
    column, classes = numbers.read_numbers(labels.values, labels.paths, labels.labeller, labels.classes)
    return column, classes, ()


def _read_points(labels: Labels) -> Column:
    column, classes = keypoints.read_points(labels.values, labels.paths, labels.labeller, labels.classes)
    return column, classes, ()


def _read_masks(labels: Labels) -> Column:
    texts = names.texts(labels.values, labels.paths, labels.labeller, "mask", lists=False)
    column = tidy(texts, labels.root, labels.labeller)
    masks.check_apart(column, labels.paths.to_pylist(), labels.labeller)
    return column, labels.classes, ()


# Checking -------------------------------------------------------------------------------------------------


def _nulls(labels: pa.Array) -> NDArray[np.bool_]:
    nulls: NDArray[np.bool_] = labels.is_null().to_numpy(zero_copy_only=False).copy()
    return nulls


def _unknown(texts: pa.Array, classes: Sequence[str]) -> NDArray[np.bool_]:
    is_class: NDArray[np.bool_] = pc.is_in(texts, pa.array(classes, pa.string())).to_numpy(zero_copy_only=False)
    return ~is_class


def _wrong_name(labels: pa.Array, classes: Sequence[str]) -> NDArray[np.bool_]:
    return _nulls(labels) | _unknown(labels, classes)


def _wrong_names(labels: pa.Array, classes: Sequence[str]) -> NDArray[np.bool_]:
    wrong = _nulls(labels)
    wrong[_owners(labels)[_unknown(labels.flatten(), classes)]] = True
    return wrong


def _wrong_points(labels: pa.Array, classes: Sequence[str]) -> NDArray[np.bool_]:
    wrong, counts = _nulls(labels), _lengths(labels)
    wrong[_owners(labels)[np.isinf(labels.flatten().fill_null(0).to_numpy())]] = True
    return wrong | (counts % 2 == 1) | (counts > 2 * len(classes))


def _wrong_path(labels: pa.Array, classes: Sequence[str]) -> NDArray[np.bool_]:
    return _nulls(labels)


def _lengths(lists: pa.Array) -> NDArray[np.int32]:
    counts: NDArray[np.int32] = pc.list_value_length(lists).fill_null(0).to_numpy()
    return counts


def _owners(lists: pa.Array) -> NDArray[np.int64]:
    """For each item of n lists, the index of its list."""
    return np.repeat(np.arange(len(lists)), _lengths(lists))


# Remarks --------------------------------------------------------------------------------------------------


def _mask_remarks(rows: pa.Table, checks: pa.Table, meaning: Meaning) -> Iterator[str]:
    yield from masks.remarks(rows, checks, classes=meaning.classes, values=meaning.values, counted=meaning.counted)


def _number_remarks(rows: pa.Table, checks: pa.Table, meaning: Meaning) -> Iterator[str]:
    yield from numbers.remarks(rows, names=meaning.classes)


def _point_remarks(rows: pa.Table, checks: pa.Table, meaning: Meaning) -> Iterator[str]:
    yield from keypoints.remarks(rows, names=meaning.classes)
    if meaning.swap is None:
        yield keypoints.UNPAIRED


TASKS: dict[str, Task] = {
    "single_label": Task(
        column=pa.string(),
        read=partial(_read_names, task="single_label", lists=False),
        wrong=_wrong_name,
        targets=class_indices,
        names=lambda labels: labels,
        one_class=True,
        mixes=("mixup", "cutmix"),
        least_classes=2,
    ),
    "multi_label": Task(
        column=pa.list_(pa.string()),
        read=partial(_read_names, task="multi_label", lists=True),
        wrong=_wrong_names,
        targets=class_flags,
        names=lambda labels: labels.flatten(),
        mixes=("mixup", "cutmix"),
    ),
    "number": Task(
        column=pa.list_(pa.float64()),  # one of each name
        read=_read_numbers,
        wrong=numbers.wrong_numbers,
        targets=plain_numbers,
        missing=numbers.is_missing,
        remarks=_number_remarks,
        moments=numbers.moments,
        mixes=("mixup",),  # a rectangle of another image does not have a share of that image's number
        option="number",
        labels_word="numbers",
        classes_word="numbers",
    ),
    "points": Task(
        column=pa.list_(pa.float32()),  # x0, y0, x1, y1, ... in px of the upright image; NaN for a missing point
        read=_read_points,
        wrong=_wrong_points,
        targets=placed_points,
        missing=lambda value: value is None,  # a list of missing points is a label
        remarks=_point_remarks,
        sided=True,
        resized=keypoints.resized,
        on_images=points_on_images,
        option="points-column",
        labels_word="points",
        classes_word="points",
    ),
    "mask": Task(
        column=pa.string(),  # the path of the mask's file, in the form of the image's
        read=_read_masks,
        wrong=_wrong_path,
        targets=drawn_by_the_engine,
        remarks=_mask_remarks,
        least_classes=2,
        masks=True,
        on_images=masks_on_images,
        option="mask-column",
        labels_word="masks",
        classes_word="values",
    ),
}
"""By the name that manifests hold."""
