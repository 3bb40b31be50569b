"""Which rank hangs, and where? Every rank records once a second what its training thread is doing.

A collective that one rank never joins ends on the others with an error of the transport, after a time-out: a generous
one for the first step, which compiles and searches for the fastest convolutions, and a short one afterwards. The error
names neither rank nor step. So each rank writes its step and its place in the code into the process group's store, from
a thread of its own, and a rank whose wait timed out reads there which rank was still at work.
"""

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

import thawline

_EVERY_S = 1.0
_STALE_S = 10.0
_ASK = timedelta(seconds=5)
_HOME = f"{Path(thawline.__file__).parent}/"
_MEETINGS = {
    *(("trainer/step/world.py", name) for name in ("_exchange", "worst", "average_buffers")),
    *(("trainer/step/reduction.py", name) for name in ("shadow", "end")),
}
_BACKWARD = ("/torch/autograd/graph.py", "_engine_run_backward")  # in which DDP's hooks wait
"""Functions in which a rank that has finished its work waits for the others."""
_WORDS = ("timed out", "timeout", "time out", "connection closed", "connection reset")


@dataclass(frozen=True)
class Sign:
    """A rank's last sign of life."""

    step: int
    place: str
    """Such as "dataio/stream/loader.py, in stream"."""
    waits: bool
    """Its thread is in a function where ranks wait for each other."""
    age_s: float


class Pulse:
    """Of one rank; a `trainer.context.Sink`, so that it is called for every step. Does nothing in a world of one."""

    def __init__(self, *, rank: int, world_size: int, hang_s: float) -> None:
        """Call it in the thread that trains."""
        self._rank, self._size, self._hang_s = rank, world_size, hang_s
        self._step = -1
        self._thread_id = threading.get_ident()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        if world_size > 1:
            self._store = _store()
            self._thread = threading.Thread(target=self._beat, name="thawline-pulse", daemon=True)
            self._thread.start()

    def begin(self, step: int) -> None:
        """The run begins at that step."""
        self._step = step

    def step(self, *, images: int, step_s: float, data_wait_s: float) -> None:
        """A step has ended: from the first on, ranks wait for one another for `hang_s` at most."""
        if self._thread is not None and self._hang_s:
            _wait_at_most(self._hang_s)
            self._hang_s = 0.0
        self._step += 1

    def busy(self, *, busy_s: float) -> None:
        """Not used here."""

    def observe(self, row: Mapping[str, object]) -> None:
        """Not used here."""

    def explain(self, error: Exception) -> str | None:
        """One sentence on the rank that the others waited for, if `error` is a time-out; else None.

        Not collective: each rank that is left reads the store, which lives in rank 0's process or its launcher's.
        """
        if self._thread is None or not any(word in str(error).lower() for word in _WORDS):
            return None
        # A rank that died closes its connections, and another that gave up first does so as well.
        return sentence(self._rank, self._step, [self._sign(rank) for rank in range(self._size)])

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * _EVERY_S)

    def _beat(self) -> None:
        while not self._end.wait(_EVERY_S):
            place, waits = _place(sys._current_frames().get(self._thread_id))
            sign = {"step": self._step, "place": place, "waits": waits, "unix_s": time.time()}
            try:
                self._store.set(f"thawline/pulse/{self._rank}", json.dumps(sign))
            except RuntimeError:  # the store ended with rank 0: the training thread gets an error of its own
                return

    def _sign(self, rank: int) -> Sign | None:
        if rank == self._rank:
            return Sign(self._step, "here", True, 0.0)
        try:
            sign: dict[str, Any] = json.loads(self._store.get(f"thawline/pulse/{rank}"))
        except RuntimeError:
            return None
        age_s = max(0.0, time.time() - sign.pop("unix_s"))
        return Sign(**sign, age_s=age_s)


def sentence(rank: int, step: int, signs: Sequence[Sign | None]) -> str:
    """The message of rank `rank`, waiting in `step`: whose sign of life is missing, old, or shows it still at work."""
    late = [f"rank {other} {_lateness(sign)}" for other, sign in enumerate(signs) if _late(sign)]
    causes = "; ".join(late) or "every rank waits for the others, so something between their machines is broken"
    return (
        f"rank {rank} waited in vain for the others in step {step}: {causes}; the run goes on from its last checkpoint "
        "when it is started again; if the wait was right, give a longer cluster.hang_s"
    )


def _late(sign: Sign | None) -> bool:
    return sign is None or sign.age_s > _STALE_S or not sign.waits


def _lateness(sign: Sign | None) -> str:
    if sign is None:
        return "has given no sign of life"
    if sign.age_s > _STALE_S:
        return f"has given no sign of life for {sign.age_s:.0f} s (its last: step {sign.step}, {sign.place})"
    return f"is still at work in step {sign.step} ({sign.place})"


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost place in our own code, and whether the thread waits for other ranks."""
    innermost, waits = "", False
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        file = path.removeprefix(_HOME)
        waits = waits or (file, name) in _MEETINGS or (path.endswith(_BACKWARD[0]) and name == _BACKWARD[1])
        if file != path and not innermost:
            innermost = f"{file}, in {name}"
        frame = frame.f_back
    return innermost or "outside of thawline's code", waits


def _store() -> Any:
    """A connection of its own to the process group's store: a thread must not hold up the training thread's."""
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(_ASK)
    return store


def _wait_at_most(seconds: float) -> None:
    limit = timedelta(seconds=seconds)
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(limit)
    else:  # before torch 2.13
        dist.distributed_c10d._set_pg_timeout(limit)
