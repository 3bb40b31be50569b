"""Who trains? `Learner`: the one owner of everything that changes during a run.

The words are fastai's: fit_one_cycle, fine_tune, freeze, unfreeze. Underneath, a fit is a list of phases, a phase
a number of steps of the infinite stream, and the whole position of a run is (phase, step in phase, step): that,
the weights, the optimiser and the records are what a checkpoint holds. It knows no decoder, no Ray and no CLI.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from dataio.batch import Batch, Loader
from dataio.hashing import hash64
from models import groups
from trainer import checkpoint, optim, world
from trainer.context import LocalContext, Row, RunContext, Sink
from trainer.errors import CheckpointError, DivergedError
from trainer.losses import default_loss
from trainer.metrics import Meter, default_metrics
from trainer.predictions import Predictions, average, collect
from trainer.quarantine import Quarantine, together_by_id
from trainer.recorder import Recorder
from trainer.schedule import OneCycle, Phase, fine_tune_phases, one_cycle_phases, spread
from trainer.step import LossFunction, PrecisionName, choose_precision, distribute, eval_step, train_step
from trainer.window import Reading, Window, extend_hash

BatchTransform = Callable[[Batch, int], Batch]

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands. All of it goes into a checkpoint."""

    phase: int = 0
    """Phases of the current fit that are complete."""
    phase_step: int = 0
    """Steps taken in the phase under way."""
    step: int = 0
    """Steps taken since the run began; times global_batch, it is the stream's cursor."""
    epochs: float = 0.0
    """Epochs in phases that are complete."""
    stream_hash: str = ""
    """Over the ids of every step so far, as they arrived (see `window.extend_hash`)."""
    elapsed_s: float = 0.0
    """Wall time, over every process that worked on the run."""


