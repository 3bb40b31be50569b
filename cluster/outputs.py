"""What if a line cannot be printed? It is dropped and counted: no output can end a run.

A closed terminal, a log on a full disk, a pipe whose reader left, an output that was closed before the start, an
encoding without the character: none of them may end training. `safe_streams` is for processes that we start,
`SafeStream` for a stream in somebody else's.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class SafeStream:
    """A text stream that cannot fail: `lost` counts the lines that it could not print."""

    def __init__(self, stream: TextIO | None) -> None:
        """stream: None, which Python has for an output that was closed before the start, drops everything."""
        self._stream = stream or open(os.devnull, "w")  # noqa: PTH123, SIM115  # as long as the process
        self.lost = 0
        self.why: OSError | ValueError | None = None
        """What the last of them failed with."""

    def write(self, text: str) -> int:
        """As a file's."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: closed, or a character that its encoding lacks
            self.lost += text.count("\n")
            self.why = error
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.why = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Iterator[SafeStream]:
    """Within, stdout and stderr exist and print what they can; yields stdout. For the main of a process."""
    _open_closed()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names come in every script, and with bytes of none
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        out.flush()
        if err.lost:
            err.write(f"{err.lost} lines could not be printed here when they were due ({reason(err.why)})\n")
        err.flush()
        sys.stdout, sys.stderr = before
        for safe, stream in zip((out, err), before, strict=True):
            if safe.why is not None:
                _drop(stream)


def reason(error: OSError | ValueError | None) -> str:
    """Why something could not be printed, in the system's words."""
    return getattr(error, "strerror", None) or str(error)


def reader_left(stream: SafeStream) -> bool:
    """Whether nobody waits for what was lost: `thawline list | head -1`."""
    return getattr(stream.why, "errno", None) == errno.EPIPE


def _open_closed() -> None:
    """Open /dev/null where an output or the input was closed before the start: else a file would get its number.

    What we print would then go into that file.
    """
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # it takes the lowest free number, which is this
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Python saw it closed; print(file=None) would go to stdout
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  # as long as the process


def _drop(stream: TextIO) -> None:
    """Leave Python nothing to print when it ends: it would exit 120 for it."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
