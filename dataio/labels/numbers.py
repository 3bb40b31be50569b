"""Which numbers does a label hold? One or several for each image, such as an age, or a length and a width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thawline.dataio.errors import LabelError, ManifestError, quoted
from thawline.dataio.labels.names import check_none_missing

_COARSEST = 0.1
"""The most that float32 may round by, in standard deviations."""

Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""The mean and the standard deviation of each number."""


def is_missing(value: Any) -> bool:
    """Whether one of an image's numbers is missing: nothing, an empty cell, or NaN."""
    return any(map(_is_absent, value)) if isinstance(value, list) else _is_absent(value)


def _is_absent(number: Any) -> bool:
    if isinstance(number, str):
        return number.strip().lower() in ("", "nan")
    return number is None or (isinstance(number, float) and math.isnan(number))


def read_numbers(
    labels: list[Any], paths: pa.ChunkedArray, name: str, names: tuple[str, ...] | None
) -> tuple[list[list[float]], tuple[str, ...]]:
    """One list of finite numbers an image, and their names.

    Raises LabelError for a missing number, for what is not a finite number, and for lists of different lengths.
    """
    check_none_missing([index for index, value in enumerate(labels) if is_missing(value)], paths, name)
    column = []
    for index, value in enumerate(labels):
        try:
            column.append([_finite(number) for number in (value if isinstance(value, list) else [value])])
        except (TypeError, ValueError) as error:
            raise LabelError(
                f"{name} gives {quoted(paths[index].as_py())} what is not a number ({quoted(str(error))}): nothing "
                "could be learned from it; give finite numbers such as 3.5"
            ) from error
    names = names or ("number",)
    count = len(column[0]) if len(names) == 1 else len(names)  # one name may be that of a column of lists
    odd = next((index for index, numbers in enumerate(column) if len(numbers) != count or not count), None)
    if odd is not None:
        raise LabelError(
            f"{name} gives {quoted(paths[odd].as_py())} {len(column[odd])} numbers and not {count}: a model has "
            "the same outputs for every image; give each image the same numbers, at least one"
        )
    return column, names if count == len(names) else tuple(f"{names[0]} {i}" for i in range(count))


def _finite(number: Any) -> float:
    value = float(number)
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{number} is not finite" + " in float32" * math.isfinite(value))
    return value


def wrong_numbers(labels: pa.Array, classes: Sequence[str]) -> NDArray[np.bool_]:
    """Which labels are not a finite number for each name, (n,)."""
    counts = labels.value_lengths().fill_null(0).to_numpy()
    owners = np.repeat(np.arange(len(labels)), counts)
    wrong: NDArray[np.bool_] = counts != len(classes)
    wrong[owners[~np.isfinite(labels.flatten().fill_null(np.nan).to_numpy())]] = True
    return wrong


def moments(labels: pa.Array, names: Sequence[str]) -> Moments:
    """Mean and standard deviation of each number over n labels.

    Raises ManifestError where one is always the same, or as good as that in float32.
    """
    values = labels.flatten().to_numpy().reshape(len(labels), len(names))
    mean, std = values.mean(axis=0), values.std(axis=0)
    same = next((name for name, spread in zip(names, std, strict=True) if not spread > 0), None)
    if same is not None:
        raise ManifestError(
            f"the {len(labels):,} training images have the same {quoted(same)}: there is nothing to learn; index "
            "images whose numbers differ"
        )
    steps = np.spacing(np.abs(values).max(axis=0).astype(np.float32)).astype(np.float64)
    for name, step, spread in zip(names, steps, std, strict=True):
        if step / 2 > _COARSEST * spread:
            raise ManifestError(
                f"the training images' {quoted(name)} differ by {spread:.3g} (standard deviation), and float32, as "
                f"targets are, has steps of {step:.3g} there: they would be mistaken for one another; index them "
                "with a constant taken off"
            )
    return tuple(mean.tolist()), tuple(std.tolist())


def remarks(rows: pa.Table, *, names: Sequence[str]) -> Iterator[str]:
    """The range of the numbers of a manifest's usable rows, a line each."""
    values = rows["label"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, len(names))
    for name, column in zip(names, values.T, strict=True):
        ends, middle = f"{column.min():.6g} to {column.max():.6g}", f"{column.mean():.6g} +- {column.std():.6g}"
        yield f"{quoted(name)}: {ends}, {middle} (mean and standard deviation)"
