"""What do the names and numbers of points mean? Lists of numbers as points, pairs in a mirror, unlikely places.

A mirrored left eye looks like a right one. Only the user knows which names are such a pair, so training mirrors images
with points only if the pairs were given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thawline.dataio.errors import LabelError, quoted
from thawline.dataio.labels.names import check_none_missing, some

_FARTHEST_PX = 1e9  # its square is still finite in float32

_OUTSIDE = "what lies outside counts only where training shows a border there (padding, a rotation)"
_A_PLACE = "it will be trained on as a place"

UNPAIRED = (
    "points: none are known to change places in a mirror (thawline index --swap left_eye,right_eye), so no image is "
    "mirrored in training"
)

Pairs = tuple[tuple[str, str], ...]
"""Names that change places in a mirror image, each in one pair at most; empty where no point has a side."""


def read_points(
    labels: list[Any], paths: pa.ChunkedArray, name: str, vocabulary: tuple[str, ...] | None
) -> tuple[list[list[float]], tuple[str, ...]]:
    """Lists x0, y0, x1, y1, ... and the names of the points; by default as many as the longest list has."""
    check_none_missing([index for index, value in enumerate(labels) if value is None], paths, name)
    column = []
    for index, value in enumerate(labels):
        try:
            column.append(_flat(value))
        except (TypeError, ValueError) as error:
            raise LabelError(
                f"{name} gives {quoted(paths[index].as_py())} what is not a list of points ({quoted(str(error))}): "
                "give x and y of each in px, and nothing or NaN for both where the image does not show one"
            ) from error
    most = max(map(len, column)) // 2
    if all(math.isnan(number) for flat in column for number in flat):
        raise LabelError(
            f"{name} gives none of the {len(column)} images a point: there is nothing to learn; correct it"
        )
    if vocabulary is not None and most > len(vocabulary):
        long = [index for index, flat in enumerate(column) if len(flat) > 2 * len(vocabulary)]
        raise LabelError(
            f"{name} gives {len(long)} images more than the {len(vocabulary)} named points ({some(paths, long)}): "
            "a model for these names could not predict them; name more, or correct the labels"
        )
    return column, vocabulary or tuple(f"point {i}" for i in range(most))


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
    """The pairs in the order of the points' names.

    Raises: ValueError, with the reason, for what is not a pair of two of the names, or a name in two pairs.
    """
    ordered = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"{_quoted_pair(pair)} is not a pair of two names")
        unknown = [name for name in pair if name not in names]
        if unknown:
            all_names = quoted(", ".join(names))
            raise ValueError(f"{quoted(repr(unknown[0]))} is not among the {len(names)} points ({all_names})")
        ordered.append(tuple(sorted(pair, key=list(names).index)))
    paired = [name for pair in ordered for name in pair]
    twice = [name for name in paired if paired.count(name) > 1]
    if twice:
        raise ValueError(f"{quoted(repr(twice[0]))} is in two pairs")
    return tuple((first, second) for first, second in sorted(ordered, key=lambda pair: list(names).index(pair[0])))


def partners(names: Sequence[str], pairs: Pairs) -> NDArray[np.int64]:
    """(K,): for each point the index of its partner in a mirror image; its own without a pair."""
    partner = {**dict(pairs), **{b: a for a, b in pairs}}
    return np.array([list(names).index(partner.get(name, name)) for name in names], np.int64)


def _quoted_pair(pair: Sequence[str]) -> str:
    return quoted(repr(pair if isinstance(pair, str) else ",".join(map(str, pair))))


def warnings(
    points: NDArray[np.float64], sizes: NDArray[np.int64], *, names: Sequence[str], paths: Sequence[str]
) -> tuple[str, ...]:
    """Warnings about coordinates that look like mistakes.

    points: (n, K, 2) x, y in px of the upright images, NaN for a missing point. sizes: (n, 2) width and height in px,
    0 where unknown. names: of the K points. paths: of the n images.
    """
    sentences = []
    absent = np.zeros(points.shape[:2], np.bool_)
    for corner in (-1, 0):
        at_place = np.asarray((points == corner).all(axis=2))
        absent |= at_place
        if at_place.any():
            sentences.append(
                f"WARNING: {_counted(at_place, paths)} lie at exactly ({corner}, {corner}): many tools write that "
                f"where a point is not shown, and {_OUTSIDE if corner else _A_PLACE}; leave such cells empty"
            )
    others = points[~absent & ~np.isnan(points[..., 0])]
    if len(others) and np.abs(others).max() <= 1 and sizes.max(initial=0) > 2:
        sentences.append(
            f"WARNING: all points lie between {others.min():.2g} and {others.max():.2g} px: that looks like shares of "
            "the sides, and they will be trained on as px; multiply them by width and height"
        )
        return tuple(sentences)
    sized = np.asarray((sizes > 0).all(axis=1))
    outside = np.asarray(((points < 0) | (points > sizes[:, None])).any(axis=2)) & ~absent & sized[:, None]
    if outside.any():
        row, k = (int(index) for index in np.argwhere(outside)[0])
        (x, y), (width, height) = points[row, k], sizes[row]
        sentences.append(
            f"WARNING: {_counted(outside, paths)} lie outside their image ({quoted(names[k])} of {quoted(paths[row])} "
            f"at {x:.10g}, {y:.10g} px of {width} x {height}), and {_OUTSIDE}; correct them, or leave such cells empty"
        )
    return tuple(sentences)


def _counted(mask: NDArray[np.bool_], paths: Sequence[str]) -> str:
    rows = np.flatnonzero(mask.any(axis=1))
    first = ", ".join(quoted(paths[row]) for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
    return f"{mask.sum():,} points in {len(rows):,} images ({first})"


def resized(label: list[float | None], factors: tuple[float, float]) -> list[float | None]:
    """x0, y0, x1, y1, ... in an image whose width and height were multiplied by these."""
    return [None if coordinate is None else coordinate * factors[j % 2] for j, coordinate in enumerate(label)]


def points(labels: pa.Array, count: int) -> NDArray[np.float64]:
    """Lists x0, y0, x1, y1, ... as (n, count, 2) float64 px, NaN where a list is shorter or a value null."""
    out = np.full((len(labels), 2 * count), np.nan)
    values = labels.flatten().fill_null(np.nan).to_numpy(zero_copy_only=False)
    lengths = labels.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(labels)), lengths)
    out[row, np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)] = values
    return out.reshape(len(labels), count, 2)


def remarks(rows: pa.Table, *, names: Sequence[str]) -> Iterator[str]:
    """`warnings` about the points of a manifest's usable rows."""
    sizes = np.stack([rows[name].fill_null(0).to_numpy().astype(np.int64) for name in ("width", "height")], 1)
    placed = points(rows["label"].combine_chunks(), len(names))
    yield from warnings(placed, sizes, names=names, paths=rows["path"].to_pylist())
