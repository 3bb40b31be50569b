"""How does one phase run? Steps, windows, epochs and checkpoints, from where the run stands to the phase's end.

What changes is the learner's (its progress, records and weights); a `Running` holds what only its phase needs.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from thawline.trainer import optim
from thawline.trainer.checkpoints.saver import Appended
from thawline.trainer.context import Row
from thawline.trainer.errors import DivergedError
from thawline.trainer.metrics.evaluation import Measured
from thawline.trainer.schedule.phases import Find, Phase, length
from thawline.trainer.step import world
from thawline.trainer.step.recovery import Stepper
from thawline.trainer.step.window import Window, extend_hash

if TYPE_CHECKING:
    from thawline.trainer.learner import Learner


class Running:
    """A phase of a fit, on this rank."""

    def __init__(self, learn: "Learner", phase: Phase, *, predict: bool = False) -> None:
        """Freeze, search for a learning rate if that is asked for, and take up what a checkpoint left. Collective.

        predict: keep the predictions of the validation with which the phase ends.
        """
        self.learn, self.phase, self._predict = learn, phase, predict
        self._measured: Measured | None = None
        learn.freeze_to(phase.freeze_to)
        train = learn.train
        self.steps = length(phase, epoch_steps=train.steps, global_batch=train.global_batch)
        self.epochs = phase.epochs or self.steps * train.global_batch / train.samples
        whole = range(1, math.floor(self.epochs + 1e-9) + 1)
        self.epoch_ends = {self.steps, *(min(self.steps, train.steps(epoch)) for epoch in whole)}
        lr = phase.lr.of(learn.found_lr(phase, phase.lr)) if isinstance(phase.lr, Find) else phase.lr
        self.stepper = Stepper(
            learn.model, learn.how, splits=learn.progress.splits, on_split=learn.split, ema=learn.ema
        )
        if learn.resumed is not None:
            optim.load_state(self.stepper.optimizer, learn.resumed["optimizer"])
            self.stepper.scaler.load_state_dict(learn.resumed["scaler"])
            learn.resumed = None
        self.schedule = phase.schedule(lr, groups=len(self.stepper.parameters), steps=self.steps)
        self.window = Window()

    def run(self) -> Measured | None:
        """To the phase's end, or until `stopped` is set because somebody asked for it; what the last validation gave.
        Collective.
        """
        try:
            self._run()
        finally:
            self.stepper.close()
        if not self.learn.stopped:
            self.learn.progress = self.learn.progress.after_phase(self.epochs)
        return self._measured

    def _run(self) -> None:
        learn, progress = self.learn, self.learn.progress
        if progress.validate_due:  # the run was stopped between an epoch and its validation
            self._end_epoch()
        learn.training_mode()
        while progress.phase_step < self.steps and not learn.stopped:
            self._take_step()
            at_epoch_end = progress.phase_step in self.epoch_ends
            if len(self.window) < learn.how.window and not at_epoch_end:
                continue
            learn.stopped = self._close_window()
            progress.validate_due = at_epoch_end
            if at_epoch_end and not learn.stopped:
                self._end_epoch()
                learn.training_mode()
            elif learn.stopped or learn.keeper.due():
                self._save()
            self.window.restart_clock()

    def _take_step(self) -> None:
        learn, progress = self.learn, self.learn.progress
        optim.set_hyper(self.stepper.optimizer, *self.schedule.at(progress.phase_step))
        taken = learn.take(self.stepper, learn.next_batch, progress.step)
        self.window.add(ids=taken.batch.ids, losses=taken.losses, data_wait_s=taken.waited_s)
        progress.step += 1
        progress.phase_step += 1
        for sink in learn.recorder.sinks:
            sink.step(images=len(taken.batch.ids), step_s=taken.step_s, data_wait_s=taken.waited_s)

    def _close_window(self) -> bool:
        """Read what the window's steps gave and record it; whether somebody asked to stop. Collective."""
        learn = self.learn
        reading = self.window.close(
            guard=self.stepper.guard,
            busy=self.stepper.busy,
            stop=learn.context.should_stop(),
            taken_at=learn.context.taken_at(),
            lost=learn.quarantine.news("train"),
            written=learn.keeper.finished(),
        )
        learn.set_apart("train", reading.lost)
        learn.tell_written(reading.written)
        learn.keeper.warn(reading.taken_at, window_s=reading.window_s)
        bad = reading.seen.bad
        for ids in reading.ids[:bad]:
            learn.progress.stream_hash = extend_hash(learn.progress.stream_hash, ids)
        if bad is not None:
            self._end_diverged(reading.steps - bad, reading.ids[bad])
        # Each rank's statistics follow its own part. Here always, so that they do not depend on when one saves.
        world.average_buffers(learn.model)
        for sink in learn.recorder.sinks:
            sink.busy(busy_s=reading.busy_s[learn.context.rank])
        lrs, momentum = self.schedule.at(learn.progress.phase_step - 1)
        self._record("train", lr=lrs[-1], momentum=momentum, **reading.numbers())
        return reading.stop

    def _end_diverged(self, back: int, ids: NDArray[np.int64]) -> NoReturn:
        """Return to before the step that was bad, `back` steps ago; keep that; raise. Collective."""
        learn, progress = self.learn, self.learn.progress
        progress.step, progress.phase_step = progress.step - back, progress.phase_step - back
        # No weight has moved since, where the optimiser passes over bad steps; an average of them, though, has.
        if optim.skips(self.stepper.optimizer) and learn.ema is None and self.stepper.guard.undo(back):
            world.average_buffers(learn.model)
            self._save()
        refused = learn.keeper.last(progress.step, learn.tell_written)
        lrs, _ = self.schedule.at(progress.phase_step)
        kept = f"what was before it is kept in {learn.keeper.root}" if learn.keeper.wanted else "nothing was kept"
        kept = kept if refused is None else f"what was before it could not be kept ({refused})"
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        raise DivergedError(
            f"the loss or its gradients are no finite numbers at step {progress.step} (learning rates "
            f"{', '.join(f'{lr:.2e}' for lr in lrs)}; ids {', '.join(map(str, ids[:8]))}{more}): going on would spoil "
            f"the weights, and {kept}; look at these images and labels, or start again with a lower lr, with fit.clip, "
            "or in fp32"
        )

    def _end_epoch(self) -> None:
        """Measure, record a "valid" row with the epoch's mean training loss beside it, and save where it is due.

        When somebody asks to stop meanwhile, `stopped` is set, and whoever resumes begins with the validation.
        """
        learn, began = self.learn, time.monotonic()
        at_end = learn.progress.phase_step == self.steps
        measured = learn.measure(learn.valid, keep=self._predict and at_end, interrupted=learn.context.should_stop)
        if measured is None:
            learn.stopped = True
            self._save()
            return
        self._measured = measured
        learn.progress.validate_due = False
        self._record(
            "valid",
            train_loss=learn.recorder.epoch_loss(),
            valid_s=time.monotonic() - began,
            valid_samples=learn.valid.samples - len(learn.valid.quarantined),
            **measured.metrics,
        )
        best = learn.keeper.best
        is_best = best is not None and learn.recorder.is_best(best.metric, higher=best.higher)
        if is_best or learn.keeper.due() or at_end:
            self._save(measured.metrics)

    def _record(self, kind: str, **values: float | int | str | None) -> None:
        progress = self.learn.progress
        row: Row = {
            "kind": kind,
            "phase": self.phase.name,
            "step": progress.step,
            "phase_step": progress.phase_step,
            "phase_steps": self.steps,
            "epoch": progress.epochs + self.epochs * progress.phase_step / self.steps,
            "time_s": self.learn.elapsed_s(),
            "unix_s": time.time(),
        }
        self.learn.show({**row, **values})

    def _save(self, metrics: Mapping[str, float] | None = None) -> None:
        """Have rank 0 write a checkpoint in the background. What becomes of it, the next windows tell."""
        parts = {**self.learn.weights(), "state": self._state()}
        self.learn.keeper.save(self.learn.progress.step, parts, metrics or {})

    def _state(self) -> dict[str, Any]:
        """All of a checkpoint but the weights. At a phase's end the next one starts, with its own optimiser."""
        progress = self.learn.progress
        rows = Appended(self.learn.recorder.rows)
        state: dict[str, Any] = {"rows": rows, "optimizer": None, "scaler": None}
        if progress.phase_step == self.steps and not progress.validate_due:
            return {**state, "progress": asdict(progress.after_phase(self.epochs))}
        optimizer, scaler = self.stepper.optimizer.state_dict(), self.stepper.scaler.state_dict()
        return {**state, "progress": asdict(progress), "optimizer": optimizer, "scaler": scaler}
