"""How does one phase run? Steps, windows, epochs and checkpoints, from where the run stands to the phase's end.

What changes is the session's (weights, progress, records); a `PhaseRun` holds what only its phase needs.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from thawline.trainer.checkpoints.saver import Appended
from thawline.trainer.errors import DivergedError, RecipeError
from thawline.trainer.lr_finder import lr_find
from thawline.trainer.metrics.evaluation import Measured
from thawline.trainer.optimisers import optim
from thawline.trainer.records.rows import Place, valid_row
from thawline.trainer.schedule.phases import Find, Phase, length
from thawline.trainer.schedule.shapes import LearningRate, Schedule
from thawline.trainer.session import Session
from thawline.trainer.step import world
from thawline.trainer.step.window import Window, extend_hash
from thawline.trainer.stopping.early import best_epoch, falls, phase_rows, since_best


class PhaseRun:
    """A phase of a fit, on this rank."""

    def __init__(self, session: Session, phase: Phase, *, predict: bool = False) -> None:
        """Freeze, search for a learning rate if that is asked for, and take up what a checkpoint left. Collective.

        predict: keep the predictions of the validation with which the phase ends.
        """
        self.session, self.phase, self._predict = session, phase, predict
        session.freeze_to(phase.freeze_to)
        train = session.train
        self.steps = length(phase, epoch_steps=train.steps, global_batch=train.global_batch)
        self.epochs = phase.epochs or self.steps * train.global_batch / train.samples
        whole = range(1, math.floor(self.epochs + 1e-9) + 1)
        self.epoch_ends = {self.steps, *(min(self.steps, train.steps(epoch)) for epoch in whole)}
        self._lr = _learning_rate(session, phase)
        session.keep_features()
        self.stepper = session.stepper(ema=session.ema)
        if session.optimizer_state is not None:
            optim.load_state(self.stepper.optimizer, session.optimizer_state["optimizer"])
            self.stepper.scaler.load_state_dict(session.optimizer_state["scaler"])
            session.optimizer_state = None
        self.schedule = self._scheduled()
        self.window = Window()
        self._over = False
        self._measured: Measured | None = None

    def run(self) -> Measured | None:
        """Train to the phase's end, or until somebody asks to stop; what the last validation gave. Collective."""
        session, progress = self.session, self.session.progress
        try:
            if progress.validate_due:  # the run was stopped between an epoch and its validation
                self._end_epoch()
            session.training_mode()
            while not (self._over or session.stopped):
                self._step()
                at_epoch_end = progress.phase_step in self.epoch_ends
                if len(self.window) >= session.settings.window or at_epoch_end:
                    self._end_window(at_epoch_end=at_epoch_end)
        finally:
            self.stepper.close()
            session.features = None
        if not session.stopped:
            session.progress = progress.after_phase(self._epochs_done())
        return self._measured

    def _scheduled(self) -> Schedule:
        fallen = 0
        if self.phase.shape == "plateau":
            values, higher = self.session.watched()
            fallen = falls(values, higher=higher, wait=self.phase.plateau_epochs)
        groups = len(self.stepper.parameters)
        return self.phase.schedule(self._lr, groups=groups, steps=self.steps, fallen=fallen)

    def _step(self) -> None:
        """Take one step at the schedule's rates on the stream's next batch: see `step.step.train_step`."""
        session, progress = self.session, self.session.progress
        optim.set_hyper(self.stepper.optimizer, *self.schedule.at(progress.phase_step))
        result = self.stepper.step(session.next_batch, seed=session.dropout_seed(progress.step))
        self.window.add(ids=result.batch.ids, losses=result.losses, data_wait_s=result.data_wait_s)
        progress.step += 1
        progress.phase_step += 1
        for sink in session.recorder.sinks:
            sink.step(images=len(result.batch.ids), step_s=result.step_s, data_wait_s=result.data_wait_s)

    def _end_window(self, *, at_epoch_end: bool) -> None:
        """Read and record what the window's steps gave; measure at an epoch's end; save where it is due. Collective."""
        session = self.session
        session.stopped = self._read_window()
        session.progress.validate_due = at_epoch_end
        if at_epoch_end and not session.stopped:
            self._end_epoch()
            session.training_mode()
        elif session.stopped or session.keeper.due():
            self._save()
        self.window.restart_clock()

    def _read_window(self) -> bool:
        """Read what the window's steps gave and record it; whether somebody asked to stop. Collective."""
        session = self.session
        reading = self.window.close(
            guard=self.stepper.guard,
            busy=self.stepper.busy,
            stop=session.context.should_stop(),
            taken_at=session.context.taken_at(),
            unusable=session.quarantine.unrecorded("train"),
            written=session.keeper.finished(),
        )
        session.set_apart("train", reading.unusable)
        if session.features is not None:
            session.features.share()
        session.record_written(reading.written)
        session.keeper.warn(reading.taken_at, window_s=reading.window_s)
        bad = reading.guard.bad
        for ids in reading.ids[:bad]:
            session.progress.stream_hash = extend_hash(session.progress.stream_hash, ids)
        if bad is not None:
            self._end_diverged(reading.steps - bad, reading.ids[bad])
        # Each rank's statistics follow its local batches. Here always, so that they do not depend on when one saves.
        world.average_buffers(session.model)
        for sink in session.recorder.sinks:
            sink.busy(busy_s=reading.busy_s[session.context.rank])
        lrs, momentum = self.schedule.at(session.progress.phase_step - 1)
        session.record({"kind": "train", **self._place(), "lr": lrs[-1], "momentum": momentum, **reading.numbers()})
        return reading.stop

    def _end_epoch(self) -> None:
        """Measure, record a "valid" row with the epoch's mean training loss beside it, and save where it is due.

        The phase may be over with it, and has then the weights that it shall end with.
        If somebody asks to stop meanwhile, `stopped` is set, and the resumed run begins with the validation.
        """
        session, began = self.session, time.monotonic()
        measured = session.measure(
            session.valid,
            keep=self._predict and self._may_end(),
            brief=True,
            interrupted=session.context.should_stop,
        )
        if measured is None:
            session.stopped = True
            self._save()
            return
        self._measured = measured
        session.progress.validate_due = False
        valid_s, samples = time.monotonic() - began, session.valid.samples - len(session.valid.quarantined)
        row = valid_row(
            self._place(),
            train_loss=session.recorder.epoch_loss(),
            valid_s=valid_s,
            valid_samples=samples,
            metrics=measured.metrics,
            recalls=dict(zip(session.valid.classes, measured.recalls or (), strict=False)),
        )
        session.record(row)
        best = session.keeper.best
        is_best = best is not None and session.recorder.is_best(best.metric, higher=best.higher)
        described = self._decide()
        self.schedule = self._scheduled()
        if is_best or session.keeper.due() or self._over:
            self._save({name: described[name] for name in measured.metrics})

    def _may_end(self) -> bool:
        """Whether the validation that begins may be the phase's last."""
        session, patience = self.session, self.session.stopping.patience
        if session.progress.phase_step == self.steps:
            return True
        values, higher = session.watched()
        return patience is not None and since_best(values, higher=higher) + 1 >= patience

    def _decide(self) -> Mapping[str, Any]:
        """After a validation: keep the best weights, end the phase, as is asked for. The row of the model's weights."""
        session, progress, stopping = self.session, self.session.progress, self.session.stopping
        rows = phase_rows(session.recorder.rows, start=progress.step - progress.phase_step)
        values, higher = session.watched()
        best = best_epoch(values, higher=higher)
        self._over = progress.phase_step == self.steps
        if stopping.patience is not None and since_best(values, higher=higher) >= stopping.patience and not self._over:
            self._over = True
            session.note(
                f"{stopping.monitor} has had no new best for {stopping.patience} epoch(s): {self.phase.name} ends at "
                f"epoch {rows[-1]['epoch']:g}"
            )
        if not stopping.restore_best or best is None:
            return rows[-1]
        if best == len(values) - 1:
            session.keep_best()
        if not self._over:
            return rows[-1]
        if best < len(values) - 1:
            self._measured = None  # of other weights than the phase ends with
            session.note(f"{self.phase.name} ends with the weights of its best epoch, {rows[best]['epoch']:g}")
        session.restore_best()
        return rows[best]

    def _end_diverged(self, back: int, ids: NDArray[np.int64]) -> NoReturn:
        """Return to before the step that was bad, `back` steps ago; keep that; raise. Collective."""
        session, progress = self.session, self.session.progress
        progress.step, progress.phase_step = progress.step - back, progress.phase_step - back
        # No weight has moved since; an average of them, though, has.
        if session.ema is None and self.stepper.guard.undo(back):
            world.average_buffers(session.model)
            self._save()
        refused = session.keeper.last(progress.step, session.record_written)
        lrs, _ = self.schedule.at(progress.phase_step)
        kept = f"what was before it is kept in {session.keeper.root}" if session.keeper.enabled else "nothing was kept"
        kept = kept if refused is None else f"what was before it could not be kept ({refused})"
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        raise DivergedError(
            f"the loss or its gradients are no finite numbers at step {progress.step} (learning rates "
            f"{', '.join(f'{lr:.2e}' for lr in lrs)}; ids {', '.join(map(str, ids[:8]))}{more}): going on would spoil "
            f"the weights, and {kept}; look at these images and labels, or start again with a lower lr, with fit.clip, "
            "or in fp32"
        )

    def _place(self) -> Place:
        progress = self.session.progress
        return {
            "phase": self.phase.name,
            "step": progress.step,
            "phase_step": progress.phase_step,
            "phase_steps": self.steps,
            "epoch": progress.epochs + self.epochs * progress.phase_step / self.steps,
            "time_s": self.session.elapsed_s(),
            "unix_s": time.time(),
        }

    def _epochs_done(self) -> float:
        done = self.session.progress.phase_step
        return self.epochs if done == self.steps else self.epochs * done / self.steps

    def _save(self, metrics: Mapping[str, float] | None = None) -> None:
        """Have rank 0 write a checkpoint in the background; a later window tells what became of it."""
        parts = {**self.session.weights(), "state": self._state()}
        if self.session.best_weights is not None:
            parts["best"] = self.session.best_weights
        self.session.keeper.save(self.session.progress.step, parts, metrics or {})

    def _state(self) -> dict[str, Any]:
        """All of a checkpoint but the weights. At a phase's end the next one starts, with its own optimiser."""
        progress, rows = self.session.progress, Appended(self.session.recorder.rows)
        state: dict[str, Any] = {"rows": rows, "optimizer": None, "scaler": None}
        if self._over:
            return {**state, "progress": asdict(progress.after_phase(self._epochs_done()))}
        optimizer, scaler = self.stepper.optimizer.state_dict(), self.stepper.scaler.state_dict()
        return {**state, "progress": asdict(progress), "optimizer": optimizer, "scaler": scaler}


def _learning_rate(session: Session, phase: Phase) -> LearningRate:
    """The phase's own learning rate, or what the lr finder suggests now or suggested earlier. Collective."""
    if not isinstance(phase.lr, Find):
        return phase.lr
    if phase.lr.search and session.progress.phase_step == 0:
        session.note(f"looking for a learning rate for {phase.name}")
        found = lr_find(session, lr=phase.lr.rate, freeze_to=phase.freeze_to)
        session.progress.found_lr = found.valley
        session.note(f"the lr finder suggests {found.valley:.2e} (valley) for {phase.name}")
    if session.progress.found_lr is None:
        raise RecipeError(
            f"phase {phase.name!r} takes the lr that an earlier phase found, and none searched: there is no "
            "learning rate; give Find(search=True), or a number"
        )
    return phase.lr.of(session.progress.found_lr)
