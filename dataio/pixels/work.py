"""What does an engine render, and what is an engine? `Work` is encoded bytes and geometry, all numpy.

It is made ahead of time, see ahead.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.batch import ImageBatch
from thawline.dataio.pixels.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class Work:
    """A batch to render: n encoded files, their geometry, targets and ids."""

    encoded: list[NDArray[np.uint8]]
    """n encoded files, each (bytes,) uint8."""
    paths: list[str]
    """For messages."""
    geometry: Geometry
    ids: NDArray[np.int64]
    """(n,)"""
    targets: NDArray[np.int64] | NDArray[np.float32]
    """(n, ...): see targets.py; unused where there are masks, which engines turn into targets."""
    size_px: int
    """Side of the output."""
    positions: NDArray[np.int64]
    """(n,): stream positions (training) or rows of the subset, from which `mend` makes the work again."""
    masks: list[NDArray[np.uint8]] | None = None
    """n masks, each (h, w) uint8 class indices, of any size: each covers its whole image."""


Mend = Callable[[Work, dict[int, str]], Work]
"""(work, {index in it: reason}) -> the same positions without those files: how a loader survives a bad file."""


class Engine(Protocol):
    """What renders work: DALI, or torch as its oracle."""

    def run(self, works: Iterator[Work], mend: Mend | None = None) -> Iterator[ImageBatch]:
        """One batch for each Work, in order; one run at a time, and a new one may follow one that was abandoned."""

    def close(self) -> None:
        """Release threads and memory; a second call does nothing."""
