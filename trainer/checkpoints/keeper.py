"""When is a checkpoint due, and what became of the last one? Rank 0 writes; a later window tells the other ranks."""

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
"""Waits between the tries at a run's last checkpoint: whoever is told of a full disk needs a minute to make room."""


class Keeper:
    """A run's checkpoints, seen from one rank. every_s: inf keeps none; 0 keeps one a window, and waits for it."""

    def __init__(
        self, context: RunContext, *, every_s: float, keep: int, best: Best | None, origin: Origin = NO_ORIGIN
    ) -> None:
        self.root = Root.of(context.run_dir).child("checkpoints")
        self.best, self.origin = best, origin
        self.wanted = math.isfinite(every_s)
        self._every_s, self._keep = every_s, keep
        self._last = time.monotonic()
        self._saver = (
            Saver(self.root, keep=keep, best=best, origin=origin) if self.wanted and context.rank == 0 else None
        )
        self._taken_at: float | None = None
        self._warned = self._waiting = self._last_chance = False
        self._needs_s = 0.0  # what the slowest write took

    def place(self, step: int) -> str | None:
        """Where the checkpoint of a step lies, from the run's folder; None where none are kept."""
        return f"checkpoints/{name_of(step)}" if self.wanted else None

    def due(self) -> bool:
        """Whether this rank should save now, if it is the one that writes. Changes nothing."""
        if self._saver is None:
            return False
        if self._warned or self._last_chance:
            return True
        return time.monotonic() - self._last >= self._every_s and not self._saver.busy

    def warn(self, taken_at: float | None, *, window_s: float) -> None:
        """A machine will be taken away at that time (unix seconds): one checkpoint is due at once, another just before.

        window_s: how long a window takes now.
        """
        if taken_at is None:
            return
        if taken_at != self._taken_at:
            self._taken_at, self._warned = taken_at, True
            self._waiting = True
        left_s = taken_at - time.time()
        if self._waiting and left_s < 2 * window_s + 1.5 * self._needs_s + _MARGIN_S:
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
        """Remove what a kill left behind of older checkpoints; the run goes on from `step`."""
        if self._saver is not None:
            checkpoint.prune(self.root, step, keep=self._keep, best=self.best, origin=self.origin)

    def finished(self, *, all_of_them: bool = False) -> list[Written]:
        """What was written, or could not be, since the last call; on rank 0."""
        if self._saver is None:
            return []
        if all_of_them:
            self._saver.wait()
        written = self._saver.finished()
        self._needs_s = max([self._needs_s, *(each.seconds for each in written)])
        return written

    def all_written(self) -> list[Written]:
        """`finished`, on every rank, once no write is under way. Collective."""
        written = [asdict(each) for each in self.finished(all_of_them=True)]
        return [Written(**each) for each in world.gather(written)[0]]

    def last(self, step: int, tell: Callable[[Sequence[Written]], None]) -> str | None:
        """Wait for the checkpoint of `step`, the run's last; why it could not be written, or None. Collective.

        A write that the storage refuses is tried again for about a minute: without it the run's weights are lost.
        tell: is given what was written, and the first refusal.
        """
        written = self.all_written()
        tell(written)
        for wait_s in (*_AGAIN_S, None):
            refused = [each.error for each in written if each.step == step and each.error is not None]
            if not refused:
                return None
            if wait_s is None:
                break
            time.sleep(wait_s)  # on every rank, so that none waits for rank 0 any longer than for a write
            if self._saver is not None:
                self._saver.again()
            written = self.all_written()
            tell([each for each in written if each.error is None])
        return (
            f"{refused[-1]}. It is the run's last and was tried {len(_AGAIN_S) + 1} times in {sum(_AGAIN_S):.0f} s: "
            "without it there is no result; the same command goes on from the one before it"
        )

    def close(self) -> None:
        """Wait for the last write, and end its thread."""
        if self._saver is not None:
            self._saver.close()
            self._saver = None
            self.wanted = False
