"""When is a checkpoint due, and was the last one written? Rank 0 writes; the other ranks learn it in a later window."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.checkpoint import Best
from thawline.trainer.checkpoints.format import NO_ORIGIN, Origin, name_of
from thawline.trainer.checkpoints.saver import Saver, Written
from thawline.trainer.context import RunContext
from thawline.trainer.step import world

_MARGIN_S = 2.0
_AGAIN_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Waits between the attempts at a run's last checkpoint: a person needs a minute to make room on a full disk."""


class Keeper:
    """A run's checkpoints, on one rank. every_s: inf keeps none; 0 keeps one a window, and waits for it."""

    def __init__(
        self, context: RunContext, *, every_s: float, keep: int, best: Best | None, origin: Origin = NO_ORIGIN
    ) -> None:
        self.root = Root.of(context.run_dir).child("checkpoints")
        self.best, self.origin = best, origin
        self.enabled = math.isfinite(every_s)
        self._every_s, self._keep = every_s, keep
        self._last = time.monotonic()
        self._saver = (
            Saver(self.root, keep=keep, best=best, origin=origin) if self.enabled and context.rank == 0 else None
        )
        self._taken_at: float | None = None
        self._warned = self._waiting = self._last_chance = False
        self._slowest_s = 0.0  # duration of the slowest write

    def place(self, step: int) -> str | None:
        """The path of a step's checkpoint below the run's folder; None where none are kept."""
        return f"checkpoints/{name_of(step)}" if self.enabled else None

    def due(self) -> bool:
        """Whether this rank should save now; False on ranks that do not write. Changes nothing."""
        if self._saver is None:
            return False
        if self._warned or self._last_chance:
            return True
        return time.monotonic() - self._last >= self._every_s and not self._saver.busy

    def warn(self, taken_at: float | None, *, window_s: float) -> None:
        """A machine will be taken away at that time (unix seconds): one checkpoint is due at once, another just before.

        window_s: the present duration of a window.
        """
        if taken_at is None:
            return
        if taken_at != self._taken_at:
            self._taken_at, self._warned = taken_at, True
            self._waiting = True
        left_s = taken_at - time.time()
        if self._waiting and left_s < 2 * window_s + 1.5 * self._slowest_s + _MARGIN_S:
            self._waiting, self._last_chance = False, True

    def save(self, step: int, parts: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, float]) -> None:
        """Copy now, write in the background. Waits for a write under way."""
        self._last = time.monotonic()
        self._warned = self._last_chance = False
        if self._saver is None:
            return
        self._saver.save(step, parts, metrics=metrics)
        if self._every_s == 0:
            self._saver.wait()

    def tidy(self, step: int) -> None:
        """Remove what a kill left of older checkpoints; the run goes on from `step`."""
        if self._saver is not None:
            checkpoint.prune(self.root, step, keep=self._keep, best=self.best, origin=self.origin)

    def finished(self, *, all_of_them: bool = False) -> list[Written]:
        """The writes that have ended, well or not, since the last call; on rank 0."""
        if self._saver is None:
            return []
        if all_of_them:
            self._saver.wait()
        written = self._saver.finished()
        self._slowest_s = max([self._slowest_s, *(write.seconds for write in written)])
        return written

    def all_written(self) -> list[Written]:
        """`finished`, on every rank, once no write is under way. Collective."""
        written = [asdict(write) for write in self.finished(all_of_them=True)]
        return [Written(**write) for write in world.gather(written)[0]]

    def last(self, step: int, tell: Callable[[Sequence[Written]], None]) -> str | None:
        """Wait for the checkpoint of `step`, the run's last; return why it could not be written, or None. Collective.

        A write that the storage refuses is tried again for about a minute: without it the run's weights are lost.
        tell: called with the writes that ended, and with the first refusal.
        """
        written = self.all_written()
        tell(written)
        for wait_s in (*_AGAIN_S, None):
            refused = [write.error for write in written if write.step == step and write.error is not None]
            if not refused:
                return None
            if wait_s is None:
                break
            time.sleep(wait_s)  # on every rank, so that none waits for rank 0 any longer than for a write
            if self._saver is not None:
                self._saver.again()
            written = self.all_written()
            tell([write for write in written if write.error is None])
        return (
            f"{refused[-1]}. It is the run's last and was tried {len(_AGAIN_S) + 1} times in {sum(_AGAIN_S):.0f} s: "
            "without it there is no result; the same command goes on from the one before it"
        )

    def close(self) -> None:
        """Wait for the last write, and end its thread."""
        if self._saver is not None:
            self._saver.close()
            self._saver = None
            self.enabled = False
