"""What does DALI show of a file? Asked in a process of its own, which may die of the file, or talk about it, unheard.

DALI's libraries write to stderr about files that they decode all the same, once for every decoding, and a file that
none of them knows may end the process. So `thawline index` asks in children: what made one talk or die is left to
Pillow, and training, which decodes the same bytes, is silent and lives. A child costs about a second to start (torch
is not imported), and nothing after that but its pipes: .3 ms for an image of 500 x 375.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dataio.errors import ResourceError

Found = NDArray[np.uint8] | str
"""The pixels that DALI shows, (H, W, 3) uint8, or why this file is not for DALI."""
Ask = Callable[[Sequence[bytes]], list[Found]]

_READY = b"ready\n"
_SHAPE = struct.Struct("<qq")  # of an answer: height and width of the pixels behind it; or -1 and the bytes of a text


def installed() -> bool:
    """Whether there is a DALI to ask."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


@contextlib.contextmanager
def dali() -> Iterator[Ask | None]:
    """Whom to ask about encoded files, a few at once, from any thread; None where DALI is not installed.

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


class _Child:
    """One process: files go in, answers come out."""

    def __init__(self) -> None:
        here = Path(__file__).parents[__name__.count(".")]  # where this package is, installed or not
        path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        except OSError as error:
            raise ResourceError(
                f"no process to ask DALI in could be started ({error.strerror}): no image could be checked; raise the "
                "limits of open files and processes (ulimit -n, ulimit -u), and start again"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.works = self._out.read(len(_READY)) == _READY

    def ask(self, encoded: Sequence[bytes]) -> list[Found]:
        """Raises _GoneError."""
        try:
            self._in.write(struct.pack(f"<q{len(encoded)}q", len(encoded), *map(len, encoded)))
            for file in encoded:
                self._in.write(file)
            self._in.flush()
            return [self._answer() for _ in encoded]
        except (OSError, ValueError) as error:  # a closed pipe
            raise _GoneError from error

    def _answer(self) -> Found:
        height, width = _SHAPE.unpack(_whole(self._out, _SHAPE.size))
        if height < 0:
            return bytes(_whole(self._out, width)).decode()
        return np.frombuffer(_whole(self._out, height * width * 3), np.uint8).reshape(height, width, 3)

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
        self._lock, self._idle, self._all, self._closed = threading.Lock(), list[_Child](), set[_Child](), False

    def ask(self, encoded: Sequence[bytes]) -> list[Found]:
        if not encoded or self._closed:
            return ["nobody was asked"] * len(encoded)
        child = self._take()
        if not child.works:
            self._idle.append(child)
            return ["DALI does not import here"] * len(encoded)
        try:
            found = child.ask(encoded)
        except _GoneError:
            self._all.discard(child)
            child.end()
        else:
            self._idle.append(child)
            return found
        if len(encoded) == 1:
            return ["DALI's process ended over it"]
        return [answer for file in encoded for answer in self.ask([file])]

    def _take(self) -> _Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        child = _Child()
        self._all.add(child)
        if self._closed:
            child.end()
        return child

    def close(self) -> None:
        """End all; who is asking at the moment gets no answer."""
        self._closed = True
        for child in list(self._all):
            child.end()


def _whole(source: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = source.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise _GoneError
        at += got
    return data


# In the child -----------------------------------------------------------------------------------------------


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its children
    with open(os.dup(1), "wb") as answers, tempfile.TemporaryFile() as said:  # noqa: PTH123
        for number in (1, 2):  # it is alone in this process: nobody else's words are lost
            os.dup2(said.fileno(), number)
        from dataio.decoding import decoded

        answers.write(_READY)
        answers.flush()
        with open(0, "rb") as asked:
            while head := asked.read(8):
                lengths = np.frombuffer(asked.read(8 * int.from_bytes(head, "little")), "<i8").tolist()
                files = [np.frombuffer(asked.read(length), np.uint8) for length in lengths]
                for found in _silent(files, decoded, said.fileno()):
                    if isinstance(found, str):
                        text = found.encode()
                        answers.write(_SHAPE.pack(-1, len(text)) + text)
                    else:
                        answers.write(_SHAPE.pack(*found.shape[:2]))
                        answers.write(np.ascontiguousarray(found).data)
                answers.flush()


def _silent(
    files: Sequence[NDArray[np.uint8]], decoded: Callable[[Sequence[NDArray[np.uint8]]], list[Found]], said: int
) -> list[Found]:
    """What is decoded without a word; asked again in halves where somebody talked."""
    before = os.fstat(said).st_size
    found = decoded(files)
    if os.fstat(said).st_size == before:
        return found
    if len(files) == 1:
        return ["DALI talks about it on stderr"]
    half = len(files) // 2
    return [*_silent(files[:half], decoded, said), *_silent(files[half:], decoded, said)]


if __name__ == "__main__":
    _serve()
