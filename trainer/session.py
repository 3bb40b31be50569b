"""What changes during a run? `Session`: weights and their average, progress, records, checkpoints, quarantine, stream.

It owns all of that. A `PhaseRun` trains with it, and a `Learner` offers it to the user. When to take a step, measure an
epoch or save, phase_run decides.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thawline.dataio.batch import Batch, Loader
from thawline.dataio.hashing import hash64
from thawline.dataio.store.root import Root
from thawline.models import groups
from thawline.models.folding import folded
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.format import Saved
from thawline.trainer.checkpoints.keeper import Keeper
from thawline.trainer.checkpoints.restore import progress_of, weights_of
from thawline.trainer.checkpoints.saver import Written
from thawline.trainer.context import RunContext
from thawline.trainer.errors import CheckpointError
from thawline.trainer.features import Features
from thawline.trainer.metrics.direction import direction
from thawline.trainer.metrics.evaluation import Measured, evaluate
from thawline.trainer.optimisers import optim
from thawline.trainer.progress import Progress
from thawline.trainer.quarantine import Quarantine, merge_by_id
from thawline.trainer.records.recorder import Recorder
from thawline.trainer.records.rows import Recorded
from thawline.trainer.step import world
from thawline.trainer.step.ema import Ema
from thawline.trainer.step.recovery import Stepper
from thawline.trainer.step.step import StepSettings
from thawline.trainer.stopping.early import Stopping, best_epoch, course, phase_rows

if TYPE_CHECKING:
    from thawline.trainer.metrics.meter import Meter

BatchTransform = Callable[[Batch, int], Batch]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Session:
    """A run on this rank. The fields down to `seed` are set once; of the model, only the weights change."""

    model: nn.Module
    train: Loader
    valid: Loader
    settings: StepSettings
    context: RunContext
    keeper: Keeper
    recorder: Recorder
    make_meter: "Callable[[], Meter]"
    """Called when metrics are first needed: torchmetrics takes two seconds to import."""
    ema: Ema | None = None
    batch_transform: BatchTransform | None = None
    frozen_norms: bool = False
    """BatchNorm's running statistics do not change."""
    seed: int = 42
    stopping: Stopping = field(default_factory=Stopping)
    progress: Progress = field(default_factory=Progress)
    cache_features: int = 0
    """Views of each image of which a frozen body's features are kept; see features."""
    features: Features | None = None
    """Of the phase under way, where they are kept."""
    stopped: bool = False
    """Somebody asked to stop, and the phase under way did."""
    resuming: bool = False
    """The next fit continues the one that the checkpoint was made in."""
    optimizer_state: dict[str, Any] | None = None
    """Optimiser and scaler of the phase that the checkpoint was made in, until that phase continues."""
    frozen_to: int = 0
    """The first layer group that trains."""
    best_weights: dict[str, Any] | None = None
    """As `weights`, on the host: of the best epoch of the phase under way, where it shall end with them."""

    def __post_init__(self) -> None:
        self.quarantine = Quarantine(self.train, self.valid)
        self._stream: Iterator[Batch] | None = None
        self._clock = time.monotonic()

    @cached_property
    def meter(self) -> "Meter":
        """What is measured."""
        return self.make_meter().to(self.settings.device)

    # The model ----------------------------------------------------------------------------------------------

    def freeze_to(self, n: int) -> None:
        """Train the layer groups from n on (and BatchNorm, unless it is frozen), and freeze the others."""
        groups.freeze_to(self.model, n, norms=not self.frozen_norms)
        self.frozen_to = n

    def training_mode(self) -> None:
        """As `model.train()`; with frozen statistics, BatchNorm and all frozen groups are in evaluation mode."""
        self.model.train()
        if not self.frozen_norms:
            return
        frozen = groups.layer_groups(self.model)[: groups.first_trained(self.model, self.frozen_to)]
        for layer in (each for group in frozen for each in groups.modules_of(group)):
            layer.eval()
        for layer in self.model.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The parts of a checkpoint that are weights."""
        weights = {"model": self.model.state_dict()}
        return weights if self.ema is None else {**weights, "ema": self.ema.state_dict()}

    def load_weights(self, saved: Saved) -> None:
        """Take the weights of a checkpoint. Raises CheckpointError, and changes nothing, where they do not fit."""
        weights, average = weights_of(saved, self.model, classes=self.train.classes, averaged=self.ema is not None)
        self.model.load_state_dict(weights)
        if self.ema is not None:
            self.ema.load_state_dict(average)

    def keep_best(self) -> None:
        """The epoch that has ended is the best of its phase: keep its weights."""
        self.best_weights = {
            part: {name: value.detach().cpu().clone() for name, value in weights.items()}
            for part, weights in self.weights().items()
        }

    def restore_best(self) -> None:
        """Take the weights of the phase's best epoch again, and keep them no longer."""
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights["model"])
            if self.ema is not None:
                self.ema.load_state_dict(self.best_weights["ema"])
        self.best_weights = None

    def watched(self) -> tuple[list[float], bool]:
        """What the phase under way has measured of the monitored metric, by epoch; whether more of it is better."""
        rows = phase_rows(self.recorder.rows, start=self.progress.step - self.progress.phase_step)
        return course(rows, self.stopping.monitor), direction(self.stopping.monitor)

    def described(self) -> Mapping[str, Any]:
        """The "valid" row of the weights with which the last phase has ended."""
        rows = phase_rows(self.recorder.rows)
        best = None
        if self.stopping.restore_best:
            best = best_epoch(course(rows, self.stopping.monitor), higher=direction(self.stopping.monitor))
        return rows[-1 if best is None else best]

    def measure(
        self,
        loader: Loader,
        *,
        keep: bool = False,
        brief: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Measured | None:
        """`evaluate`, with the averaged weights if there are any. Collective."""
        with contextlib.nullcontext() if self.ema is None else self.ema.in_place():
            measured = evaluate(
                self.model,
                loader,
                step=self.progress.step,
                loss=self.settings.loss,
                precision=self.settings.precision,
                meter=self.meter,
                keep=keep,
                brief=brief,
                interrupted=interrupted,
            )
        unrecorded = [*self.quarantine.unrecorded("valid").items()]
        self.set_apart("valid", merge_by_id([dict(rank) for rank in world.gather(unrecorded)]))
        return measured

    # The stream ---------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch:
        """The stream's next batch, from the cursor on, transformed; or its features, where those are kept."""
        if self.features is not None:
            return self.features.batch(self.progress.step)
        if self._stream is None:  # opened at the cursor, once: phases and fits go on in the same stream
            self._stream = self.train.stream(self.progress.step)
        return self._draw(self._stream, self.progress.step)

    def dropout_seed(self, step: int) -> int:
        """A function of (seed, step, rank) alone, so that a resumed run needs no random state."""
        return int(hash64(self.seed, step, self.context.rank) >> 1)

    def close(self) -> None:
        """Give back the loaders' threads and memory, once the last checkpoint is written."""
        self.keeper.close()
        self._stream = None
        self.train.close()
        self.valid.close()

    def _draw(self, stream: Iterator[Batch], step: int) -> Batch:
        batch = next(stream)
        return batch if self.batch_transform is None else self.batch_transform(batch, step)

    # What is told -------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Tell whoever watches a line of text."""
        if self.context.rank == 0:
            self.context.publish([{"kind": "note", "text": text}])

    def record(self, row: Recorded) -> None:
        """Keep a row, on every rank, and publish it."""
        self.recorder.add(row)
        if self.context.rank == 0:
            self.context.publish([row])

    def record_written(self, written: Sequence[Written]) -> None:
        """Record what became of checkpoints. A refusal is logged as an error, and does not end the training."""
        for each in written:
            step, unix_s = each.step, time.time()
            if each.error is None:
                self.record({"kind": "checkpoint", "step": step, "unix_s": unix_s, "checkpoint_s": each.seconds})
                continue
            if self.context.rank == 0:
                log.error("%s", each.error)
            self.record({"kind": "checkpoint_failed", "step": step, "unix_s": unix_s, "reason": each.error})

    def split(self, splits: int) -> None:
        """Use so many micro-batches a step from here on, because some rank ran out of memory."""
        self.progress.splits = splits
        self.note(
            f"out of memory at step {self.progress.step}: every rank splits its local batch into {splits} "
            "micro-batches from here on; the global batch and its gradients stay, but BatchNorm sees one at a time"
        )

    def set_apart(self, split: str, unusable: Mapping[int, str]) -> None:
        """Record the files that some rank found unusable, and have every rank do without them. Collective."""
        rows = self.quarantine.rows(split, unusable, step=self.progress.step)
        for row in rows:
            self.recorder.add(row)
            self.note(
                f"quarantined, {'another fills its place' if split == 'train' else 'not measured'}: {row['reason']}"
            )
        self.quarantine.apply(rows)

    def elapsed_s(self) -> float:
        """Wall time that the run has taken so far."""
        now = time.monotonic()
        self.progress.elapsed_s += now - self._clock
        self._clock = now
        return self.progress.elapsed_s

    # Checkpoints --------------------------------------------------------------------------------------------

    @property
    def models_dir(self) -> Root:
        """The folder of weights that were saved by name."""
        return Root.of(self.context.run_dir).child("models")

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint in the run's folder; False if there is none. Collective."""
        saved, state, skipped = world.together(self._newest)
        self._check_alike(saved)
        for each in skipped:
            self.note(f"checkpoint {each.name} is skipped: {each.reason}")
        if saved is None and any(each.finished for each in skipped):
            raise CheckpointError(
                f"no checkpoint in {self.keeper.root} can be trusted any more: going on would begin the run anew and "
                "write over what is left of them; bring one back, or remove the run's folder to begin anew"
            )
        if saved is None or state is None:
            return False
        progress = progress_of(saved, state)
        world.together(lambda: self.load_weights(saved))
        self.keeper.tidy(saved.step)
        self.progress, self.recorder.rows, self._stream = progress, state["rows"], None
        self.resuming = True
        self.best_weights = saved.load("best") if "best" in saved.parts else None
        self.optimizer_state = state if state["optimizer"] is not None else None
        known = self.recorder.of_kind("quarantine")
        self.quarantine.apply(known)
        for row in known:
            self.recorder.show(row)
        self.note(f"resumed at step {progress.step} from {saved.root}")
        if self.context.rank == 0:
            self.context.publish(self.recorder.rows)
        return True

    def _newest(self) -> tuple[Saved | None, dict[str, Any] | None, list[checkpoint.Skipped]]:
        """The checkpoint to go on from, its state, and what was skipped before it. Raises CheckpointError."""
        saved, skipped = checkpoint.newest(self.keeper.root, origin=self.keeper.origin)
        return saved, None if saved is None else saved.load("state"), skipped

    def _check_alike(self, saved: Saved | None) -> None:
        everywhere = world.gather(None if saved is None else saved.step)
        if len(set(everywhere)) > 1:
            raise CheckpointError(
                f"ranks see different checkpoints (steps {everywhere}): they would train different weights; give every "
                "worker the same storage"
            )

    # Trying out -----------------------------------------------------------------------------------------------

    def rehearse(
        self,
        lrs: Callable[[int], Sequence[float]],
        *,
        stop: Callable[[float], bool],
        steps: int,
        freeze_to: int | None = None,
    ) -> list[float]:
        """Train on the stream from the cursor, then put everything back. Collective: see `Learner.rehearse`."""
        losses: list[float] = []
        with self._put_back():
            if freeze_to is not None:
                self.freeze_to(freeze_to)
            self.training_mode()
            with contextlib.closing(self.stepper()) as stepper:
                stream = self.train.stream(self.progress.step)
                for step in range(steps):
                    at = self.progress.step + step
                    optim.set_hyper(stepper.optimizer, lrs(step), None)
                    result = stepper.step(partial(self._draw, stream, at), seed=self.dropout_seed(at))
                    losses.append(world.mean(result.losses))
                    if stop(losses[-1]):
                        break
        return losses

    def keep_features(self) -> None:
        """For the phase that begins, keep what a frozen body says of each image, if that is asked for."""
        last = len(groups.layer_groups(self.model)) - 1
        if not self.cache_features or groups.first_trained(self.model, self.frozen_to) < last:
            self.features = None
            return
        self._stream = None  # a later phase opens it where the cursor is then
        self.features = Features(self.model, self.train, self.settings, views=self.cache_features)
        self.note(
            f"cache_features={self.cache_features}: what the frozen body says of each training image is kept in "
            f"memory, in {self.cache_features} augmentation(s), which repeat from epoch to epoch"
        )

    def stepper(self, *, ema: Ema | None = None) -> Stepper:
        """A stepper for the parameters that are trainable now."""
        splits, on_split = self.progress.splits, self.split
        network = self.model
        if self.frozen_norms:
            network = folded(self.model, self.frozen_to) if self.features is None else self.features.head
        return Stepper(self.model, self.settings, network=network, splits=splits, on_split=on_split, ema=ema)

    @contextlib.contextmanager
    def _put_back(self) -> Iterator[None]:
        """Restore weights, statistics, flags, random state and cursor bit by bit at the end."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        modes, frozen_to = [(layer, layer.training) for layer in self.model.modules()], self.frozen_to
        devices = [self.settings.device] if self.settings.device.type == "cuda" else []
        self._stream = None
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            self.model.load_state_dict(before)
            self.model.zero_grad()
            for layer, mode in modes:
                layer.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self.frozen_to = frozen_to
            self._stream = None
