"""What does Ctrl-C mean? Stop at the end of this window, with a checkpoint; a second one means at once.

SIGTERM means the same as the first Ctrl-C, and so does SIGHUP, which a terminal sends when it is closed: unless it was
ignored on entry, since the run is then meant to outlive the terminal (nohup, disown).
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

_UNWIND_S = 10.0
_WORDS = b"\nstopping at the end of this window, with a checkpoint; Ctrl-C again to end at once\n"
_stop_signal = 0


@contextlib.contextmanager
def stop_on_signal(request: Callable[[], None]) -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request to stop; the next SIGINT does what it did before."""
    global _stop_signal

    def handler(number: int, frame: FrameType | None) -> None:
        global _stop_signal
        _stop_signal = _stop_signal or number
        signal.signal(signal.SIGINT, again)  # first: the request may take long
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, _WORDS)
        request()

    _stop_signal = 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    was = before[signal.SIGINT]
    again = was if callable(was) else signal.default_int_handler
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def exit_status() -> int:
    """The exit status of a process whose run has stopped at a checkpoint: 130 after Ctrl-C, else 143.

    143 is SIGTERM's; SIGHUP, `thawline stop` and the requests of other ranks count as that.
    """
    return 128 + (signal.SIGINT if _stop_signal == signal.SIGINT else signal.SIGTERM)


@contextlib.contextmanager
def ending_when_interrupted() -> Iterator[None]:
    """Within, for the main of a process: a KeyboardInterrupt means its end, whatever hangs in a thread.

    A file that never responds would block the unwinding for ever: it has `_UNWIND_S`, and the next SIGINT does not wait
    for it.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        end_soon(128 + signal.SIGINT)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else a handler was set, or SIGINT is ignored
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_soon(status: int) -> None:
    """Have this process end within `_UNWIND_S` with that exit status, whatever hangs in a thread."""

    def end() -> None:
        time.sleep(_UNWIND_S)
        os._exit(status)

    threading.Thread(target=end, name="thawline-end", daemon=True).start()


@contextlib.contextmanager
def ignoring_hangup() -> Iterator[None]:
    """Processes that are started within, of Ray, ignore SIGHUP: a run that saves because of it still needs them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
