"""What does an engine get to render, and what is an engine? `Work` is encoded bytes and geometry, all numpy.

Made ahead of time in a few threads, since reading a file lets go of the interpreter lock. The order is the
caller's: `read_ahead` changes when work is done, never which.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.batch import ImageBatch
from thawline.dataio.errors import ResourceError
from thawline.dataio.pixels.geometry import Geometry

AHEAD = 3
"""Batches read ahead of the engine: the files of three batches hide a slow disk's latency."""
READERS = 2
LIMIT_S = 600.0
"""Of what is read ahead, a batch or a few files: no storage that answers at all takes so long."""

T = TypeVar("T")
R = TypeVar("R")


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
    """Stream positions (training) or rows of the part that were asked for: what `mend` makes again."""
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


def timed(items: Iterator[T], spent: dict[str, float], name: str) -> Iterator[T]:
    """`items`, with the seconds that whoever asks waits for each added to spent[name].

    Left out is what is meanwhile added under another name, so that all of `spent` together is the time that went by.
    """
    while True:
        began, others = perf_counter(), sum(spent.values())
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            spent[name] += max(0.0, perf_counter() - began - (sum(spent.values()) - others))
        yield item


def read_ahead(
    make: Callable[[T], R],
    items: Iterable[T],
    *,
    ahead: int = AHEAD,
    threads: int = READERS,
    limit_s: float = LIMIT_S,
) -> Iterator[R]:
    """Yield make(item) for each item, in order, keeping up to `ahead` of them under way in `threads` threads.

    Raises: ResourceError when one has not come `limit_s` after it was waited for: a mount that hangs never answers.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="thawline-read")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > ahead:
                yield _result(pending.popleft(), limit_s)
        while pending:
            yield _result(pending.popleft(), limit_s)
    finally:
        # Never wait here: an abandoned generator ends wherever the garbage collector happens to run, in a thread that
        # may hold the very lock that joining another thread needs. The pool's threads end by themselves.
        pool.shutdown(wait=False, cancel_futures=True)


def _result(made: Future[R], limit_s: float) -> R:
    if not wait([made], timeout=limit_s).done:
        raise ResourceError(
            f"nothing could be read for {limit_s:g} s: the storage of the images hangs, and all would wait for it; see "
            "whether it answers, and start again to go on"
        )
    return made.result()
