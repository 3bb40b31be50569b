"""What does a run train? A job's images, loaders, model, learner and metrics, made for one rank.

How a run begins, goes on and ends, see run. Here nothing is written, and no rank waits for another.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import batch_of
from thawline.cluster.job.job import Job
from thawline.cluster.job.recipes import image_spec, stages
from thawline.cluster.machine.memory import check_features, check_memory, kept_by_forward
from thawline.cluster.run.loaded import Loaded
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import ImageLoader, loaders, split_loader
from thawline.dataio.stream.mix import Mix
from thawline.dataio.stream.renderer import default_threads
from thawline.dataio.table.schema import SPLITS
from thawline.models.bodies.libraries import normalisation
from thawline.trainer.checkpoints.checkpoint import Best
from thawline.trainer.context import RunContext, Sink
from thawline.trainer.learner import Learner
from thawline.trainer.metrics.direction import direction
from thawline.trainer.step.precision import choose_precision
from thawline.trainer.stopping.early import Stopping

if TYPE_CHECKING:
    from thawline.trainer.metrics.meter import Meter

_TELL_S = 5.0


def job_spec(job: Job, *, samples: int) -> ImageSpec:
    """A job's images as the model sees them: `image_spec`, normalised as the model expects unless the job says
    otherwise.

    samples: how many training images there are; with them, each size begins where its phase does.
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
    samples = len(loaded.manifest.subset("train"))

    def tell(text: str) -> None:
        if context.rank == 0:
            context.publish([{"kind": "note", "text": text}])

    job = _fitted(job, samples=samples, tell=tell)
    train, valid = loaders(
        loaded.manifest, job_spec(job, samples=samples), valid=loaded.valid, **_loading(job, context)
    )
    check_memory([train, valid], ranks_here=ranks_here(context), tell=tell)
    return train, valid


def _fitted(job: Job, *, samples: int, tell: Callable[[str], None]) -> Job:
    """The job with a batch no larger than the training split. Raises JobError where the job gives a larger one."""
    batch = batch_of(job, samples=samples)
    if batch < job.data.global_batch:
        tell(f"data.global_batch: {batch} in place of {job.data.global_batch}, since there are no more training images")
    return replace(job, data=replace(job.data, global_batch=batch))


def split_loaders(job: Job, context: RunContext, *, loaded: Loaded | None = None) -> list[ImageLoader]:
    """A loader for each split that has images, to show them, not to train on them. Raises DataError."""
    loaded = loaded or Loaded(job)
    manifest, valid = loaded.manifest, loaded.valid
    manifests = {split: valid if valid is not None and split == "valid" else manifest for split in SPLITS}
    splits = [split for split in SPLITS if split in manifests[split].splits()] or [
        "train"
    ]  # `subset` refuses it if empty
    if splits[0] == "train":
        job = _fitted(job, samples=len(manifests["train"].subset("train")), tell=lambda text: None)
    options = _loading(job, context) | {"epoch_samples": len(manifests[splits[0]].subset(splits[0]))}
    spec = job_spec(job, samples=options["epoch_samples"])
    of_splits = [split_loader(manifests[split], spec, split, **options) for split in splits]
    check_memory(of_splits, ranks_here=ranks_here(context))
    return of_splits


def _loading(job: Job, context: RunContext) -> dict[str, Any]:
    """The options of every loader of a job."""
    return {
        "global_batch": job.data.global_batch,
        "seed": job.seed,
        "balance": job.data.balance,
        "rank": context.rank,
        "world_size": context.world_size,
        "device": context.device,
        "dtype": choose_precision(job.fit.precision, context.device).input_dtype,
        "engine": job.data.engine,
        "max_quarantined": job.data.max_quarantined,
        "cache": job.data.cache or None,
        "cache_gib": job.data.cache_gib,
        "progress": _progress(context),
        "threads": job.data.threads or default_threads(ranks_here(context)),
    }


def _progress(context: RunContext) -> Callable[[int, int], None]:
    """A callback that reports, every few seconds, how much of the shards has come from an object store."""
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
        kept_bytes = kept_by_forward(model, train.spec.size_px, micro_batches=job.fit.accumulate)
        check_memory([train], ranks_here=ranks_here(context), kept_bytes=kept_bytes)
    views = job.fit.cache_features
    memory = check_features(model, train, views=views, ranks_here=ranks_here(context)) if views else ""
    job = replace(job, data=replace(job.data, global_batch=train.global_batch))
    learner = Learner(
        model,
        train,
        valid,
        optimizer=job.optim,
        precision=job.fit.precision,
        label_smoothing=job.fit.label_smoothing,
        class_weights=job.fit.class_weights,
        meter=lambda: _meter(job, train),
        loss=job.fit.loss,
        accumulate=job.fit.accumulate,
        clip=job.fit.clip,
        ema=job.fit.ema,
        compile=job.fit.compile,
        batch_norm=job.fit.batch_norm,
        cache_features=job.fit.cache_features,
        batch_transform=mixing(job, classes=len(train.classes), rank=context.rank, world_size=context.world_size),
        seed=job.seed,
        context=context,
        sinks=sinks,
        log_every=job.log_every,
        checkpoint_every_s=job.checkpoint.every_s,
        keep=job.checkpoint.keep,
        stopping=Stopping(**{f.name: getattr(job.fit, f.name) for f in fields(Stopping)}),
        run=_identity(job, context),
        best=Best(best, higher=direction(best)) if (best := job.checkpoint.best) else None,
    )
    if memory:
        learner.note(memory)
    return learner


def _identity(job: Job, context: RunContext) -> dict[str, object]:
    """What a checkpoint must have in common with this run: its settings, and the data that `open_run` recorded."""
    folder = Root.of(context.run_dir)
    names = folder.listing()
    data = {"data": folder.read("manifest.hash").decode().strip()} if "manifest.hash" in names else {}
    return {**jobs.identity(job), "phases": len(job.phases), **data}


def _meter(job: Job, train: ImageLoader) -> "Meter":
    # torchmetrics takes two seconds to import, which a run that goes on can do without
    from thawline.trainer.metrics.meter import Meter, build, recalls

    task, classes = train.task, len(train.classes)
    uneven = job.fit.class_weights is not None or job.data.balance > 0
    metrics = build(job.fit.metrics, task=task, classes=classes, side_px=train.spec.size_px)
    return Meter(metrics, recalls=recalls(task, classes) if uneven else None)


def mixing(job: Job, *, classes: int, rank: int = 0, world_size: int | None = None) -> Mix | None:
    """MixUp and CutMix, if the job asks for either. Raises SpecError."""
    mixup, cutmix = job.augment.mixup, job.augment.cutmix
    if not (mixup or cutmix):
        return None
    world = {"rank": rank, "world_size": world_size or job.most_workers}
    return Mix(mixup=mixup, cutmix=cutmix, classes=classes, global_batch=job.data.global_batch, seed=job.seed, **world)


def ranks_here(context: RunContext) -> int:
    """Ranks that share this machine's cores; torchrun and Ray both say so in the environment."""
    if context.world_size == 1:  # what the environment says is then another job's
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size))
