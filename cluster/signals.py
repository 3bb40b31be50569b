"""What does Ctrl-C mean? The end of this window, with a checkpoint; a second one means now."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_on_signal(request: Callable[[], None]) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request to stop; a second SIGINT interrupts at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        os.write(2, b"\nstopping at the end of this window, with a checkpoint; Ctrl-C again to end at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # first: what is asked may be long in answering
        request()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
