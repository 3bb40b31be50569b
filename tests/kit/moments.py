"""How does a process die at a chosen moment? Sites in the trainer, marks that outlive it, SIGKILL by the kernel.

Functions are replaced only in a process that is going to die, or that others are compared with; never in a test's.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thawline.dataio.store import atomic
from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.session import Session
from thawline.trainer.step import step

KINDS: dict[str, tuple[str, ...]] = {
    "step": ("fetch", "backward", "update"),
    "evaluation": ("evaluation",),
    "checkpoint": ("part",),
    "before manifest": ("before manifest",),
    "pruning": ("pruning",),
    "any": ("run",),
}
"""Where to kill: kind -> sites, which are regions of code that are entered and left, some of them many times."""

SITES = [site for sites in KINDS.values() for site in sites]
PARTS = {"model.pt", "ema.pt", "state.pt"}


@dataclass(frozen=True)
class Kill:
    """Die `delay_s` after entering `site` for the `occurrence`th time in this process, or when leaving it."""

    kind: str
    site: str
    occurrence: int
    delay_s: float


class Marks:
    """What a process has done, in a file that it maps: the kernel keeps the last write even after a kill."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            np.zeros(1 + 3 * len(SITES), dtype=np.int64).tofile(file)
        self._values = np.memmap(file, dtype=np.int64, mode="r+")

    @property
    def resumed(self) -> int:
        """The step at which training began in this process; -1 if it did not begin."""
        return int(self._values[0]) - 1

    @resumed.setter
    def resumed(self, step: int) -> None:
        self._values[0] = step + 1

    def of(self, site: str) -> tuple[int, int, float]:
        """(times entered, times left, seconds within)."""
        entered, left, ns = self._of(site).tolist()
        return entered, left, ns / 1e9

    def enter(self, site: str) -> int:
        """Count an entry; return its number, from 1."""
        values = self._of(site)
        values[0] += 1
        return int(values[0])

    def leave(self, site: str, ns: int) -> None:
        values = self._of(site)
        values[1:] += (1, ns)

    def _of(self, site: str) -> Any:
        index = 1 + 3 * SITES.index(site)
        return self._values[index : index + 3]


@contextmanager
def moment(marks: Marks, kill: Kill | None, site: str) -> Iterator[None]:
    """Within is an occurrence of `site`, perhaps the fatal one."""
    fatal = marks.enter(site) == kill.occurrence if kill is not None and kill.site == site else False
    began = time.monotonic_ns()
    if fatal and kill is not None:
        die_in(kill.delay_s)
    yield
    if fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    marks.leave(site, time.monotonic_ns() - began)


class _SigEvent(ctypes.Structure):
    """Linux's sigevent, which is 64 bytes long; notify 0 is SIGEV_SIGNAL."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("_", ctypes.c_byte * 48),
    )


def die_in(delay_s: float) -> None:
    """Have the kernel send this process SIGKILL: a Python thread would wait for the interpreter's lock."""
    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    ns = max(1, int(delay_s * 1e9))
    spec = (ctypes.c_long * 4)(0, 0, ns // 10**9, ns % 10**9)  # itimerspec: no interval, then the first expiry
    event = _SigEvent(signal=signal.SIGKILL)
    if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) or libc.timer_settime(
        timer, 0, ctypes.byref(spec), None
    ):
        raise OSError(ctypes.get_errno(), "no timer")


def install(inside: Callable[[str], Any], marks: Marks) -> None:
    """Put the sites into this process's trainer. Raises AttributeError for a function that does not exist."""

    def wrap(owner: Any, name: str, site: str) -> None:
        real = getattr(owner, name)

        @wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            with inside(site):
                return real(*args, **kwargs)

        setattr(owner, name, call)

    wrap(Session, "next_batch", "fetch")
    wrap(torch.Tensor, "backward", "backward")
    wrap(step, "update", "update")
    wrap(Session, "measure", "evaluation")
    wrap(checkpoint, "_prune", "pruning")
    real_write, real_sync, real_resume = atomic.atomic_write, atomic._sync, Session.resume
    open_gaps = []

    @contextmanager
    def write(root: Root, name: str, **options: Any) -> Iterator[Any]:
        if name in PARTS:
            with inside("part"), real_write(root, name, **options) as sink:
                yield sink
            return
        open_gaps.append(gap := inside("before manifest"))  # from the last part's rename ...
        gap.__enter__()
        with real_write(root, name, **options) as sink:
            yield sink

    def sync(path: str) -> None:
        real_sync(path)
        if "/.manifest.json." in path:
            open_gaps.pop().__exit__(None, None, None)  # ... until just before the manifest's

    def resume(session: Session) -> bool:
        resumed = real_resume(session)
        marks.resumed = session.progress.step
        return resumed

    for owner, name, call in (
        (checkpoint, "atomic_write", write),
        (atomic, "_sync", sync),
        (Session, "resume", resume),
    ):
        assert hasattr(owner, name)
        setattr(owner, name, call)
