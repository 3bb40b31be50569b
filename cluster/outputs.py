"""What if nobody can hear? What cannot be printed is left unsaid and counted: no line decides over a run.

A terminal that was closed, a log on a full disk, a pipe whose reader left, an output that was closed before the start,
an encoding without the character: none of them may end training. `forgiving` is for the processes that we start; `Talk`
for a stream in somebody else's.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Talk:
    """A text stream that cannot fail: lines that it could not print when they were due are counted in `unsaid`."""

    def __init__(self, stream: TextIO | None) -> None:
        """stream: None, as Python has it for an output that was closed before the start, takes all and says nothing."""
        self._stream = stream or open(os.devnull, "w")  # noqa: PTH123, SIM115  # as long as the process
        self.unsaid = 0
        self.why: OSError | ValueError | None = None
        """What met the last of them."""

    def write(self, text: str) -> int:
        """As a file's."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: closed, or a character that its encoding lacks
            self.unsaid += text.count("\n")
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
def forgiving() -> Iterator[Talk]:
    """Within, stdout and stderr are there and print what they can; gives stdout. For the main of a process."""
    _open_closed()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names come in every script, and with bytes of none
    out, err = Talk(sys.stdout), Talk(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        out.flush()
        if err.unsaid:
            err.write(f"{err.unsaid} lines could not be printed here when they were due ({reason(err.why)})\n")
        err.flush()
        sys.stdout, sys.stderr = before
        for talk, stream in zip((out, err), before, strict=True):
            if talk.why is not None:
                _drop(stream)


def reason(error: OSError | ValueError | None) -> str:
    """Why something could not be printed, in the system's words."""
    return getattr(error, "strerror", None) or str(error)


def reader_left(talk: Talk) -> bool:
    """Whether what is missing was not wanted: `thawline list | head -1`."""
    return getattr(talk.why, "errno", None) == errno.EPIPE


def _open_closed() -> None:
    """/dev/null where an output or the input was closed before the start: a file would get its number, and our talk."""
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # it takes the lowest free number, which is this
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Python saw it closed; print(file=None) would go to stdout
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  # as long as the process


def _drop(stream: TextIO) -> None:
    """Have Python find nothing to print at its end, where it would exit 120 for it."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