@dataclass(frozen=True)
class _Running:
    """What a phase needs while it runs; made at its start, gone at its end."""

    phase: Phase
    steps: int
    epoch_ends: frozenset[int]
    """Steps of the phase after which an epoch has ended."""
    cycle: OneCycle
    model: nn.Module
    """The learner's model, wrapped for the ranks."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


class Learner:
    """Trains `model` on `train` and measures it on `valid`.

    model: any module with `groups()` (see models.groups), taking (N, 3, H, W) to (N, C).
    optimizer, weight_decay: see optim.build. precision: see step.choose_precision.
    loss: (logits, targets) -> (N,) per-sample losses; from the task when not given. metrics: as in metrics.Meter.
    batch_transform: (batch, step) -> batch, on the device, in training only: dataio's MixUp and CutMix, say.
    seed: for dropout; drawn anew for every (seed, step, rank), so it needs no state.
    log_every: steps a window; the device is read once in each. checkpoint_every_s, keep: see checkpoint.
    With no context it is one process on the model's device, and nothing is written to disk.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Loader,
        valid: Loader,
        *,
        optimizer: str = "adamw",
        weight_decay: float = 0.01,
        precision: PrecisionName = "auto",
        loss: LossFunction | None = None,
        meter: Meter | None = None,
        batch_transform: BatchTransform | None = None,
        seed: int = 42,
        context: RunContext | None = None,
        sinks: Sequence[Sink] = (),
        log_every: int = 10,
        checkpoint_every_s: float = math.inf,
        keep: int = 3,
    ) -> None:
        self.context = context or LocalContext(device=next(model.parameters()).device)
        self.device = self.context.device
        self.precision = choose_precision(precision, self.device)
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train, self.valid = train, valid
        self.loss = loss or default_loss(train.task)
        self.meter = (meter or Meter(default_metrics(train.task, len(train.classes)))).to(self.device)
        self.batch_transform = batch_transform
        self.recorder = Recorder(sinks=sinks)
        self.progress = Progress()
        self.stopped = False
        self._optim: dict[str, Any] = {"name": optimizer, "weight_decay": weight_decay}
        self._seed, self._log_every = seed, max(1, log_every)
        self._checkpoint_every_s, self._keep = checkpoint_every_s, keep
        self._frozen_to = 0
        self._stream: Iterator[Batch] | None = None
        self._resuming = False
        self._resumed: dict[str, Any] | None = None
        self.quarantine = Quarantine(train, valid)
        self._clock = time.monotonic()
        self._last_save = self._clock

    # What a user calls ------------------------------------------------------------------------------------

    def fit_one_cycle(
        self,
        epochs: int,
        lr: float | slice | Sequence[float] = 3e-3,
        *,
        div: float = 25.0,
        div_final: float = 1e5,
        pct_start: float = 0.25,
    ) -> None:
        """Train the groups that are not frozen for `epochs`, under one cycle. Source: Smith (2018), fastai."""
        phases = one_cycle_phases(epochs, lr, div=div, div_final=div_final, pct_start=pct_start)
        self.fit([replace(phase, freeze_to=self._frozen_to) for phase in phases])

    def fine_tune(
        self,
        epochs: int,
        lr: float = 2e-3,
        *,
        frozen_epochs: int = 1,
        pct_start: float = 0.3,
        div: float = 5.0,
    ) -> None:
        """Train the head alone for `frozen_epochs`, then everything at discriminative rates. Source: fastai."""
        self.fit(fine_tune_phases(epochs, lr, frozen_epochs=frozen_epochs, pct_start=pct_start, div=div))

    def freeze(self) -> None:
        """Only the head (and BatchNorm) will train in the next fit."""
        self._freeze_to(-1)

    def unfreeze(self) -> None:
        """Everything will train in the next fit."""
        self._freeze_to(0)

    def validate(self) -> dict[str, float]:
        """The metrics over exactly the validation samples. Collective."""
        return self._evaluate(self.valid, keep=False)[0]

    def predictions(self) -> Predictions | None:
        """One prediction a validation sample, by id, on rank 0; None on other ranks. Collective."""
        return self._evaluate(self.valid, keep=True)[1]

    def tta(self, *, views: int = 4, beta: float = 0.25) -> Predictions | None:
        """Test-time augmentation: predictions averaged over augmented views of the validation images. Collective.

        The plain image counts `beta`, the mean of its `views` the rest. On rank 0; None on other ranks.
        Source: fastai's `Learner.tta`.
        """
        plain = self.predictions()
        others = [self._evaluate(self.valid.augmented(view), keep=True)[1] for view in range(views)]
        return None if plain is None else average(plain, [p for p in others if p is not None], beta=beta)

    def note(self, text: str) -> None:
        """Tell whoever watches a line of text."""
        if self.context.rank == 0:
            self.context.publish([{"kind": "note", "text": text}])

    def close(self) -> None:
        """Give back the loaders' threads and memory."""
        self._stream = None
        self.train.close()
        self.valid.close()

    # Phases and steps -------------------------------------------------------------------------------------

    def fit(self, phases: Sequence[Phase]) -> None:
        """Run phases one after another; after `resume`, from where the run stood. Collective.

        Returns early, with `stopped` set, when somebody asked to stop.
        """
        if not self._resuming:
            self.progress = replace(self.progress, phase=0, phase_step=0)
        self._resuming = self.stopped = False
        for phase in phases[self.progress.phase :]:
            self._run_phase(phase)
            if self.progress.phase_step == self.train.steps(phase.epochs):
                self.progress.phase, self.progress.phase_step = self.progress.phase + 1, 0
                self.progress.epochs += phase.epochs
            if self.stopped:
                return

    def _run_phase(self, phase: Phase) -> None:
        running = self._open_phase(phase)
        window = Window()
        running.model.train()
        while self.progress.phase_step < running.steps:
            self._take_step(running, window)
            at_epoch_end = self.progress.phase_step in running.epoch_ends
            if len(window) < self._log_every and not at_epoch_end:
                continue
            reading = self._close_window(running, window)
            if at_epoch_end:
                self._validate_epoch(running)
                running.model.train()
            if reading.save_due or reading.stop or self.progress.phase_step == running.steps:
                self._save(running)
            window.restart_clock()
            if reading.stop:
                self.stopped = True
                return

    def _open_phase(self, phase: Phase) -> _Running:
        self._freeze_to(phase.freeze_to)
        # A fresh optimiser a phase: what is frozen has changed, and moments of other gradients would mislead it.
        parameters = groups.parameter_groups(self.model)
        optimizer = optim.build(parameters, device=self.device, **self._optim)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)
        if self._resumed is not None:
            optimizer.load_state_dict(self._resumed["optimizer"])
            scaler.load_state_dict(self._resumed["scaler"])
            self._resumed = None
        steps = self.train.steps(phase.epochs)
        return _Running(
            phase=phase,
            steps=steps,
            epoch_ends=frozenset(self.train.steps(epoch) for epoch in range(1, phase.epochs + 1)),
            cycle=OneCycle(
                lr=spread(phase.lr, len(parameters)),
                steps=steps,
                div=phase.div,
                div_final=phase.div_final,
                pct_start=phase.pct_start,
            ),
            model=distribute(self.model, self.device),
            optimizer=optimizer,
            scaler=scaler,
        )

    def _take_step(self, running: _Running, window: Window) -> None:
        optim.set_hyper(running.optimizer, *running.cycle.at(self.progress.phase_step))
        began = time.perf_counter()
        batch = self._next_batch()
        waited_s = time.perf_counter() - began
        if self.batch_transform is not None:
            batch = self.batch_transform(batch, self.progress.step)
        # Dropout is a function of (seed, step, rank), so a resumed run needs no random state.
        torch.manual_seed(int(hash64(self._seed, self.progress.step, self.context.rank) >> 1))
        losses = train_step(
            running.model,
            batch,
            loss=self.loss,
            optimizer=running.optimizer,
            scaler=running.scaler,
            precision=self.precision,
            share=self.train.global_batch / self.context.world_size,
        )
        window.add(ids=batch.ids, losses=losses, data_wait_s=waited_s)
        self.progress.step += 1
        self.progress.phase_step += 1
        step_s = time.perf_counter() - began - waited_s
        for sink in self.recorder.sinks:
            sink.step(images=len(batch.ids), step_s=step_s, data_wait_s=waited_s)

    def _next_batch(self) -> Batch:
        if self._stream is None:  # opened at the cursor, once: phases and fits go on in the same stream
            self._stream = self.train.stream(self.progress.step)
        return next(self._stream)

    def _close_window(self, running: _Running, window: Window) -> Reading:
        lrs, momentum = running.cycle.at(self.progress.phase_step - 1)
        reading = window.close(
            stop=self.context.should_stop(),
            save_due=time.monotonic() - self._last_save >= self._checkpoint_every_s,
            lost=self.quarantine.news("train"),
        )
        if not math.isfinite(reading.loss):
            raise DivergedError(
                f"the loss is {reading.loss} within the {reading.steps} steps before step {self.progress.step} "
                f"(lr {lrs[-1]:.2e}): the weights are spoilt from there on; start again from the last checkpoint with "
                "a lower lr, or in fp32"
            )
        self._quarantine("train", reading.lost)
        for ids in reading.ids:
            self.progress.stream_hash = extend_hash(self.progress.stream_hash, ids)
        self._record(
            "train",
            running,
            loss=reading.loss,
            lr=lrs[-1],
            momentum=momentum,
            images=reading.images,
            window_s=reading.window_s,
            images_per_s=reading.images / reading.window_s,
            data_wait_s=reading.data_wait_s,
            data_wait_fraction=min(1.0, reading.data_wait_s / reading.window_s),
        )
        return reading

    def _record(self, kind: str, running: _Running, **values: float | int | str | None) -> None:
        phase, now = running.phase, time.monotonic()
        self.progress.elapsed_s += now - self._clock
        self._clock = now
        row: Row = {
            "kind": kind,
            "phase": phase.name,
            "step": self.progress.step,
            "phase_step": self.progress.phase_step,
            "phase_steps": running.steps,
            "epoch": self.progress.epochs + phase.epochs * self.progress.phase_step / running.steps,
            "time_s": self.progress.elapsed_s,
            "unix_s": time.time(),
        }
        self.recorder.add({**row, **values})
        if self.context.rank == 0:
            self.context.publish([self.recorder.rows[-1]])

    def _freeze_to(self, n: int) -> None:
        groups.freeze_to(self.model, n)
        self._frozen_to = n

    # Evaluation -------------------------------------------------------------------------------------------

    def _validate_epoch(self, running: _Running) -> None:
        """Measure, and record a "valid" row with the epoch's mean training loss beside it."""
        began = time.monotonic()
        values, _ = self._evaluate(self.valid, keep=False)
        before = [i for i, row in enumerate(self.recorder.rows) if row["kind"] == "valid"]
        windows = [
            (float(row["loss"] or 0), int(row["images"] or 0))
            for row in self.recorder.rows[before[-1] + 1 if before else 0 :]
            if row["kind"] == "train"
        ]
        train_loss = sum(loss * n for loss, n in windows) / sum(n for _, n in windows)
        seconds = time.monotonic() - began
        measured = self.valid.samples - len(self.valid.quarantined)
        self._record("valid", running, train_loss=train_loss, valid_s=seconds, valid_samples=measured, **values)

    def _evaluate(self, loader: Loader, *, keep: bool) -> tuple[dict[str, float], Predictions | None]:
        world.average_buffers(self.model)
        self.model.eval()
        self.meter.reset()
        kept: list[tuple[torch.Tensor, ...]] = []
        for batch in loader.stream(self.progress.step):
            logits, losses = eval_step(self.model, batch, loss=self.loss, precision=self.precision)
            self.meter.update(logits, batch.targets, losses)
            if keep:
                kept.append((batch.ids, batch.targets, logits, losses))
        values = self.meter.compute()
        self._quarantine("valid", together_by_id(world.gather(self.quarantine.news("valid"))))
        return values, collect(kept, task=self.valid.task) if keep else None

    def _quarantine(self, split: str, found: Mapping[int, str]) -> None:
        """Name the files that some rank found unusable, and have every rank do without them. Collective."""
        rows = self.quarantine.rows(split, found, step=self.progress.step)
        for row in rows:
            self.recorder.add(row)
            self.note(
                f"quarantined, {'another fills its place' if split == 'train' else 'not measured'}: {row['reason']}"
            )
        self.quarantine.apply(rows)

    # Checkpoints ------------------------------------------------------------------------------------------

    def _save(self, running: _Running) -> None:
        """Write a checkpoint on rank 0. A storage that refuses is reported and does not end the training."""
        if not math.isfinite(self._checkpoint_every_s):
            return
        began = time.monotonic()
        world.average_buffers(self.model)
        self._last_save = began
        if self.context.rank == 0:
            parts = {"model": self.model.state_dict(), "state": self._state(running)}
            try:
                checkpoint.save(self.context.run_dir / "checkpoints", self.progress.step, parts, keep=self._keep)
            except CheckpointError as error:
                log.error("%s", error)
                return
        self._record("checkpoint", running, checkpoint_s=time.monotonic() - began)

    def _state(self, running: _Running) -> dict[str, Any]:
        """All of a checkpoint but the weights. At a phase's end the next one starts, with its own optimiser."""
        progress, rows = self.progress, self.recorder.rows
        if progress.phase_step < running.steps:
            optimizer, scaler = running.optimizer.state_dict(), running.scaler.state_dict()
            return {"progress": asdict(progress), "rows": rows, "optimizer": optimizer, "scaler": scaler}
        epochs = progress.epochs + running.phase.epochs
        finished = replace(progress, phase=progress.phase + 1, phase_step=0, epochs=epochs)
        return {"progress": asdict(finished), "rows": rows, "optimizer": None, "scaler": None}

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint in the run's folder; False if there is none. Collective."""
        world.gather(None)  # after a stop in this process, rank 0 may still be writing the last one
        saved = checkpoint.newest(self.context.run_dir / "checkpoints")
        found = world.gather(None if saved is None else saved.step)
        if len(set(found)) > 1:
            raise CheckpointError(
                f"ranks see different checkpoints (steps {found}): they would train different weights; give every "
                "worker the same storage"
            )
        if saved is None:
            return False
        state = saved.load("state")
        self.model.load_state_dict(saved.load("model"))
        self.progress = Progress(**state["progress"])
        self.recorder.rows = state["rows"]
        self._resuming = True
        self._resumed = state if state["optimizer"] is not None else None
        self._stream = None
        known = self.recorder.of_kind("quarantine")
        self.quarantine.apply(known)
        for sink in self.recorder.sinks:
            for row in known:
                sink.observe(row)
        self.note(f"resumed at step {self.progress.step} from {saved.folder}")
        if self.context.rank == 0:
            self.context.publish(self.recorder.rows)
        return True
