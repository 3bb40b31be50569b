"""What do the names and numbers of points mean? Which change places in a mirror, and which cannot be meant.

A mirrored left eye looks like a right one. Nobody but the user knows which names are such a pair, so training mirrors
images with points only where that was said.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.errors import quoted

UNPAIRED = (
    "points: nobody named those that change places in a mirror (thawline index --swap left_eye,right_eye), so no image "
    "is mirrored in training"
)

Pairs = tuple[tuple[str, str], ...]
"""Names that change places in a mirror image, each in one pair at most; empty where no point has a side."""


def check_pairs(pairs: Sequence[Sequence[str]], names: Sequence[str]) -> Pairs:
    """The pairs in the order of the points' names, however they were given.

    Raises: ValueError, with the reason, for what is no pair of two of the names, or a name that comes twice.
    """
    found = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"{_shown(pair)} is not a pair of two names")
        unknown = [name for name in pair if name not in names]
        if unknown:
            known = quoted(", ".join(names))
            raise ValueError(f"{quoted(repr(unknown[0]))} is not among the {len(names)} points ({known})")
        found.append(tuple(sorted(pair, key=list(names).index)))
    said = [name for pair in found for name in pair]
    twice = [name for name in said if said.count(name) > 1]
    if twice:
        raise ValueError(f"{quoted(repr(twice[0]))} is in two pairs")
    return tuple((one, other) for one, other in sorted(found, key=lambda pair: list(names).index(pair[0])))


def partners(names: Sequence[str], pairs: Pairs) -> NDArray[np.int64]:
    """(K,): for each point the index of the one whose place it takes in a mirror image; its own without a pair."""
    other = {**dict(pairs), **{b: a for a, b in pairs}}
    return np.array([list(names).index(other.get(name, name)) for name in names], np.int64)


def _shown(pair: Sequence[str]) -> str:
    return quoted(repr(pair if isinstance(pair, str) else ",".join(map(str, pair))))


def told(
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
