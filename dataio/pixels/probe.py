"""What does DALI show of a file? Asked in a process of its own, which may die of the file, or talk about it, unheard.

DALI's libraries write to stderr about files that they decode all the same, once for every decoding, and a file that
none of them knows may end the process. So `thawline index` asks in children (decoding.py is what they run): what made
one talk or die is left to Pillow, and training, which decodes the same bytes, is silent and lives. A child takes half
a CPU-second to start (no torch, no pyarrow), and pixels cross only where they differ.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import IO

import numpy as np
import xxhash
from numpy.typing import NDArray

from thawline.dataio.errors import ResourceError
from thawline.dataio.pixels import decoding

Found = NDArray[np.uint8] | str
"""The pixels that DALI shows, (H, W, 3) uint8, or why this file is not for DALI."""
Ask = Callable[[Sequence[bytes], Sequence[NDArray[np.uint8]]], list[Found]]
"""(at most decoding.AT_ONCE encoded files, what Pillow shows of each) -> what DALI does: the same arrays if equal."""


def installed() -> bool:
    """Whether there is a DALI to ask."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


@contextlib.contextmanager
def dali() -> Iterator[Ask | None]:
    """Whom to ask about encoded files, from any thread; None where DALI is not installed.

    Each thread that asks while the others do gets a child of its own, when it first asks; all of them end with this.
    Asking raises ResourceError when no child can be started.
    """
    children = Children()
    try:
        yield children.ask if installed() else None
    finally:
        children.close()


class _GoneError(Exception):
    """The child has ended."""


class Child:
    """One process: files go in, answers come out."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", decoding.__file__],  # -P: beside it lie names that others have too
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ResourceError(
                f"no process to ask DALI in could be started ({error.strerror}): no image could be checked; raise the "
                "limits of open files and processes (ulimit -n, ulimit -u), and start again"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self.works = self._out.read(len(decoding.READY)) == decoding.READY

    def ask(self, files: Sequence[bytes], pixels: Sequence[NDArray[np.uint8]]) -> list[Found]:
        """Raises _GoneError."""
        try:
            self._in.write(len(files).to_bytes(8, "little"))
            for file, shown in zip(files, pixels, strict=True):
                digest = xxhash.xxh3_128_digest(np.ascontiguousarray(shown).data)
                self._in.write(decoding.QUESTION.pack(len(file), *shown.shape[:2], digest) + file)
            self._in.flush()
            return [self._answer(shown) for shown in pixels]
        except (OSError, ValueError) as error:  # a closed pipe
            raise _GoneError from error

    def _answer(self, shown: NDArray[np.uint8]) -> Found:
        height, width = decoding.ANSWER.unpack(_whole(self._out, decoding.ANSWER.size).data)
        if height == decoding.SAME:
            return shown
        if height == decoding.TEXT:
            return _whole(self._out, width).tobytes().decode()
        return _whole(self._out, height * width * 3).reshape(height, width, 3)

    def end(self) -> None:
        """It holds nothing that would be lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):
                pipe.close()


class Children:
    """As many children as threads that ask at the same time."""

    def __init__(self) -> None:
        self._lock, self._idle, self._all, self._closed = threading.Lock(), list[Child](), set[Child](), False

    def ask(self, files: Sequence[bytes], pixels: Sequence[NDArray[np.uint8]]) -> list[Found]:
        """See `Ask`. Raises ResourceError when no child can be started."""
        if not files or self._closed:
            return ["nobody was asked"] * len(files)
        child = self._take()
        if not child.works:
            self._idle.append(child)
            return ["DALI does not import here"] * len(files)
        try:
            found = child.ask(files, pixels)
        except _GoneError:
            self._all.discard(child)
            child.end()
        else:
            self._idle.append(child)
            return found
        if len(files) == 1:
            return ["DALI's process ended over it"]
        return [self.ask([file], [shown])[0] for file, shown in zip(files, pixels, strict=True)]

    def _take(self) -> Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        child = Child()
        self._all.add(child)
        if self._closed:
            child.end()
        return child

    def close(self) -> None:
        """End all; who is asking at the moment gets no answer."""
        self._closed = True
        for child in list(self._all):
            child.end()


def _whole(source: IO[bytes], size: int) -> NDArray[np.uint8]:
    data = np.empty(size, np.uint8)
    view, at = data.data, 0
    while at < size:
        got = source.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise _GoneError
        at += got
    return data
