"""What is a run? `run(job, context)`: the one place where data, model and learner meet.

A notebook, `thawline train`, torchrun and a Ray worker all call this same function, once on every rank. The run's
folder decides what it does: absent, it begins; holding checkpoints, it goes on; finished, it returns its result.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import torch

from thawline.cluster import doctor
from thawline.cluster.cli.console import diagnosis_lines
from thawline.cluster.errors import USER_ERRORS, HangError, LaunchError, StorageError, last_line
from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import batch_of
from thawline.cluster.job.job import Job
from thawline.cluster.job.recipes import phases, stages
from thawline.cluster.observe.discovery import clear_targets, targets_file, write_targets
from thawline.cluster.observe.exporter import Exporter
from thawline.cluster.run.folder import Result, image_spec, open_run, run_dir, write_text
from thawline.cluster.run.loaded import Loaded
from thawline.cluster.run.memory import check_memory, kept_by_forward
from thawline.cluster.run.pulse import Pulse
from thawline.cluster.words import as_json, finite, quoted
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.store import files
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import ImageLoader, loaders, split_loader
from thawline.dataio.stream.mix import Mix
from thawline.dataio.stream.renderer import default_threads
from thawline.dataio.table import census, counts
from thawline.dataio.table.splits import SIDES
from thawline.dataio.table.tasks import TASKS
from thawline.models.bodies import normalisation
from thawline.trainer.analysis.diagnosis import diagnose
from thawline.trainer.checkpoints.checkpoint import Best
from thawline.trainer.context import RunContext, Sink
from thawline.trainer.learner import Learner
from thawline.trainer.metrics.direction import direction
from thawline.trainer.metrics.predictions import Predictions
from thawline.trainer.recorder import write_parquet
from thawline.trainer.step import world
from thawline.trainer.step.sentences import errors_in
from thawline.trainer.step.step import choose_precision

if TYPE_CHECKING:
    from thawline.trainer.metrics.meter import Meter

T = TypeVar("T")

_TELL_S = 5.0

_KINDS = errors_in(*USER_ERRORS)


def run(
    job: Job, context: RunContext, *, held: bool = False, fresh: bool = False, loaded: Loaded | None = None
) -> Result:
    """Train as the job says, or go on, or return the result of a run that has finished. Collective.

    held: who started this process holds the run's folder (see storage.hold), else rank 0 does until the end.
    fresh: begin anew, and move what stands in the folder aside.
    loaded: the job's, where this process has read some of it already.
    Returns what `result.json` holds (rank 0 writes it); on a graceful stop, the same with status "stopped".
    Raises: one of USER_ERRORS, the same on every rank for whatever is found before training begins; HangError where
    another rank was waited for in vain.
    """
    pulse = Pulse(rank=context.rank, world_size=context.world_size, hang_s=job.cluster.hang_s)
    try:
        with ExitStack() as holding:
            return _run(job, context, pulse, None if held else holding, loaded or Loaded(job), fresh=fresh)
    except RuntimeError as error:
        sentence = pulse.explain(error)
        if sentence is None:
            raise
        raise HangError(sentence) from error
    finally:
        pulse.close()


def _run(
    job: Job, context: RunContext, pulse: Pulse, holding: ExitStack | None, loaded: Loaded, *, fresh: bool
) -> Result:
    def begin() -> Result | None:
        def tell(text: str) -> None:
            context.publish([{"kind": "note", "text": text}])

        return open_run(job, holding, fresh=fresh, tell=tell, loaded=loaded) if context.rank == 0 else None

    finished = world.gather(_together(begin))[0]
    if finished is not None:
        return finished
    torch.set_num_threads(default_threads(_ranks_here(context)))
    torch.backends.cudnn.benchmark = True  # every batch of a run has the same shape: the search pays once
    with ExitStack() as stack:
        learner = _together(lambda: _build(job, context, stack, pulse, loaded))
        loaded.forget()
        stack.callback(learner.close)
        _announce(job, context, learner, stack)
        for line in (_description(job, context, learner), *_class_warnings(learner)):
            learner.note(line)
        resumed = learner.resume()
        _check_same_batch(job, learner)
        if not resumed:
            _together(lambda: learner.meter)  # a metric that cannot be made shall not cost an epoch
        pulse.begin(learner.progress.step)
        if resumed and context.rank == 0:
            context.publish([{"kind": "resumed", "step": learner.progress.step, "unix_s": time.time()}])
        predictions = learner.fit(phases(job), predict=True)
        if learner.stopped:
            result = _result(job, context, learner, status="stopped", metrics={})
        else:
            result = _result(job, context, learner, status="finished", metrics=_last_metrics(learner))
            for note in result["notes"]:
                learner.note(note)
        if context.rank == 0:
            outcomes = _write_outcome(context.run_dir, learner, result, predictions)
            if outcomes is not None:
                _picture(context.run_dir, learner, result, outcomes)
        return result


def job_spec(job: Job, *, samples: int) -> ImageSpec:
    """What a job's model shall see: `image_spec`, normalised as the model expects unless the job says otherwise.

    samples: training images, by which the sizes of the job's phases are put where the phases begin.
    Raises SpecError, RecipeError.
    """
    mean, std = normalisation(job.model.name)
    spec = replace(image_spec(job), mean=job.data.mean or mean, std=job.data.std or std)
    staged = stages(job, samples=samples)
    return replace(spec, stages=staged, size_px=staged[-1][1]) if staged else spec


def job_loaders(job: Job, context: RunContext, *, loaded: Loaded | None = None) -> tuple[ImageLoader, ImageLoader]:
    """The training and validation loaders of a job for one rank. loaded: the job's, where there is one.

    Raises DataError; JobError, LaunchError for a batch that is larger than the training split, or than the memory.
    """
    loaded = loaded or Loaded(job)
    samples = len(loaded.manifest.part("train"))

    def tell(text: str) -> None:
        if context.rank == 0:
            context.publish([{"kind": "note", "text": text}])

    job = _fitted(job, samples=samples, tell=tell)
    train, other = loaders(
        loaded.manifest, job_spec(job, samples=samples), valid=loaded.valid, **_loading(job, context)
    )
    check_memory([train, other], ranks_here=_ranks_here(context), tell=tell)
    return train, other


def _fitted(job: Job, *, samples: int, tell: Callable[[str], None]) -> Job:
    """The job with a batch that the training images are enough for. Raises JobError where another was asked for."""
    batch = batch_of(job, samples=samples)
    if batch < job.data.global_batch:
        tell(f"data.global_batch: {batch} in place of {job.data.global_batch}, since there are no more training images")
    return replace(job, data=replace(job.data, global_batch=batch))


def side_loaders(job: Job, context: RunContext, *, loaded: Loaded | None = None) -> list[ImageLoader]:
    """A loader for each side that the job's images are on, for looking at them alone. Raises DataError."""
    loaded = loaded or Loaded(job)
    manifest, valid = loaded.manifest, loaded.valid
    of = {side: valid if valid is not None and side == "valid" else manifest for side in SIDES}
    there = [side for side in SIDES if side in of[side].sides()] or ["train"]  # none at all is told by `part`
    if there[0] == "train":
        job = _fitted(job, samples=len(of["train"].part("train")), tell=lambda text: None)
    options = _loading(job, context) | {"epoch_samples": len(of[there[0]].part(there[0]))}
    spec = job_spec(job, samples=options["epoch_samples"])
    found = [split_loader(of[side], spec, side, **options) for side in there]
    check_memory(found, ranks_here=_ranks_here(context))
    return found


