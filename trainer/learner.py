"""What can a user call? `Learner`: fastai's verbs. What changes while they run, its session owns.

They are fit_one_cycle, fine_tune, freeze, unfreeze, lr_find, save, load. Underneath, a fit is a list of
phases, a phase a number of steps of the infinite stream, and the whole position of a run is (phase, step in phase,
step): that, the weights, the optimiser and the records are what a checkpoint holds. It knows no decoder, no Ray and no
CLI.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from thawline.dataio.batch import Augmented, Loader
from thawline.trainer import features
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.checkpoint import Best
from thawline.trainer.checkpoints.format import Origin
from thawline.trainer.checkpoints.keeper import Keeper
from thawline.trainer.context import LocalContext, RunContext, Sink
from thawline.trainer.errors import CheckpointError, RecipeError
from thawline.trainer.losses.class_weights import ClassWeights
from thawline.trainer.losses.named import chosen_loss
from thawline.trainer.lr_finder import STEPS, LrCurve, lr_find
from thawline.trainer.metrics.direction import check_measured
from thawline.trainer.metrics.evaluation import Measured
from thawline.trainer.metrics.predictions import Predictions, average, check_averaged
from thawline.trainer.optimisers.settings import OptimSettings
from thawline.trainer.phase_run import PhaseRun
from thawline.trainer.progress import Progress
from thawline.trainer.records.recorder import Recorder
from thawline.trainer.schedule.phases import Find, Phase, doubts, fine_tune_phases, flat_cos_phases, one_cycle_phases
from thawline.trainer.schedule.shapes import LearningRate
from thawline.trainer.session import BatchTransform, Session
from thawline.trainer.settings import BatchNorms, Compile, LossName, PrecisionName, TrainSettings
from thawline.trainer.step import world
from thawline.trainer.step.ema import Ema
from thawline.trainer.step.precision import Precision, choose_precision, place
from thawline.trainer.step.step import LossFunction, StepSettings
from thawline.trainer.stopping import budget
from thawline.trainer.stopping.early import Stopping

if TYPE_CHECKING:
    from thawline.trainer.metrics.meter import Meter


class Learner:
    """Trains `model` on `train` and measures it on `valid`.

    model: any module with `groups()` (see models.groups), called with a batch's inputs: it takes images (N, 3, H, W) to
    (N, C), for points to (N, K, 2), for masks to (N, C, H, W).
    optimizer: a name, or OptimSettings. precision: see step.choose_precision.
    loss: a name (see losses.named_loss), or (outputs, targets) -> (N,) per-sample losses; with `label_smoothing` and
    `class_weights`: "balanced", or a weight by class name, 1 for the others.
    meter: what is measured, or a function that makes it when first needed; from the task when not given.
    batch_transform: (batch, step) -> batch, on the device, in training only: dataio's MixUp and CutMix, say.
    accumulate: into how many micro-batches each rank splits its local batch, to need less memory.
    clip: the largest norm of a step's gradients. ema: decay of an average of the weights, which is then what is
    measured; 0 keeps none. compile: a mode of torch.compile for training steps.
    batch_norm: train, every rank over its local batch; sync, over all ranks (GPUs only); frozen, statistics stand
    still.
    cache_features: of how many augmentations of each image a frozen body's features are kept; see features.
    seed: for dropout; drawn anew for every (seed, step, rank), so it needs no state.
    stopping: when a phase ends early, and with which weights.
    log_every: steps a window; the device is read once in each. checkpoint_every_s, keep, best: see keeper, checkpoint.
    run: what must be equal for this run to go on from a checkpoint, by name, as JSON has it; see format.Origin.
    With no context it is one process on the model's device, and nothing is written to disk.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Loader,
        valid: Loader,
        *,
        optimizer: str | OptimSettings = "adamw",
        precision: PrecisionName = "auto",
        loss: LossFunction | LossName | str = "auto",
        label_smoothing: float = 0.0,
        class_weights: ClassWeights = None,
        meter: "Meter | Callable[[], Meter] | None" = None,
        batch_transform: BatchTransform | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        ema: float = 0.0,
        compile: Compile = "off",  # torch's word
        batch_norm: BatchNorms = "train",
        cache_features: int = 0,
        seed: int = 42,
        context: RunContext | None = None,
        sinks: Sequence[Sink] = (),
        log_every: int = 10,
        checkpoint_every_s: float = math.inf,
        keep: int = 3,
        best: Best | None = None,
        stopping: Stopping | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        of_labels: dict[str, Any] = {"label_smoothing": label_smoothing, "class_weights": class_weights}
        TrainSettings(accumulate=accumulate, clip=clip, ema=ema, cache_features=cache_features, **of_labels).check()
        context = context or LocalContext(device=next(model.parameters()).device)
        loss = chosen_loss(loss, train, context.device, scale=getattr(model, "scale", None), **of_labels)
        settings = _settings(
            train, context.device, loss, optimizer, precision=precision, clip=clip, compile=compile, window=log_every
        )
        model = place(_normed(model, batch_norm, context.device), settings.precision, context.device)
        origin = Origin(run or {}, train.classes)
        keeper = Keeper(context, every_s=checkpoint_every_s, keep=keep, best=best, origin=origin)
        recorder, made = Recorder(sinks=sinks), _meter(meter, train, recalls=class_weights is not None)
        self.session = Session(model, train, valid, settings, context, keeper, recorder, made, seed=seed)
        self.session.progress = Progress(splits=accumulate)
        self.session.ema = Ema(model, ema) if ema else None
        self.session.batch_transform = batch_transform
        self.session.frozen_norms = batch_norm == "frozen"
        self.session.cache_features = cache_features
        features.check(cache_features, model, train, frozen_norms=batch_norm == "frozen", mixes=bool(batch_transform))
        self.session.stopping = (stopping or Stopping()).check()
        self._check_measured()

    # What it works with and what has become of it ---------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model itself, on the device."""
        return self.session.model

    @property
    def train(self) -> Loader:
        """What it trains on."""
        return self.session.train

    @property
    def valid(self) -> Loader:
        """What it is measured on."""
        return self.session.valid

    @property
    def context(self) -> RunContext:
        """Who this process is."""
        return self.session.context

    @property
    def precision(self) -> Precision:
        """How numbers are represented while the model runs."""
        return self.session.settings.precision

    @property
    def meter(self) -> "Meter":
        """What is measured."""
        return self.session.meter

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.session.progress

    @property
    def recorder(self) -> Recorder:
        """What the run has measured."""
        return self.session.recorder

    @property
    def keeper(self) -> Keeper:
        """The run's checkpoints."""
        return self.session.keeper

    @property
    def stopped(self) -> bool:
        """Whether the last fit ended early because somebody asked it to."""
        return self.session.stopped

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
        self.session.freeze_to(n)

    def lr_find(self, *, start: float = 1e-7, end: float = 10.0, steps: int = STEPS) -> LrCurve:
        """Train while the learning rate grows, undo it, and suggest a rate: see lr_finder. Collective."""
        return lr_find(self, start=start, end=end, steps=steps)

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
        if plain is None:
            return None
        loss, device = self.session.settings.loss, self.context.device
        return average(plain, [p for p in others if p is not None], beta=beta, loss=loss, device=device)

    def save(self, name: str) -> None:
        """Keep the weights as they are now under a name, in models/NAME of the run's folder. Collective."""
        session = self.session
        models, origin, step = session.models_dir, session.keeper.origin, session.progress.step

        def keep() -> None:
            if session.context.rank == 0:
                checkpoint.save_model(models, name, session.weights(), step=step, origin=origin)

        world.together(keep)  # which also lets nobody look for it before it is there

    def load(self, name: str) -> Self:
        """Load weights that `save` kept; schedule, optimiser and records stay as they are. Collective."""
        models = self.session.models_dir
        world.together(lambda: self.session.load_weights(checkpoint.load_model(models, name)))
        return self

    def note(self, text: str) -> None:
        """Tell whoever watches a line of text."""
        self.session.note(text)

    def close(self) -> None:
        """Give back the loaders' threads and memory, once the last checkpoint is written."""
        self.session.close()

    def fit(
        self, phases: Sequence[Phase], *, predict: bool = False, budget_s: float | None = None
    ) -> Predictions | None:
        """Run phases one after another; after `resume`, from where the run stood. Collective.

        predict: return what `predictions` would of the trained model, of masks only what their table needs; it costs no
        further pass, since the fit's last validation keeps them. budget_s: how long the run may take; the last phase is
        then as many epochs long as that allows, see trainer.budget. Returns early, with `stopped` set and no
        predictions, when somebody asked to stop.
        Raises CheckpointError, the model trained, where checkpoints are wanted and the last cannot be written.
        """
        session, measured = self.session, None
        if not session.resuming:
            session.progress = replace(session.progress, phase=0, phase_step=0, validate_due=False, planned_epochs=None)
            session.best_weights = None
        if budget_s is not None:
            phases = budget.plan(session, phases, budget_s)
        if not session.resuming:
            self._note_doubts(phases)
        session.resuming = session.stopped = False
        for phase in phases[session.progress.phase :]:
            last = session.progress.phase == len(phases) - 1
            measured = PhaseRun(session, phase, predict=predict and last).run()
            if session.stopped:
                break
        refused = session.keeper.last(session.progress.step, session.record_written)
        if refused is not None:
            raise CheckpointError(refused)
        if session.stopped or not predict:
            return None
        return (measured or self._all_of(self.valid, keep=True, brief=True)).predictions

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint in the run's folder; False if there is none. Collective.

        The next fit, given the same phases, does what is left of them.
        """
        return self.session.resume()

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
        return self.session.rehearse(lrs, stop=stop, steps=steps, freeze_to=freeze_to)

    # Within -----------------------------------------------------------------------------------------------

    def _all_of(self, loader: Loader, *, keep: bool = False, brief: bool = False) -> Measured:
        measured = self.session.measure(loader, keep=keep, brief=brief)
        assert measured is not None  # nobody interrupts it
        return measured

    def _check_measured(self) -> None:
        best, monitor = self.keeper.best, self.session.stopping.monitor
        if best is not None:
            check_measured(best.metric, self.meter.metrics)
        if monitor != Stopping.monitor:  # the loss is measured whatever the meter, which takes seconds to make
            check_measured(monitor, self.meter.metrics, name="monitor")

    def _note_doubts(self, phases: Sequence[Phase]) -> None:
        train = self.train
        trained = self.progress.step > 0 or bool(getattr(self.model, "pretrained", True))
        of: dict[str, Any] = {"pretrained": trained, "fixed": bool(getattr(self.model, "fixed_groups", 0))}
        for doubt in doubts(phases, epoch_steps=train.steps, global_batch=train.global_batch, **of):
            self.note(doubt)

    def _fit_unfrozen(self, phases: Sequence[Phase]) -> None:
        self.fit([replace(phase, freeze_to=self.session.frozen_to) for phase in phases])


def _settings(
    train: Loader,
    device: torch.device,
    loss: LossFunction,
    optimizer: str | OptimSettings,
    *,
    precision: PrecisionName,
    clip: float | None,
    compile: Compile,
    window: int,
) -> StepSettings:
    return StepSettings(
        device=device,
        precision=choose_precision(precision, device),
        loss=loss,
        optim_settings=(OptimSettings(name=optimizer) if isinstance(optimizer, str) else optimizer).check(),
        global_batch=train.global_batch,
        clip=clip,
        compile=compile,
        window=max(1, window),
    )


def _meter(meter: "Meter | Callable[[], Meter] | None", train: Loader, *, recalls: bool) -> "Callable[[], Meter]":
    """A function that makes the meter. torchmetrics takes two seconds to import; passing a function puts that off."""
    if meter is None:
        from thawline.trainer.metrics import meter as meters

        task, classes = train.task, len(train.classes)
        each = meters.recalls(task, classes) if recalls else None
        meter = meters.Meter(meters.default_metrics(task, classes), recalls=each)
    return meter if callable(meter) else lambda: meter


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
