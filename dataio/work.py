"""What does an engine get to render? `Work`: the encoded bytes of a batch and its geometry, all numpy.

Made ahead of time in a few threads, since reading a file lets go of the interpreter lock. The order is the
caller's: `read_ahead` changes when work is done, never which.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dataio.errors import EngineError
from dataio.geometry import Geometry

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
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
    """(n,) or (n, C)"""


def read_file(path: str) -> NDArray[np.uint8]:
    """The bytes of a file, (bytes,) uint8. Raises EngineError naming the file when it cannot be read."""
    try:
        return np.frombuffer(Path(path).read_bytes(), np.uint8)
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read ({error.strerror}): it was there when the manifest was made; put it back, "
            "or index again"
        ) from error


def read_ahead(make: Callable[[T], R], items: Iterable[T], *, ahead: int, threads: int) -> Iterator[R]:
    """Yield make(item) for each item, in order, keeping up to `ahead` of them under way in `threads` threads."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="thawline-read")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Never wait here: an abandoned generator ends wherever the garbage collector happens to run, in a thread that
        # may hold the very lock that joining another thread needs. The pool's threads end by themselves.
        pool.shutdown(wait=False, cancel_futures=True)
