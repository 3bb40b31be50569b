"""What do the names and numbers of points mean? Which change places in a mirror, and which cannot be meant.

A mirrored left eye looks like a right one. Nobody but the user knows which names are such a pair, so training mirrors
images with points only where that was said.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
            raise ValueError(f"{unknown[0]!r:.80} is not among the {len(names)} points ({', '.join(names):.80})")
        found.append(tuple(sorted(pair, key=list(names).index)))
    said = [name for pair in found for name in pair]
    twice = [name for name in said if said.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]!r:.80} is in two pairs")
    return tuple((one, other) for one, other in sorted(found, key=lambda pair: list(names).index(pair[0])))


def partners(names: Sequence[str], pairs: Pairs) -> NDArray[np.int64]:
    """(K,): for each point the index of the one whose place it takes in a mirror image; its own without a pair."""
    other = {**dict(pairs), **{b: a for a, b in pairs}}
    return np.array([list(names).index(other.get(name, name)) for name in names], np.int64)


def _shown(pair: Sequence[str]) -> str:
    return f"{pair if isinstance(pair, str) else ','.join(map(str, pair))!r:.80}"
