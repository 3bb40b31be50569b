"""When is a checkpoint due, and what became of the last? Rank 0 writes; the others learn of it with the next window."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.checkpoint import Best
from thawline.trainer.checkpoints.format import NOBODY, Whose, name_of
from thawline.trainer.checkpoints.saver import Saver, Written
from thawline.trainer.context import RunContext
from thawline.trainer.step import world

_MARGIN_S = 2.0
_AGAIN_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Waits between the tries at a run's last checkpoint: whoever is told of a full disk needs a minute to make room."""


class Keeper:
    """A run's checkpoints, seen from one rank. every_s: inf keeps none; 0 keeps one a window, and waits for it."""

    def __init__(
        self, context: RunContext, *, every_s: float, keep: int, best: Best | None, whose: Whose = NOBODY
    ) -> None:
        self.root = Root.of(context.run_dir).child("checkpoints")
        self.best, self.whose = best, whose
        self.wanted = math.isfinite(every_s)
        self._every_s, self._keep = every_s, keep
        self._last = time.monotonic()
        self._saver = Saver(self.root, keep=keep, best=best, whose=whose) if self.wanted and context.rank == 0 else None
        self._taken_at: float | None = None
        self._warned = self._waiting = self._last_chance = False
        self._needs_s = 0.0  # what the slowest write took

    def place(self, step: int) -> str | None:
        """Where the checkpoint of a step lies, from the run's folder; None where none are kept."""
        return f"checkpoints/{name_of(step)}" if self.wanted else None

    def due(self) -> bool:
        """Whether this rank, if it is the one that writes, has time for another, or little time left."""
        if self._saver is None:
            return False
        if self._warned or self._last_chance:
            return True
        return time.monotonic() - self._last >= self._every_s and not self._saver.busy

    def warn(self, taken_at: float | None, *, window_s: float) -> None:
        """A machine will be taken away then (unix seconds): one checkpoint is due at once, another just in time.

        window_s: how long a window takes now; after the last one that can still be kept, it is kept.
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
        """Copy now, write meanwhile. Waits for a write that goes on."""
        self._last = time.monotonic()
        self._warned = self._last_chance = False
        if self._saver is None:
            return
        self._saver.save(step, parts, metrics=metrics)
        if self._every_s == 0:
            self._saver.wait()

    def tidy(self, step: int) -> None:
        """The run goes on from there: remove what a kill left while older ones were written or removed."""
        if self._saver is not None:
            checkpoint.prune(self.root, step, keep=self._keep, best=self.best, whose=self.whose)

    def finished(self, *, all_of_them: bool = False) -> list[Written]:
        """What was written, or could not be, since this was last asked; on rank 0."""
        if self._saver is None:
            return []
        if all_of_them:
            self._saver.wait()
        written = self._saver.finished()
        self._needs_s = max([self._needs_s, *(each.seconds for each in written)])
        return written

    def all_written(self) -> list[Written]:
        """`finished`, on every rank, once no write goes on. Collective."""
        written = [asdict(each) for each in self.finished(all_of_them=True)]
        return [Written(**each) for each in world.gather(written)[0]]

    def last(self, step: int, tell: Callable[[Sequence[Written]], None]) -> str | None:
        """Why the checkpoint of `step`, with which a run ends, is not there; None where it is. Collective.

        One that the storage refuses is tried again for about a minute: without it the run's weights are nowhere.
        tell: takes what was written, and the first refusal.
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
