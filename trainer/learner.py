"""Who trains? `Learner`: the one owner of everything that changes during a run.

The words are fastai's: fit_one_cycle, fine_tune, freeze, unfreeze, save, load. Underneath, a fit is a list of phases,
a phase a number of steps of the infinite stream, and the whole position of a run is (phase, step in phase, step):
that, the weights, the optimiser and the records are what a checkpoint holds. It knows no decoder, no Ray and no CLI.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from thawline.dataio.batch import Augmented, Batch, Loader
from thawline.dataio.hashing import hash64
from thawline.dataio.store.root import Root
from thawline.models import groups
from thawline.trainer import optim
from thawline.trainer.checkpoints import format as checkpoint
from thawline.trainer.checkpoints.format import Best
from thawline.trainer.checkpoints.keeper import Keeper
from thawline.trainer.checkpoints.restore import progress_of, weights_of
from thawline.trainer.checkpoints.saver import Written
from thawline.trainer.context import LocalContext, Row, RunContext, Sink
from thawline.trainer.ema import Ema
from thawline.trainer.errors import CheckpointError, RecipeError
from thawline.trainer.losses import default_loss
from thawline.trainer.lr_finder import lr_find
from thawline.trainer.metrics.evaluation import Measured, evaluate
from thawline.trainer.metrics.names import check_measured
from thawline.trainer.metrics.predictions import Predictions, average, check_averaged
from thawline.trainer.phase_run import Running
from thawline.trainer.progress import Progress
from thawline.trainer.quarantine import Quarantine, together_by_id
from thawline.trainer.recorder import Recorder
from thawline.trainer.schedule.phases import Find, Phase, doubts, fine_tune_phases, flat_cos_phases, one_cycle_phases
from thawline.trainer.schedule.shapes import LearningRate
from thawline.trainer.step import world
from thawline.trainer.step.recovery import How, Stepper, Taken
from thawline.trainer.step.reduction import Compile
from thawline.trainer.step.step import LossFunction, PrecisionName, choose_precision, place

if TYPE_CHECKING:
    from thawline.trainer.metrics.meter import Meter

BatchTransform = Callable[[Batch, int], Batch]
BatchNorms = Literal["train", "sync", "frozen"]

log = logging.getLogger(__name__)


class Learner:
    """Trains `model` on `train` and measures it on `valid`.

    model: any module with `groups()` (see models.groups), called with a batch's inputs: it takes images (N, 3, H, W) to
    (N, C), for points to (N, K, 2), for masks to (N, C, H, W).
    optimizer: a name, or an optim.Recipe. precision: see step.choose_precision.
    loss: (logits, targets) -> (N,) per-sample losses; from the task when not given, with `label_smoothing`.
    meter: what is measured, or what makes that when it is first asked for; from the task when not given.
    batch_transform: (batch, step) -> batch, on the device, in training only: dataio's MixUp and CutMix, say.
    accumulate: in how many micro-batches each rank takes its part of a step, to need less memory.
    clip: the largest norm of a step's gradients. ema: decay of an average of the weights, which is then what is
    measured; 0 keeps none. compile: a mode of torch.compile for training steps.
    batch_norm: train, every rank over its own part; sync, over all ranks (GPUs only); frozen, statistics stand still.
    seed: for dropout; drawn anew for every (seed, step, rank), so it needs no state.
    log_every: steps a window; the device is read once in each. checkpoint_every_s, keep, best: see keeper, checkpoint.
    run: what must be equal for this run to go on from a checkpoint, by name, as JSON has it; see checkpoint.Whose.
    With no context it is one process on the model's device, and nothing is written to disk.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Loader,
        valid: Loader,
        *,
        optimizer: optim.Name | optim.Recipe = "adamw",
        precision: PrecisionName = "auto",
        loss: LossFunction | None = None,
        label_smoothing: float = 0.0,
        meter: "Meter | Callable[[], Meter] | None" = None,
        batch_transform: BatchTransform | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        ema: float = 0.0,
        compile: Compile = "off",  # torch's word
        batch_norm: BatchNorms = "train",
        seed: int = 42,
        context: RunContext | None = None,
        sinks: Sequence[Sink] = (),
        log_every: int = 10,
        checkpoint_every_s: float = math.inf,
        keep: int = 3,
        best: Best | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self.context = context or LocalContext(device=next(model.parameters()).device)
        self.device = self.context.device
        self.precision = choose_precision(precision, self.device)
        self.model = place(_normed(model, batch_norm, self.device), self.precision, self.device)
        self.train, self.valid = train, valid
        self.loss = loss or default_loss(train.task, label_smoothing=label_smoothing)
        if meter is None:  # torchmetrics takes two seconds to import, which who gives a maker puts off
            from thawline.trainer.metrics.meter import Meter, default_metrics

            meter = Meter(default_metrics(train.task, len(train.classes)))
        self._meter = meter
        self.batch_transform = batch_transform
        self.recorder = Recorder(sinks=sinks)
        self.progress = Progress(splits=accumulate)
        self.quarantine = Quarantine(train, valid)
        self.stopped = False
        self.how = How(
            device=self.device,
            precision=self.precision,
            loss=self.loss,
            recipe=optim.Recipe(name=optimizer) if isinstance(optimizer, str) else optimizer,
            global_batch=train.global_batch,
            clip=clip,
            compile=compile,
            window=max(1, log_every),
        )
        self.ema = Ema(self.model, ema) if ema else None
        self._norms_frozen = batch_norm == "frozen"
        self._seed = seed
        self._frozen_to = 0
        self._stream: Iterator[Batch] | None = None
        self._resuming = False
        self.resumed: dict[str, Any] | None = None
        self._clock = time.monotonic()
        if best is not None:
            check_measured(best.metric, self.meter.metrics)
        run_dir, rank = self.context.run_dir, self.context.rank
        whose = checkpoint.Whose(run or {}, train.classes)
        self.keeper = Keeper(run_dir, rank=rank, every_s=checkpoint_every_s, keep=keep, best=best, whose=whose)

    @cached_property
    def meter(self) -> "Meter":
        """What is measured."""
        return (self._meter() if callable(self._meter) else self._meter).to(self.device)

    # What a user calls ------------------------------------------------------------------------------------

    def fit_one_cycle(
        self,
        epochs: float,
        lr: LearningRate | Find = 3e-3,
        *,
        div: float = 25.0,
        div_final: float = 1e5,
        pct_start: float = 0.25,
    ) -> None:
        """Train the groups that are not frozen for `epochs`, under one cycle. Source: Smith (2018), fastai."""
        self._fit_unfrozen(one_cycle_phases(epochs, lr, div=div, div_final=div_final, pct_start=pct_start))

    def fit_flat_cos(
        self, epochs: float, lr: LearningRate | Find = 3e-3, *, div_final: float = 1e5, pct_start: float = 0.75
    ) -> None:
        """Train at a steady rate for `pct_start` of `epochs`, then let it fall along a cosine. Source: fastai."""
        self._fit_unfrozen(flat_cos_phases(epochs, lr, div_final=div_final, pct_start=pct_start))

    def fine_tune(
        self,
        epochs: float,
        lr: float | Find = 2e-3,
        *,
        frozen_epochs: float = 1,
        pct_start: float = 0.3,
        div: float = 5.0,
    ) -> None:
        """Train the head alone for `frozen_epochs`, then everything at discriminative rates. Source: fastai."""
        self.fit(fine_tune_phases(epochs, lr, frozen_epochs=frozen_epochs, pct_start=pct_start, div=div))

    def freeze(self) -> None:
        """Only the head (and BatchNorm) will train in the next fit."""
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Everything will train in the next fit."""
        self.freeze_to(0)

    def freeze_to(self, n: int) -> None:
        """The layer groups from n on (and BatchNorm) will train in the next fit; -1 is the head alone."""
        groups.freeze_to(self.model, n)
        self._frozen_to = n

    def validate(self) -> dict[str, float]:
        """The metrics over exactly the validation samples. Collective."""
        return self._all_of(self.valid).metrics

    def predictions(self) -> Predictions | None:
        """One prediction a validation sample, by id, on rank 0; None on other ranks. Collective."""
        return self._all_of(self.valid, keep=True).predictions

    def tta(self, *, views: int = 4, beta: float = 0.25) -> Predictions | None:
        """Test-time augmentation: predictions averaged over augmented views of the validation images. Collective.

        The plain image counts `beta`, the mean of its `views` the rest. On rank 0; None on other ranks.
        Raises: RecipeError for points and masks, which lie elsewhere in every view, and for data that has no views.
        Source: fastai's `Learner.tta`.
        """
        check_averaged(self.valid.task)
        if not isinstance(self.valid, Augmented):
            raise RecipeError(
                f"{type(self.valid).__name__} has no augmented views of its samples: there is nothing to average; "
                "call predictions() for the plain ones"
            )
        plain = self.predictions()
        others = [self._all_of(self.valid.augmented(view), keep=True).predictions for view in range(views)]
        return None if plain is None else average(plain, [p for p in others if p is not None], beta=beta)

    def save(self, name: str) -> None:
        """Keep the weights as they are now under a name, in models/NAME of the run's folder. Collective."""
        whose, step = self.keeper.whose, self.progress.step

        def keep() -> None:
            if self.context.rank == 0:
                checkpoint.save_model(self._models, name, self.weights(), step=step, whose=whose)

        world.together(keep)  # which also lets nobody look for it before it is there

    def load(self, name: str) -> Self:
        """Take weights up again that `save` kept; schedule, optimiser and records stay as they are. Collective."""
        world.together(lambda: self._take_weights(checkpoint.load_model(self._models, name)))
        return self

    def note(self, text: str) -> None:
        """Tell whoever watches a line of text."""
        if self.context.rank == 0:
            self.context.publish([{"kind": "note", "text": text}])

    def close(self) -> None:
        """Give back the loaders' threads and memory, once the last checkpoint is written."""
        self.keeper.close()
        self._stream = None
        self.train.close()
        self.valid.close()

    # Phases and steps -------------------------------------------------------------------------------------

    def fit(self, phases: Sequence[Phase], *, predict: bool = False) -> Predictions | None:
        """Run phases one after another; after `resume`, from where the run stood. Collective.

        predict: return what `predictions` would of the trained model; it costs no further pass, since the fit's last
        validation keeps them. Returns early, with `stopped` set and no predictions, when somebody asked to stop.
        Raises CheckpointError, the model trained, where checkpoints are wanted and the last cannot be written.
        """
        if not self._resuming:
            self.progress = replace(self.progress, phase=0, phase_step=0, validate_due=False)
            self._tell_doubts(phases)
        self._resuming = self.stopped = False
        measured = None
        for phase in phases[self.progress.phase :]:
            last = self.progress.phase == len(phases) - 1
            measured = Running(self, phase, predict=predict and last).run()
            if self.stopped:
                break
        refused = self.keeper.last(self.progress.step, self.tell_written)
        if refused is not None:
            raise CheckpointError(refused)
        if self.stopped or not predict:
            return None
        return self.predictions() if measured is None else measured.predictions

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint in the run's folder; False if there is none. Collective."""
        saved, state, skipped = world.together(self._newest)
        everywhere = world.gather(None if saved is None else saved.step)
        if len(set(everywhere)) > 1:
            raise CheckpointError(
                f"ranks see different checkpoints (steps {everywhere}): they would train different weights; give every "
                "worker the same storage"
            )
        for told in skipped:
            self.note(f"checkpoint {told.name} is skipped: {told.reason}")
        if saved is None and any(told.finished for told in skipped):
            raise CheckpointError(
                f"no checkpoint in {self.keeper.root} can be trusted any more: going on would begin the run anew and "
                "write over what is left of them; bring one back, or remove the run's folder to begin anew"
            )
        if saved is None or state is None:
            return False
        progress = progress_of(saved, state)
        world.together(lambda: self._take_weights(saved))
        self.keeper.tidy(saved.step)
        self.progress = progress
        self.recorder.rows = state["rows"]
        self._resuming = True
        self.resumed = state if state["optimizer"] is not None else None
        self._stream = None
        known = self.recorder.of_kind("quarantine")
        self.quarantine.apply(known)
        for sink in self.recorder.sinks:
            for row in known:
                sink.observe(row)
        self.note(f"resumed at step {self.progress.step} from {saved.root}")
        if self.context.rank == 0:
            self.context.publish(self.recorder.rows)
        return True

    def rehearse(
        self,
        lrs: Callable[[int], Sequence[float]],
        *,
        stop: Callable[[float], bool],
        steps: int,
        freeze_to: int | None = None,
    ) -> list[float]:
        """Train on the stream from the cursor, then put everything back. Collective.

        lrs: step, from 0 -> learning rate of each layer group. Each step's mean loss over all ranks, which may be
        infinite or NaN, is given to `stop` and returned, at most `steps` of them: the same on every rank. Afterwards
        weights, statistics, random state and cursor are bit by bit as before; the optimiser was one of its own.
        """
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        modes, frozen_to = [(layer, layer.training) for layer in self.model.modules()], self._frozen_to
        devices = [self.device] if self.device.type == "cuda" else []
        losses: list[float] = []
        try:
            with torch.random.fork_rng(devices=devices), contextlib.ExitStack() as ending:
                if freeze_to is not None:
                    self.freeze_to(freeze_to)
                self.training_mode()
                stepper = Stepper(self.model, self.how, splits=self.progress.splits, on_split=self.split)
                ending.callback(stepper.close)
                self._stream = None
                stream = self.train.stream(self.progress.step)
                for step in range(steps):
                    optim.set_hyper(stepper.optimizer, lrs(step), None)
                    taken = self.take(stepper, lambda: next(stream), self.progress.step + step)
                    parts = world.gather((float(taken.losses.sum(dtype=torch.float64)), len(taken.losses)))
                    losses.append(sum(part[0] for part in parts) / sum(part[1] for part in parts))
                    if stop(losses[-1]):
                        break
        finally:
            self.model.load_state_dict(before)
            self.model.zero_grad()
            for layer, mode in modes:
                layer.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self._frozen_to = frozen_to
            self._stream = None
        return losses

    # What a phase asks of the learner: see running -----------------------------------------------------------

    def take(self, stepper: Stepper, following: Callable[[], Batch], step: int) -> Taken:
        """Take a step on the batch that `following` gives, with the dropout of `step`. Collective."""

        def fetch() -> Batch:
            batch = following()
            return batch if self.batch_transform is None else self.batch_transform(batch, step)

        return stepper.take(fetch, seed=int(hash64(self._seed, step, self.context.rank) >> 1))

    def next_batch(self) -> Batch:
        """The stream's next, from the cursor on."""
        if self._stream is None:  # opened at the cursor, once: phases and fits go on in the same stream
            self._stream = self.train.stream(self.progress.step)
        return next(self._stream)

    def training_mode(self) -> None:
        """As `model.train()`, but for statistics that are to stand still."""
        self.model.train()
        for layer in self.model.modules():
            if self._norms_frozen and isinstance(layer, _BatchNorm):
                layer.eval()

    def split(self, splits: int) -> None:
        """Some rank ran out of memory: from here on so many micro-batches."""
        self.progress.splits = splits
        self.note(
            f"out of memory at step {self.progress.step}: every rank takes its part in {splits} micro-batches from "
            "here on; the global batch and its gradients stay, but BatchNorm sees a micro-batch at a time"
        )

    def found_lr(self, phase: Phase, find: Find) -> float:
        """What the lr finder suggests to a phase, or has suggested to an earlier one. Collective."""
        if find.search and self.progress.phase_step == 0:
            self.note(f"looking for a learning rate for {phase.name}")
            found = lr_find(self, lr=find.rate, freeze_to=phase.freeze_to)
            self.progress.found_lr = found.valley
            self.note(f"the lr finder suggests {found.valley:.2e} (valley) for {phase.name}")
        if self.progress.found_lr is None:
            raise RecipeError(
                f"phase {phase.name!r} takes the lr that an earlier phase found, and none searched: there is no "
                "learning rate; give Find(search=True), or a number"
            )
        return self.progress.found_lr

    def measure(
        self, loader: Loader, *, keep: bool, interrupted: Callable[[], bool] = lambda: False
    ) -> Measured | None:
        """`evaluate`, with the averaged weights if there are any. Collective."""
        with contextlib.nullcontext() if self.ema is None else self.ema.in_place():
            found = evaluate(
                self.model,
                loader,
                step=self.progress.step,
                loss=self.loss,
                precision=self.precision,
                meter=self.meter,
                keep=keep,
                interrupted=interrupted,
            )
        news = [*self.quarantine.news("valid").items()]
        self.set_apart("valid", together_by_id([dict(rank) for rank in world.gather(news)]))
        return found

    def set_apart(self, split: str, found: Mapping[int, str]) -> None:
        """Name the files that some rank found unusable, and have every rank do without them. Collective."""
        rows = self.quarantine.rows(split, found, step=self.progress.step)
        for row in rows:
            self.recorder.add(row)
            self.note(
                f"quarantined, {'another fills its place' if split == 'train' else 'not measured'}: {row['reason']}"
            )
        self.quarantine.apply(rows)

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """The parts of a checkpoint that are weights."""
        weights = {"model": self.model.state_dict()}
        return weights if self.ema is None else {**weights, "ema": self.ema.state_dict()}

    def tell_written(self, written: Sequence[Written]) -> None:
        """Record what became of checkpoints. A storage that refuses is told loudly and ends no training: see `fit`."""
        for each in written:
            row: Row = {"step": each.step, "unix_s": time.time()}
            if each.error is None:
                self.show({"kind": "checkpoint", **row, "checkpoint_s": each.seconds})
                continue
            if self.context.rank == 0:
                log.error("%s", each.error)
            self.show({"kind": "checkpoint_failed", **row, "reason": each.error})

    def show(self, row: Row) -> None:
        """Record a row, on every rank, and publish it."""
        self.recorder.add(row)
        if self.context.rank == 0:
            self.context.publish([row])

    def elapsed_s(self) -> float:
        """Wall time that the run has taken so far."""
        now = time.monotonic()
        self.progress.elapsed_s += now - self._clock
        self._clock = now
        return self.progress.elapsed_s

    # Within -----------------------------------------------------------------------------------------------

    def _all_of(self, loader: Loader, *, keep: bool = False) -> Measured:
        measured = self.measure(loader, keep=keep)
        assert measured is not None  # nobody interrupts it
        return measured

    def _tell_doubts(self, phases: Sequence[Phase]) -> None:
        train = self.train
        trained = self.progress.step > 0 or bool(getattr(self.model, "pretrained", True))
        for doubt in doubts(phases, epoch_steps=train.steps, global_batch=train.global_batch, pretrained=trained):
            self.note(doubt)

    def _newest(self) -> tuple[checkpoint.Saved | None, dict[str, Any] | None, list[checkpoint.Skipped]]:
        """The checkpoint to go on from, its state, and what was skipped before it. Raises CheckpointError."""
        saved, skipped = checkpoint.newest(self.keeper.root, whose=self.keeper.whose)
        return saved, None if saved is None else saved.load("state"), skipped

    def _take_weights(self, saved: checkpoint.Saved) -> None:
        weights, average = weights_of(saved, self.model, classes=self.train.classes, averaged=self.ema is not None)
        self.model.load_state_dict(weights)
        if self.ema is not None:
            self.ema.load_state_dict(average)

    @property
    def _models(self) -> Root:
        return Root.of(self.context.run_dir).child("models")

    def _fit_unfrozen(self, phases: Sequence[Phase]) -> None:
        self.fit([replace(phase, freeze_to=self._frozen_to) for phase in phases])


def _normed(model: nn.Module, batch_norm: BatchNorms, device: torch.device) -> nn.Module:
    """The model with BatchNorm over all ranks, where that is asked for. Raises RecipeError."""
    if batch_norm != "sync" or world.world_size() == 1:
        return model
    if device.type != "cuda":
        raise RecipeError(
            f"batch_norm='sync' on {device.type}: torch can share BatchNorm's statistics between GPUs only; give train "
            "or frozen"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
