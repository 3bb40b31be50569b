"""How is anything read ahead of who needs it? In a few threads, since reading a file lets go of the interpreter lock.

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
"""Of what is read ahead, a batch or a few files: no storage that answers at all takes so long."""

T = TypeVar("T")
R = TypeVar("R")


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