def _loading(job: Job, context: RunContext) -> dict[str, Any]:
    """How a job's images are loaded, whichever they are."""
    return {
        "global_batch": job.data.global_batch,
        "seed": job.seed,
        "rank": context.rank,
        "world_size": context.world_size,
        "device": context.device,
        "dtype": choose_precision(job.fit.precision, context.device).input_dtype,
        "engine": job.data.engine,
        "max_quarantined": job.data.max_quarantined,
        "cache": job.data.cache or None,
        "cache_gib": job.data.cache_gib,
        "progress": _told(context),
        "threads": job.data.threads or default_threads(_ranks_here(context)),
    }


def _told(context: RunContext) -> Callable[[int, int], None]:
    """Tells whoever watches, every few seconds, how far the shards have come from an object store."""
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if context.rank == 0 and time.monotonic() - last > _TELL_S:
            last = time.monotonic()
            text = f"fetching shards: {done / 2**30:.1f} of {total / 2**30:.1f} GiB"
            context.publish([{"kind": "note", "text": text}])

    return tell


def job_learner(job: Job, context: RunContext, *, sinks: Sequence[Sink] = (), loaded: Loaded | None = None) -> Learner:
    """A job's learner on its data, on this rank. Not collective: any rank may fail on its own, with USER_ERRORS."""
    loaded = loaded or Loaded(job)
    train, valid = job_loaders(job, context, loaded=loaded)
    model = loaded.take_model()
    if context.device.type == "cpu":
        kept_bytes = kept_by_forward(model, train.spec.size_px, parts=job.fit.accumulate)
        check_memory([train], ranks_here=_ranks_here(context), kept_bytes=kept_bytes)
    job = replace(job, data=replace(job.data, global_batch=train.global_batch))
    return Learner(
        model,
        train,
        valid,
        optimizer=job.optim,
        precision=job.fit.precision,
        label_smoothing=job.fit.label_smoothing,
        meter=lambda: _meter(job, train),
        accumulate=job.fit.accumulate,
        clip=job.fit.clip,
        ema=job.fit.ema,
        compile=job.fit.compile,
        batch_norm=job.fit.batch_norm,
        batch_transform=mixing(job, classes=len(train.classes), rank=context.rank, world_size=context.world_size),
        seed=job.seed,
        context=context,
        sinks=sinks,
        log_every=job.log_every,
        checkpoint_every_s=job.checkpoint.every_s,
        keep=job.checkpoint.keep,
        run=_whose(job, context),
        best=Best(best, higher=direction(best)) if (best := job.checkpoint.best) else None,
    )


