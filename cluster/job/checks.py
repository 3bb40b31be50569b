"""May a job be run? Types, the range of each field, and what contradicts what: asked once, after the flags.

What in an image's description contradicts what is dataio.ImageSpec's to refuse.
"""

from dataclasses import fields

from thawline.cluster.errors import JobError
from thawline.cluster.job.job import FIT_ALONE, FIT_SHAPES, Job, PhaseJob, from_dict, nested
from thawline.cluster.job.recipes import phases
from thawline.cluster.job.tables import flat
from thawline.cluster.words import quoted
from thawline.dataio import ranges
from thawline.trainer.schedule.phases import RECIPES, given_length, options

_FIELDS = tuple(field.name for field in fields(PhaseJob))
_OPTIONS = {recipe: [name for name in options(recipe) if name in _FIELDS] for recipe in RECIPES}
"""Recipe -> what of [fit] or of a phase shapes it, besides its length and lr."""
_SHAPES = {name for names in _OPTIONS.values() for name in names}

_FOR_PHASES = ("recipe", "lr", *FIT_SHAPES)
"""Of [fit], what a phase takes where it says nothing itself."""


def check(job: Job) -> Job:
    """`job` itself, if every value has the right type and lies in its range.

    Raises:
        JobError: the first field that does not, or that contradicts another, with the consequence and the remedy.
    """
    job = from_dict(nested(job), trust_code=True)  # whoever read it has asked
    for name, value in flat(job).items():
        if isinstance(value, str) and "\0" in value:
            raise JobError(f"{name}={quoted(value)} holds a zero byte: no file or machine is called so; correct it")
    ranges.check(job, JobError)
    check_together(job)
    return job


def check_together(job: Job) -> None:
    """Raises JobError for the first two values that contradict one another."""
    if job.least_workers > job.most_workers:
        raise JobError(
            f"workers={job.workers!r}: the second is less than the first, so no number lies between them; give them "
            f"as [{job.most_workers}, {job.least_workers}]"
        )
    _check_enough(job, job.data.global_batch, f"global_batch={job.data.global_batch}", "give global_batch >= {}")
    _check_phases(job)
    _check_recipes(job)
    _check_read(job)
    _check_stopping(job)
    _check_budget(job)
    job.optim.check(where="optim.")
    fit, workers = job.fit, job.most_workers
    _check_features(job)
    if fit.class_weights == "balanced" and job.data.balance:
        raise JobError(
            f"fit.class_weights='balanced' with data.balance={job.data.balance:g}: rare classes would count twice, in "
            "the loss and in the stream; leave one of the two out, or give weights by name"
        )
    if job.model.lora != type(job.model.lora)() and not job.model.lora.rank:
        raise JobError(
            "model.lora.alpha or model.lora.targets with model.lora.rank=0, which is no LoRA: nothing would read them; "
            "give model.lora.rank = 8, say, or leave them out"
        )
    if fit.compile == "reduce-overhead" and workers > 1:
        raise JobError(
            f"fit.compile='reduce-overhead' with workers={workers}: torch skips CUDA graphs for BatchNorm under DDP "
            "(pytorch#139207), so nothing would come of it; give fit.compile='max-autotune-no-cudagraphs'"
        )


def batch_of(job: Job, *, samples: int) -> int:
    """Images a step, over all workers: the job's, but the default is cut to a training split that has fewer.

    Raises JobError for a batch that was asked for and is larger than the split, or one that leaves a worker too few.
    """
    batch = job.data.global_batch
    if batch <= samples:
        return batch
    _check_enough(job, samples, f"a step of {samples} training images", "index at least {} training images")
    if batch != type(job.data).global_batch:
        raise JobError(
            f"data.global_batch={batch} is larger than the {samples} training images: a step would hold them more than "
            f"once; give --data.global-batch {samples} or less"
        )
    return samples


def _check_enough(job: Job, images: int, step: str, remedy: str) -> None:
    """Raises JobError where a step of so many images gives some worker fewer than 2 at once. remedy: {} is how many."""
    workers, parts = job.most_workers, job.fit.accumulate
    if images < 2 * workers * parts:
        divided = f"over workers={workers}" + f" in fit.accumulate={parts} micro-batches" * (parts > 1)
        raise JobError(
            f"{step} {divided} leaves one with fewer than 2 images a {'micro-batch' if parts > 1 else 'step'}: "
            f"BatchNorm cannot train on one; {remedy.format(2 * workers * parts)}"
        )


def _check_phases(job: Job) -> None:
    for where, phase in _tables(job):
        given_length(where, JobError, epochs=phase.epochs, steps=phase.steps, samples=phase.samples)
        if phase.size_px and job.data.stages:
            raise JobError(
                f"{where}.size_px={phase.size_px} beside data.stages: the images would have two sizes; give sizes "
                "in one of the two places"
            )
        if phase.size_px and phase.size_px > job.data.presize_px:
            raise JobError(
                f"{where}.size_px={phase.size_px} is larger than data.presize_px={job.data.presize_px}: the warp "
                f"would invent pixels; give data.presize_px >= {phase.size_px}"
            )


