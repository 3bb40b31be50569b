"""How long did this rank work before it waited for the others? That tells a straggler from those that wait for it.

A step takes equally long on all ranks, since they wait for one another in its reduction. So the clock runs from the
beginning of the step, its wait for data included, until the last gradients are handed over.
"""

import time

import torch


class Busy:
    """Seconds of work since the last `read`. On a GPU its own clock is read, and nothing waits before `read`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began: float | torch.cuda.Event = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def start(self) -> None:
        """A step begins."""
        self._began = self._event() if self._on_gpu else time.perf_counter()

    def stop(self) -> None:
        """Its work is done."""
        if isinstance(self._began, float):
            self._seconds += time.perf_counter() - self._began
        else:
            self._spans.append((self._began, self._event()))

    def read(self) -> float:
        """Seconds since the last read. The device must have finished the steps."""
        for began, ended in self._spans:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        seconds, self._seconds = self._seconds, 0.0
        self._spans.clear()
        return seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