def _whose(job: Job, context: RunContext) -> dict[str, object]:
    """What a checkpoint must have in common with this run: settings, and the data that `open_run` found."""
    folder = Root.of(context.run_dir)
    there = folder.listing()
    data = {"data": folder.read("manifest.hash").decode().strip()} if "manifest.hash" in there else {}
    return {**jobs.identity(job), "phases": len(job.phases), **data}


def _meter(job: Job, train: ImageLoader) -> "Meter":
    # torchmetrics takes two seconds to import, which a run that goes on can do without
    from thawline.trainer.metrics.meter import (
        Meter,
        build,
    )

    return Meter(build(job.fit.metrics, task=train.task, classes=len(train.classes)))


def _build(job: Job, context: RunContext, stack: ExitStack, pulse: Pulse, loaded: Loaded) -> Learner:
    """Everything a run needs, on this rank. Not collective: any rank may fail on its own."""
    port = job.metrics.port and job.metrics.port + context.local_rank
    try:
        exporter = Exporter(
            run=job.name,
            rank=context.rank,
            host=job.metrics.host,
            port=port,
            restarts=context.restarts,
            gpu=(context.device.index or 0) if context.device.type == "cuda" else None,
        )
    except OSError as error:
        raise LaunchError(
            f"metrics.host={quoted(job.metrics.host)} cannot be listened on ({error.strerror}): nobody could read "
            "this worker's metrics; give an address of this machine, or 0.0.0.0"
        ) from error
    stack.enter_context(exporter)
    exporter.observe({"world_size": context.world_size, "quarantined": 0})
    learner = job_learner(job, context, sinks=[exporter, pulse], loaded=loaded)
    assert isinstance(learner.train, ImageLoader)
    loader = learner.train
    exporter.watch(lambda: loader.seconds)
    return learner


def mixing(job: Job, *, classes: int, rank: int = 0, world_size: int | None = None) -> Mix | None:
    """MixUp and CutMix, if the job asks for either. Raises SpecError."""
    mixup, cutmix = job.augment.mixup, job.augment.cutmix
    if not (mixup or cutmix):
        return None
    world = {"rank": rank, "world_size": world_size or job.most_workers}
    return Mix(mixup=mixup, cutmix=cutmix, classes=classes, global_batch=job.data.global_batch, seed=job.seed, **world)


def _announce(job: Job, context: RunContext, learner: Learner, stack: ExitStack) -> None:
    """Tell Prometheus where every rank answers, until the run ends. Collective."""
    (exporter,) = (sink for sink in learner.recorder.sinks if isinstance(sink, Exporter))
    endpoints = world.gather(exporter.endpoint)
    if context.rank == 0:
        targets = targets_file(job.storage, job.name)
        try:
            write_targets(targets, job.name, endpoints)
        except OSError as error:  # it serves watching alone: no reason to end a run
            learner.note(f"{targets} cannot be written ({files.why_refused(error)}): Prometheus finds no workers by it")
        stack.callback(_forget, targets)
        context.publish([{"kind": "targets", "endpoints": " ".join(endpoints)}])


def _forget(targets: Path) -> None:
    with suppress(OSError):  # a disk that is full by now: the run has ended as it has
        clear_targets(targets)


def _ranks_here(context: RunContext) -> int:
    """Ranks that share this machine's cores; torchrun and Ray both say so in the environment."""
    if context.world_size == 1:  # what the environment says is then another job's
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size))


def _together(make: Callable[[], T]) -> T:
    """Call on every rank; if any rank fails in a way that a user can mend, all raise that. Collective."""
    return world.together(make, _KINDS)


def _check_same_batch(job: Job, learner: Learner) -> None:
    """Raises StorageError for a run of before the default batch was cut to a small split: its steps were others."""
    first = next(iter(learner.recorder.of_kind("train")), None)
    if first is None or not first["step"]:
        return
    was = float(first["images"] or 0) / float(first["step"])
    if was > learner.train.global_batch:
        raise StorageError(
            f"{run_dir(job)} was begun by an older thawline with {was:g} images a step, which are now no more than the "
            f"split's {learner.train.global_batch}: the stream would change in the middle; give another --name, or "
            "--fresh, which moves what is there aside"
        )


