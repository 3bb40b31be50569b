"""What does an engine get to render, and what is an engine? `Work` is encoded bytes and geometry, all numpy.

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
    """A batch to be rendered: n encoded files, what to do with them, and who they are."""

    encoded: list[NDArray[np.uint8]]
    """n encoded files, each (bytes,) uint8."""
    paths: list[str]
    """Where they came from; for messages."""
    geometry: Geometry
    ids: NDArray[np.int64]
    """(n,)"""
    targets: NDArray[np.int64] | NDArray[np.float32]
    """(n, ...): see targets.py; not looked at where there are masks, which engines turn into targets."""
    size_px: int
    """The side of what the model sees."""
    positions: NDArray[np.int64]
    """Stream positions (training) or rows of the subset that were asked for: what `mend` makes again."""
    masks: list[NDArray[np.uint8]] | None = None
    """n masks, each (h, w) uint8 class indices, of any size: each shows its whole image."""


Mend = Callable[[Work, dict[int, str]], Work]
"""(work, {place in it: reason}) -> the same positions without those files: the loader's part of surviving a bad one."""


class Engine(Protocol):
    """What renders work: DALI, or torch as its oracle."""

    def run(self, works: Iterator[Work], mend: Mend | None = None) -> Iterator[ImageBatch]:
        """One batch a Work, in order; one run at a time, and whoever abandons one may begin another."""

    def close(self) -> None:
        """Give back threads and memory; more than once is no error."""
