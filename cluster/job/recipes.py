"""What do a job's tables come to? Its phases, and what its images become, from which step on at another side."""

from dataclasses import asdict, fields, replace
from typing import Any

from thawline.cluster.job.job import FIT_SHAPES, Fit, Job, PhaseJob
from thawline.dataio.pixels.spec import ImageSpec
from thawline.trainer.errors import RecipeError
from thawline.trainer.schedule.phases import RECIPES, Find, Phase, length, options


def image_spec(job: Job) -> ImageSpec:
    """The ImageSpec that a job's [data] and [augment] describe, its defaults where they say None. Raises SpecError."""
    known = {f.name for f in fields(ImageSpec)}
    values = {**asdict(job.data), **asdict(job.augment)}
    return ImageSpec(**{name: value for name, value in values.items() if name in known and value is not None})


def phases(job: Job) -> tuple[Phase, ...]:
    """What a job's [[phases]] come to, or where it has none, its [fit]; and what was appended. Raises RecipeError."""
    return tuple(phase for table in _tables(job) for phase in _phases(table, job.fit))


def longer(job: Job, epochs: float) -> Job:
    """The job with one more phase, of so many epochs: the last one's schedule over again, with what that trains."""
    last = _tables(job)[-1]
    frozen = 0.0 if (last.recipe or job.fit.recipe) == "fine_tune" else None
    name = "more" if not job.appended else f"more {len(job.appended) + 1}"
    unsaid: dict[str, Any] = {"steps": None, "samples": None, "size_px": None}
    phase = replace(last, name=name, epochs=epochs, frozen_epochs=frozen, **unsaid)
    return replace(job, appended=(*job.appended, phase))


def _tables(job: Job) -> tuple[PhaseJob, ...]:
    alone = PhaseJob(epochs=job.fit.epochs, frozen_epochs=job.fit.frozen_epochs)
    return (*(job.phases or (alone,)), *job.appended)


def stages(job: Job, *, samples: int) -> tuple[tuple[float, int], ...]:
    """The sides of a job's images as `ImageSpec.stages`: each begins exactly at the first step of its phase.

    samples: training images, which with the global batch make an epoch's steps. Empty where no phase says a side.
    Raises RecipeError.
    """
    from thawline.dataio.stream.plan import Training  # brings numpy

    if not any(table.size_px for table in job.phases):
        return ()
    batch = job.data.global_batch
    plan = Training(n=samples, global_batch=batch, seed=job.seed)
    step, size_px = 0, job.data.size_px
    found: list[tuple[float, int]] = []
    for table in _tables(job):
        size_px = table.size_px or size_px
        if not found or found[-1][1] != size_px:
            found.append((step * batch / samples, size_px))  # the very quotient that ImageLoader.size_px looks up
        parts = _phases(table, job.fit)
        step += sum(length(phase, epoch_steps=plan.steps, global_batch=batch) for phase in parts)
    return tuple(found)


def sides_px(job: Job) -> tuple[int, ...]:
    """Every side that a job's images have while it trains, the last one at the end."""
    if job.data.stages:
        return tuple(size_px for _, size_px in job.data.stages)
    first, *others = job.phases or (PhaseJob(),)
    return (first.size_px or job.data.size_px, *(table.size_px for table in others if table.size_px))


def check_group(freeze_to: int, groups: int, *, name: str) -> None:
    """Raises RecipeError where phase `name` of a model with so many layer groups would have none left to train."""
    if not -groups <= freeze_to < groups:
        raise RecipeError(
            f"phase {name!r} has freeze_to={freeze_to}, and the model has {groups} layer groups: nothing would be left "
            f"to train; give a value from {-groups} to {groups - 1}, or other model.groups"
        )


def _phases(table: PhaseJob, fit: Fit) -> tuple[Phase, ...]:
    """One table's phases; what it does not give comes from [fit], or is the recipe's own."""
    recipe = table.recipe or fit.recipe
    given = {name: getattr(fit, name) for name in FIT_SHAPES}
    given |= {name: value for name, value in vars(table).items() if value is not None}
    shaped = {name: given[name] for name in options(recipe) if given.get(name) is not None}
    lr = fit.lr if table.lr is None else table.lr
    *before, last = RECIPES[recipe](1, Find() if lr == "find" else lr, **shaped)
    last = replace(last, epochs=table.epochs or 0, steps=table.steps or 0, samples=table.samples or 0)
    if not before:
        return (replace(last, name=table.name or last.name),)
    return tuple(replace(phase, name=f"{table.name or ''} {phase.name}".lstrip()) for phase in (*before, last))