def _write_outcome(
    run_dir: str | Path, learner: Learner, result: Result, predictions: Predictions | None
) -> pa.Table | None:
    """The files of a run that has ended; `result.json` last, so that where it stands, the run is whole.

    Returns a row a validation image, as `Predictions.table` has them; None of a run that was stopped.
    """
    folder = Root.of(run_dir)
    try:
        write_parquet(learner.recorder.table(), folder.full("rows.parquet"))
        if predictions is None:
            return None
        outcomes = predictions.table(learner.valid.classes)
        write_parquet(outcomes, folder.full("valid.parquet"))
        write_text(folder, "result.json", as_json(result, indent=2) + "\n")
        return outcomes
    except OSError as error:
        raise StorageError(
            f"{folder} cannot take the results ({files.why_refused(error)}): the weights are in its last checkpoint; "
            "make room and start the run again, which then writes the results alone"
        ) from error


def _picture(run_dir: str | Path, learner: Learner, result: Result, outcomes: pa.Table) -> None:
    """Tell what the curves show, and draw the report. Whatever fails in it, the run has its result already."""
    folder = Root.of(run_dir)
    assert isinstance(learner.valid, ImageLoader)
    try:
        for line in diagnosis_lines(diagnose(learner.recorder.table())):
            learner.note(line)
        from thawline.cluster.run.report import write_report  # with matplotlib, which training needs not

        write_report(folder, result, learner.recorder.table(), outcomes, learner.valid)
    except Exception as error:  # a font, a name, a full disk
        why = f"{type(error).__name__}: {last_line(error)}"
        learner.note(f"report.html could not be made ({why}): the result stands without it")


def _description(job: Job, context: RunContext, learner: Learner) -> str:
    """One line on what is about to happen."""
    assert isinstance(learner.train, ImageLoader)
    return (
        f"{job.name}: {job.model.name} ({getattr(learner.model, 'origin', 'given')}), "
        f"{learner.train.samples:,} training and {learner.valid.samples:,} validation images in "
        f"{len(learner.train.classes)} classes; {context.world_size} worker(s) on {context.device.type}, "
        f"{learner.precision.name}; {learner.train.engine}: {learner.train.renderer.choice.reason}"
    )


def _class_warnings(learner: Learner) -> list[str]:
    """What `index` said of classes that are not on both sides: whoever trains may not have seen it. On rank 0."""
    train, valid = learner.train, learner.valid
    if learner.context.rank or not (isinstance(train, ImageLoader) and isinstance(valid, ImageLoader)):
        return []
    if TASKS[train.task].names is None:
        return []
    sides = {"train": train, "valid": valid}
    return counts.lacking({side: census.count_part(of.part, of.classes) for side, of in sides.items()}, train.classes)


def _last_metrics(learner: Learner) -> dict[str, float]:
    """What the last validation of the run measured: the final weights' metrics; NaN where one came to no number."""
    names = ["train_loss", "valid_loss", *learner.meter.metrics]
    return {name: learner.recorder.last_metric(name) for name in names}


def _result(job: Job, context: RunContext, learner: Learner, *, status: str, metrics: Mapping[str, float]) -> Result:
    assert isinstance(learner.train, ImageLoader)
    windows = learner.recorder.of_kind("train")
    total = {key: sum(float(row[key] or 0) for row in windows) for key in ("images", "window_s", "data_wait_s")}
    progress = learner.progress
    return {
        "name": job.name,
        "status": status,
        "seed": job.seed,
        "world_size": context.world_size,
        "engine": learner.train.engine,
        "device": str(context.device),
        "precision": learner.precision.name,
        "model": job.model.name,
        "epochs": progress.epochs,
        "steps": progress.step,
        "checkpoint": learner.keeper.place(progress.step),
        "global_batch": learner.train.global_batch,
        "samples_seen": progress.step * learner.train.global_batch,
        "valid_samples": learner.valid.samples - len(learner.valid.quarantined),
        "quarantined": [str(row["reason"]) for row in learner.recorder.of_kind("quarantine")],
        "metrics": finite(metrics),
        "notes": [
            f"{name} came to {value}, which is no number: null in result.json; perhaps a class has no validation image"
            for name, value in metrics.items()
            if not math.isfinite(value)
        ],
        "images_per_s": total["images"] / total["window_s"] if windows else 0.0,
        "data_wait_fraction": total["data_wait_s"] / total["window_s"] if windows else 0.0,
        "train_s": total["window_s"],
        "wall_s": progress.elapsed_s,
        "stream_hash": progress.stream_hash,
        "versions": doctor.versions(),
        "hardware": doctor.hardware(),
        "commit": doctor.commit(),
    }
