"""Can this job run here? Everything that can be known before a worker starts, in the user's own process.

Cheap by intent, the cheapest first: a mistake should cost a moment, not the import of torch or the start of Ray.
"""

from dataclasses import replace

from thawline.cluster.job.checks import check_together
from thawline.cluster.job.job import Job
from thawline.cluster.job.recipes import check_group, image_spec, phases, sides_px
from thawline.cluster.launch import ranks
from thawline.cluster.machine.devices import check_cores, check_gpus, choose_device
from thawline.cluster.run.folder import Result, inspect
from thawline.cluster.run.loaded import Loaded
from thawline.dataio.store.private import use_compile_cache
from thawline.trainer.stopping.early import Stopping


def preflight(job: Job, *, here: bool = True, fresh: bool = False, loaded: Loaded | None = None) -> Result | None:
    """The result if the run has finished, else None when nothing stands in its way. Writes nothing.

    here: the workers will run on this machine, so its cores and devices must be enough.
    fresh: the content of the run's folder will be moved aside. loaded: the job's, if the caller goes on with it.
    Raises: one of cluster.errors.USER_ERRORS.
    """
    loaded = loaded or Loaded(job)
    image_spec(job)
    place = ranks.place() if here else None
    if place is not None:  # the number of processes, whatever the job says
        check_together(replace(job, workers=place.world_size))
    finished = inspect(job, fresh=fresh, loaded=loaded)
    if finished is not None:
        return finished
    if here:
        check_cores(job)

    use_compile_cache()
    import torch

    from thawline.dataio.stream.renderer import choose_engine
    from thawline.trainer.step.precision import choose_precision

    if here:
        choose_precision(job.fit.precision, torch.device(choose_device(job)))
        choose_engine(job.data.engine)
        check_gpus(job)
    check_recipe(job, loaded)
    if here and job.model.weights != "none":  # fetched once here, not by every worker at the same time
        loaded.make_model(fresh=fresh)
    return None


def check_recipe(job: Job, loaded: Loaded) -> None:
    """What a job names, whatever the machines: its model, phases, mix and metrics. Raises one of USER_ERRORS."""
    from thawline.cluster.run.vision import mixing
    from thawline.dataio.stream.balanced import check as check_balance
    from thawline.models import classifier
    from thawline.trainer.optimisers import optim

    model = job.model
    groups = classifier.check(
        model.name,
        task=loaded.manifest.task,
        decoder=model.decoder,
        groups=model.groups,
        sizes_px=sides_px(job),
        checkpointing=model.checkpointing,
    )
    if model.lora.rank:
        from thawline.models import lora

        lora.check(model.name, targets=model.lora.targets, size_px=sides_px(job)[-1])
        groups += 1
    for phase in phases(job):
        check_group(phase.freeze_to, groups, name=phase.name)
    optim.check(job.optim)
    mixing(job, classes=2)
    check_balance(job.data.balance, task=loaded.manifest.task)
    if job.fit.class_weights is not None:
        from thawline.trainer.losses import class_weights

        class_weights.check(job.fit.class_weights, task=loaded.manifest.task, classes=loaded.manifest.classes)
    chosen_by = {"best": job.checkpoint.best, "monitor": job.fit.monitor}
    if job.fit.metrics or job.checkpoint.best or job.fit.monitor != Stopping.monitor:
        from thawline.trainer.metrics.direction import check_measured, direction
        from thawline.trainer.metrics.meter import build

        task, classes = loaded.manifest.task, len(loaded.manifest.classes)
        metrics = build(job.fit.metrics, task=task, classes=classes)
        for name, metric in chosen_by.items():
            if metric:
                check_measured(metric, metrics, name=name)
                direction(metric)
