"""How is data read ahead of its use? In a few threads, since reading a file releases the interpreter lock.

The order is the caller's: `read_ahead` changes when something is done, never what.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import perf_counter
from typing import TypeVar

from thawline.dataio.errors import ResourceError

AHEAD = 3
"""Batches read ahead of the engine: the files of three batches hide a slow disk's latency."""
READERS = 2
LIMIT_S = 600.0
"""For one item, such as a batch: storage that responds at all is faster."""

T = TypeVar("T")
R = TypeVar("R")


def timed(items: Iterator[T], spent: dict[str, float], name: str) -> Iterator[T]:
    """`items`, adding the seconds that each was waited for to spent[name].

    Time that is meanwhile added under another name is not counted twice: the sum of `spent` is the time that passed.
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

    Raises: ResourceError when one takes longer than `limit_s` to wait for, as on a mount that hangs.
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
            f"nothing could be read for {limit_s:g} s: the storage of the images hangs, and the run would wait on; "
            "check that it responds, and start again to go on"
        )
    return made.result()
