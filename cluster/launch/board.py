"""How do a driver and its workers talk? `Board`: rows one way; a request to stop, or a warning, the other.

A plain class, so that it tests without Ray. On a cluster Ray makes an actor of it, which clients find by its name. A
run of one machine serves it from its driver: an actor that waits for calls would take more of the cores than all that
is said. Its file imports nothing heavy: the actor's process starts in the time that Python needs.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, cast

from thawline.cluster.launch.messages import Asked, Outcome
from thawline.trainer.step.sentences import Sentence

Row = Mapping[str, Any]
"""One of trainer.rows."""

NAMESPACE = "thawline"
"""Of Ray, in which a running job's board is called as `board_name` says: so a client can ask for a stop."""

_AFTERMATH_S = 60.0  # workers on a machine that was taken away are noticed to be gone this late
_SPEAK_S = 5.0


def board_name(job: str) -> str:
    """What the board of the job called so is called."""
    return f"board of {job}"


class Board:
    """What rank 0 and the driver leave for one another."""

    def __init__(self, *, failures: int = 0, preemptions: int = 0) -> None:
        """failures, preemptions: how many to survive; -1 = any number."""
        self._left = {"failures": failures, "preemptions": preemptions}
        self._rows: list[Row] = []
        self._stop = self._leave = self._made_way = False
        self._taken_at: float | None = None
        self._groups = 0
        self._outcome = Outcome()

    def publish(self, rows: Sequence[Row]) -> None:
        """Rank 0 leaves rows."""
        self._rows += rows

    def take(self) -> list[Row]:
        """The driver takes what has come."""
        rows, self._rows = self._rows, []
        return rows

    def request_stop(self) -> None:
        """The driver, or a client through messenger, asks for a graceful end."""
        self._stop = True

    def make_way(self) -> None:
        """The driver could start a larger group of workers: this one shall save and end, and the run go on."""
        self._leave = True

    def warn(self, taken_at: float) -> None:
        """The driver has heard that a machine will be taken away then (unix seconds)."""
        self._taken_at = taken_at

    def asked(self) -> Asked:
        """What the workers are asked to do."""
        return Asked(self._stop or self._leave, self._taken_at)

    def begin(self, workers: int) -> int:
        """Rank 0 of a group of so many workers is there; how many groups there were before."""
        self._rows.append({"kind": "group", "workers": workers, "restarts": self._groups, "unix_s": time.time()})
        self._groups += 1
        self._taken_at, self._leave = None, False  # what was said to the group before
        return self._groups - 1

    def finish(self, result: dict[str, Any]) -> bool:
        """Rank 0 hands over the result; False: the group only made way for a larger one, and the run goes on."""
        self._made_way = result["status"] == "stopped" and not self._stop
        if not self._made_way:
            self._outcome = Outcome(result=result)
        return not self._made_way

    def again(self, why: str = "its workers have ended", *, placed: bool = True) -> bool:
        """A group has ended without a result, or found no place: shall there be another? Counts it, and says so."""
        if self._outcome.over:
            return False
        if self._made_way or not placed:
            self._made_way = False
            return True
        warned = self._taken_at is not None and time.time() < self._taken_at + _AFTERMATH_S
        kind = "preemptions" if warned else "failures"
        left = self._left[kind]
        self._left[kind] = left - 1 if left > 0 else left
        if left != 0:
            more = "" if left < 0 else f", and {left - 1} more {kind} are survived"
            self._rows.append({"kind": "note", "text": f"{why}: going on from the last checkpoint{more}"})
        return left != 0

    def fail(self, error: Sentence) -> None:
        """A worker met what only a user can mend: trying again would end the same way. The first is kept."""
        if self._outcome.error is None:
            self._outcome = Outcome(error=error)

    def outcome(self) -> Outcome:
        """What the run came to."""
        return self._outcome


class _Away:
    """What is somewhere else: a method called here is called there."""

    def __init__(self, call: Callable[..., Any]) -> None:
        """call: picklable; takes a method's name and its arguments."""
        self._call = call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self._call, name)


def board_of(actor: Any) -> Board:
    """The board that this actor of Ray's is. Can be pickled; each call waits for its answer."""
    return cast(Board, _Away(functools.partial(_call_actor, actor)))


def board_at(path: Path) -> Board:
    """The board that `served` serves there, on this machine. Can be pickled; each call waits for its answer."""
    return cast(Board, _Away(functools.partial(_call_at, path)))


def _call_actor(actor: Any, name: str, *args: Any, **named: Any) -> Any:
    import ray

    return ray.get(getattr(actor, name).remote(*args, **named))


def _call_at(path: Path, name: str, *args: Any, **named: Any) -> Any:
    with Client(str(path)) as link:  # one a call: signal handlers and threads may be within others
        link.send((name, args, named))
        return link.recv()


@contextlib.contextmanager
def served(board: Board, path: Path) -> Iterator[None]:
    """Answer at the socket `path`, one call after the other, until the block ends. In a folder of this user's alone."""
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            # Who breaks off, or sends what cannot be read here, gets no answer; the next one does.
            with contextlib.suppress(Exception), listener.accept() as link:
                if link.poll(_SPEAK_S):
                    name, args, named = link.recv()
                    link.send(getattr(board, name)(*args, **named))

    with Listener(str(path), family="AF_UNIX", backlog=64) as listener:
        thread = threading.Thread(target=serve, name="thawline-board", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            with contextlib.suppress(OSError), Client(str(path)):
                pass  # wakes it
            thread.join(timeout=2 * _SPEAK_S)
