"""What does DALI decode a file to? Tried in child processes, which a bad file may crash without harm.

DALI's libraries write warnings to stderr about files that they decode all the same, at every decoding, and a file that
none of them knows may crash the process. So `thawline index` decodes in child processes, which run decoding.py: a file
that causes a warning or a crash is left to Pillow, and training, which decodes the same bytes, sees neither. A child
takes half a CPU-second to start (no torch, no pyarrow), and sends pixels back only where they differ.
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

Decoded = NDArray[np.uint8] | str
"""The pixels that DALI decodes a file to, (H, W, 3) uint8, or why DALI should not decode it."""
Decoder = Callable[[Sequence[bytes], Sequence[NDArray[np.uint8]]], list[Decoded]]
"""(at most decoding.AT_ONCE encoded files, Pillow's pixels of each) -> DALI's, as the very same arrays where equal."""


def installed() -> bool:
    """Whether DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


@contextlib.contextmanager
def dali_decoder() -> Iterator[Decoder | None]:
    """DALI's decoder, to be called from any thread; None where DALI is not installed.

    Threads that call it at the same time use a child process each. Children start when they are first needed, and end
    with this context. A call raises ResourceError when no child can be started.
    """
    children = Children()
    try:
        yield children.decode if installed() else None
    finally:
        children.close()


class _ChildEndedError(Exception):
    """The child process has ended."""


class Child:
    """One child process: encoded files go in, responses come out."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", decoding.__file__],  # -P: the modules beside it may not shadow others
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ResourceError(
                f"no child process for DALI could be started ({error.strerror}): no image could be checked; raise the "
                "limits of open files and processes (ulimit -n, ulimit -u), and start again"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self.ready = self._out.read(len(decoding.READY)) == decoding.READY

    def decode(self, files: Sequence[bytes], pixels: Sequence[NDArray[np.uint8]]) -> list[Decoded]:
        """See `Decoder`. Raises _ChildEndedError."""
        try:
            self._in.write(len(files).to_bytes(8, "little"))
            for file, expected in zip(files, pixels, strict=True):
                digest = xxhash.xxh3_128_digest(np.ascontiguousarray(expected).data)
                self._in.write(decoding.REQUEST.pack(len(file), *expected.shape[:2], digest) + file)
            self._in.flush()
            return [self._response(expected) for expected in pixels]
        except (OSError, ValueError) as error:  # a closed pipe
            raise _ChildEndedError from error

    def _response(self, expected: NDArray[np.uint8]) -> Decoded:
        height, width = decoding.RESPONSE.unpack(_read_exactly(self._out, decoding.RESPONSE.size).data)
        if height == decoding.SAME:
            return expected
        if height == decoding.TEXT:
            return _read_exactly(self._out, width).tobytes().decode()
        return _read_exactly(self._out, height * width * 3).reshape(height, width, 3)

    def end(self) -> None:
        """Kill the process, which holds nothing that could be lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):
                pipe.close()


class Children:
    """A pool of child processes, one for each thread that decodes at the same time."""

    def __init__(self) -> None:
        self._lock, self._idle, self._all, self._closed = threading.Lock(), list[Child](), set[Child](), False

    def decode(self, files: Sequence[bytes], pixels: Sequence[NDArray[np.uint8]]) -> list[Decoded]:
        """See `Decoder`. Raises ResourceError when no child can be started."""
        if not files or self._closed:
            return ["DALI was closed"] * len(files)
        child = self._acquire()
        if not child.ready:
            self._idle.append(child)
            return ["DALI cannot be imported here"] * len(files)
        try:
            decoded = child.decode(files, pixels)
        except _ChildEndedError:
            self._all.discard(child)
            child.end()
        else:
            self._idle.append(child)
            return decoded
        if len(files) == 1:
            return ["DALI crashed while decoding it"]
        return [self.decode([file], [expected])[0] for file, expected in zip(files, pixels, strict=True)]

    def _acquire(self) -> Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        child = Child()
        self._all.add(child)
        if self._closed:
            child.end()
        return child

    def close(self) -> None:
        """End all children; calls under way return no pixels."""
        self._closed = True
        for child in list(self._all):
            child.end()


def _read_exactly(source: IO[bytes], size: int) -> NDArray[np.uint8]:
    """Raises _ChildEndedError at the end of the stream."""
    data = np.empty(size, np.uint8)
    view, at = data.data, 0
    while at < size:
        got = source.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise _ChildEndedError
        at += got
    return data
