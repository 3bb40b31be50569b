"""What do the names and numbers of points mean? Lists of numbers as points, pairs in a mirror, and what is no place.

A mirrored left eye looks like a right one. Nobody but the user knows which names are such a pair, so training mirrors
images with points only where that was said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thawline.dataio.errors import LabelError, quoted
from thawline.dataio.labels.names import complain_of, some

_FARTHEST_PX = 1e9  # float32 has no end below, but its square has

UNPAIRED = (
    "points: nobody named those that change places in a mirror (thawline index --swap left_eye,right_eye), so no image "
    "is mirrored in training"
)

Pairs = tuple[tuple[str, str], ...]
"""Names that change places in a mirror image, each in one pair at most; empty where no point has a side."""


def read_points(
    labels: list[Any], paths: pa.ChunkedArray, name: str, known: tuple[str, ...] | None
) -> tuple[list[list[float]], tuple[str, ...]]:
    """Lists x0, y0, x1, y1, ... and the names of as many points as the longest has."""
    complain_of([index for index, value in enumerate(labels) if value is None], paths, name)
    column = []
    for index, value in enumerate(labels):
        try:
            column.append(_flat(value))
        except (TypeError, ValueError) as error:
            raise LabelError(
                f"{name} gives {quoted(paths[index].as_py())} what is no list of points ({quoted(str(error))}): give x "
                "and y of each in px, and nothing or NaN for both where the image does not show one"
            ) from error
    most = max(map(len, column)) // 2
    if all(math.isnan(number) for flat in column for number in flat):
        raise LabelError(
            f"{name} gives none of the {len(column)} images a point: there is nothing to learn; correct it"
        )
    if known is not None and most > len(known):
        long = [index for index, flat in enumerate(column) if len(flat) > 2 * len(known)]
        raise LabelError(
            f"{name} gives {len(long)} images more than the {len(known)} named points ({some(paths, long)}): "
            "a model for these could not say them; name more, or correct the labels"
        )
    return column, known or tuple(f"point {i}" for i in range(most))


def _flat(value: Any) -> list[float]:
    """One image's points, in pairs or one number after another, as x0, y0, x1, y1, ..."""
    if not isinstance(value, list):
        raise TypeError(f"{quoted(repr(value))} is not a list")
    if any(isinstance(item, list) for item in value):
        value = [number for pair in value for number in (pair if pair is not None else (None, None))]
    numbers = [math.nan if number is None or number == "" else float(number) for number in value]
    if len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers are no pairs")
    for x, y in zip(numbers[::2], numbers[1::2], strict=True):
        if max(abs(x), abs(y)) > _FARTHEST_PX or math.isnan(x) != math.isnan(y):
            raise ValueError(f"({x}, {y}) is not a point")
    return numbers


def check_pairs(pairs: Sequence[Sequence[str]], names: Sequence[str]) -> Pairs:
    """The pairs in the order of the points' names, however they were given.

    Raises: ValueError, with the reason, for what is no pair of two of the names, or a name that comes twice.
    """
    ordered = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"{_shown(pair)} is not a pair of two names")
        unknown = [name for name in pair if name not in names]
        if unknown:
            known = quoted(", ".join(names))
            raise ValueError(f"{quoted(repr(unknown[0]))} is not among the {len(names)} points ({known})")
        ordered.append(tuple(sorted(pair, key=list(names).index)))
    every = [name for pair in ordered for name in pair]
    twice = [name for name in every if every.count(name) > 1]
    if twice:
        raise ValueError(f"{quoted(repr(twice[0]))} is in two pairs")
    return tuple((one, other) for one, other in sorted(ordered, key=lambda pair: list(names).index(pair[0])))


def partners(names: Sequence[str], pairs: Pairs) -> NDArray[np.int64]:
    """(K,): for each point the index of the one whose place it takes in a mirror image; its own without a pair."""
    other = {**dict(pairs), **{b: a for a, b in pairs}}
    return np.array([list(names).index(other.get(name, name)) for name in names], np.int64)


def _shown(pair: Sequence[str]) -> str:
    return quoted(repr(pair if isinstance(pair, str) else ",".join(map(str, pair))))


def warnings(
    points: NDArray[np.float64], sizes: NDArray[np.int64], *, names: Sequence[str], paths: Sequence[str]
) -> tuple[str, ...]:
    """Sentences on coordinates that hardly are what they say, loud ones.

    points: (n, K, 2) x, y in px of the upright images, NaN where there is none. sizes: (n, 2) width and height in px,
    0 where they are not known. names: of the K points. paths: of the n images.
    """
    sentences = []
    absent = np.zeros(points.shape[:2], np.bool_)
    for place in (-1, 0):
        there = np.asarray((points == place).all(axis=2))
        absent |= there
        if there.any():
            sentences.append(
                f"WARNING: {_counted(there, paths)} lie at exactly ({place}, {place}): many tools write that where a "
                "point is not shown, and it will be trained on as a place; leave such cells empty"
            )
    rest = points[~absent & ~np.isnan(points[..., 0])]
    if len(rest) and np.abs(rest).max() <= 1 and sizes.max(initial=0) > 2:
        sentences.append(
            f"WARNING: all points lie between {rest.min():.2g} and {rest.max():.2g} px: that looks like shares of the "
            "sides, and they will be trained on as px; multiply them by width and height"
        )
        return tuple(sentences)
    known = np.asarray((sizes > 0).all(axis=1))
    outside = np.asarray(((points < 0) | (points > sizes[:, None])).any(axis=2)) & ~absent & known[:, None]
    if outside.any():
        row, k = (int(at) for at in np.argwhere(outside)[0])
        (x, y), (width, height) = points[row, k], sizes[row]
        sentences.append(
            f"WARNING: {_counted(outside, paths)} lie outside their image ({quoted(names[k])} of {quoted(paths[row])} "
            f"at {x:.10g}, {y:.10g} px of {width} x {height}), and will be trained on there; correct them, or leave "
            "such cells empty"
        )
    return tuple(sentences)


def _counted(which: NDArray[np.bool_], paths: Sequence[str]) -> str:
    rows = np.flatnonzero(which.any(axis=1))
    first = ", ".join(quoted(paths[row]) for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
    return f"{which.sum():,} points in {len(rows):,} images ({first})"


def resized(label: list[float | None], factors: tuple[float, float]) -> list[float | None]:
    """x0, y0, x1, y1, ... in an image whose width and height were multiplied by these."""
    return [None if at is None else at * factors[j % 2] for j, at in enumerate(label)]


def points(labels: pa.Array, count: int) -> NDArray[np.float64]:
    """Lists x0, y0, x1, y1, ... as (n, count, 2) float64 px, NaN where a list is shorter or a value null."""
    out = np.full((len(labels), 2 * count), np.nan)
    values = labels.flatten().fill_null(np.nan).to_numpy(zero_copy_only=False)
    lengths = labels.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(labels)), lengths)
    out[row, np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)] = values
    return out.reshape(len(labels), count, 2)


def remarks(rows: pa.Table, *, names: Sequence[str]) -> Iterator[str]:
    """`warnings` on the points of a manifest's usable rows."""
    sizes = np.stack([rows[name].fill_null(0).to_numpy().astype(np.int64) for name in ("width", "height")], 1)
    placed = points(rows["label"].combine_chunks(), len(names))
    yield from warnings(placed, sizes, names=names, paths=rows["path"].to_pylist())