def _tables(job: Job) -> list[tuple[str, PhaseJob]]:
    """Each of [[phases]] and [[appended]], and what errors call it."""
    named = {"phases": job.phases, "appended": job.appended}
    return [(f"{name}[{i}]", table) for name, tables in named.items() for i, table in enumerate(tables)]


def _check_recipes(job: Job) -> None:
    """Whatever is given must be read by some recipe: a phase's own, or for [fit] any of the job's."""
    for where, phase in _tables(job):
        recipe = phase.recipe or job.fit.recipe
        for name in sorted(_SHAPES - {*_OPTIONS[recipe]}):
            if (value := getattr(phase, name)) is not None:
                raise _unread(f"{where}.{name}={quoted(value)}", name, recipe)
    recipes = {phase.recipe or job.fit.recipe for phase in job.phases} or {job.fit.recipe}
    for name in FIT_SHAPES:
        value = getattr(job.fit, name)
        if value and not any(name in _OPTIONS[recipe] for recipe in recipes):
            raise _unread(f"fit.{name}={quoted(value)}", name, " and ".join(sorted(recipes)))


def _check_read(job: Job) -> None:
    """What of [fit] is given, which is what is not its default, must not be hidden by every phase's own."""
    fit, default = job.fit, type(job.fit)()
    given = {name: value for name in FIT_ALONE + _FOR_PHASES if (value := getattr(fit, name)) != getattr(default, name)}
    for name, value in given.items():
        if not job.phases:
            if name == "frozen_epochs" and fit.recipe != "fine_tune":
                raise _unread(f"fit.frozen_epochs={value!r}", name, fit.recipe)
            continue
        takers = [phase for phase in job.phases if name not in _SHAPES or name in _OPTIONS[phase.recipe or fit.recipe]]
        if name in FIT_ALONE or all(getattr(phase, name) is not None for phase in takers):
            why = "of which each says that itself" if name not in FIT_ALONE else "which say how long they are"
            raise JobError(
                f"fit.{name}={quoted(value)} beside [[phases]], {why}: nothing would read it; leave it out, or give it "
                "in the phases"
            )


def _check_stopping(job: Job) -> None:
    """What ends a phase must be comparable from epoch to epoch, and what is given must be read."""
    fit, best = job.fit, job.checkpoint.best
    recipes = {phase.recipe or fit.recipe for phase in job.phases} or {fit.recipe}
    goes_by = {
        f"fit.patience={fit.patience}": fit.patience is not None,
        "fit.restore_best=true": fit.restore_best,
        "recipe plateau": "plateau" in recipes,
    }
    watched = [name for name, does in goes_by.items() if does]
    if fit.monitor != type(fit).monitor and not watched:
        raise JobError(
            f"fit.monitor={quoted(fit.monitor)} without fit.patience, fit.restore_best or recipe plateau: nothing "
            "would go by it; give one of them, or leave it out"
        )
    if watched and job.data.stages:
        raise JobError(
            f"{watched[0]} beside data.stages: epochs of one phase would be compared that were measured at different "
            f"sizes; {'leave it out' if fit.patience else 'give each size a phase, by size_px in [[phases]]'}"
        )
    if fit.patience is not None and any(phase.size_px for phase in job.phases[1:]):
        raise JobError(
            f"fit.patience={fit.patience} beside size_px in [[phases]]: a size begins at a step that is known before, "
            "and after a phase that ended early the next would begin at the old one; leave fit.patience out"
        )
    if fit.restore_best and best and best != fit.monitor:
        raise JobError(
            f"checkpoint.best={quoted(best)} beside fit.restore_best by fit.monitor={quoted(fit.monitor)}: the last "
            "checkpoint cannot hold both weights; give the same metric to both"
        )


def _check_budget(job: Job) -> None:
    fit, stages = job.fit, job.data.stages
    if fit.budget and fit.epochs != type(fit).epochs:
        raise JobError(
            f"fit.epochs={fit.epochs} beside fit.budget={quoted(fit.budget)}, from which epochs are planned: nothing "
            "would read it; give one of the two"
        )
    if fit.budget and stages:
        raise JobError(
            f"fit.budget={quoted(fit.budget)} beside data.stages: a step takes longer at each size, and only the first "
            "is timed; give epochs, or one size"
        )


def _check_features(job: Job) -> None:
    fit = job.fit
    if fit.cache_features and fit.batch_norm != "frozen":
        raise JobError(
            f"fit.cache_features={fit.cache_features} with fit.batch_norm={fit.batch_norm!r}: what the body says of an "
            "image would change from step to step; give fit.batch_norm='frozen', or fit.cache_features=0"
        )
    if fit.cache_features and not any(phase.freeze_to for phase in phases(job)):
        raise JobError(
            f"fit.cache_features={fit.cache_features}, and the whole model trains in every phase: no features stand "
            "still to be kept; give fit.recipe='fine_tune', or a phase with freeze_to = -1"
        )


def _unread(given: str, name: str, recipe: str) -> JobError:
    *others, last = (other for other, names in _OPTIONS.items() if name in names)
    recipes = f"{', '.join(others)} or {last}" if others else last
    return JobError(
        f"{given} with recipe {recipe}, which has none: nothing would read it; leave it out, or give {recipes}"
    )
