"""Which values may a job have? The range of each field, and what contradicts what.

`job.check` asks here once, after the flags. What an image may become is dataio.ImageSpec's to refuse, and what an
optimiser or a schedule may be, the trainer's; neither is imported.
"""

import re
from collections.abc import Callable, Mapping
from math import inf
from typing import TYPE_CHECKING, Any

from thawline.cluster.errors import JobError
from thawline.cluster.words import quoted

if TYPE_CHECKING:
    from thawline.cluster.job.job import Job

TAKES: dict[str, tuple[str, ...]] = {
    "fine_tune": ("div", "div_final", "pct_start", "momenta", "frozen_epochs"),
    "one_cycle": ("div", "div_final", "pct_start", "momenta", "freeze_to"),
    "flat_cos": ("div", "div_final", "pct_start", "warmup", "freeze_to"),
    "constant": ("div", "warmup", "freeze_to"),
}
"""Recipe -> what of [fit] or of a phase shapes it, besides its length and lr."""
_SHAPES = {name for takes in TAKES.values() for name in takes}

FIT_ALONE = ("epochs", "frozen_epochs")
"""Of [fit], what counts where there are no [[phases]] only."""
_FOR_PHASES = ("recipe", "lr", "div", "pct_start", "warmup")
"""Of [fit], what a phase takes where it says nothing itself."""


_NAME_BYTES = 200
"""Of the 255 that a file's name may have: NAME.targets.json, its temporary name, and a dated folder need the rest."""


def _is_file_name(name: str) -> bool:
    named = bool(name.strip(" .")) and name == name.strip() and name.isprintable() and not {*name} & {*"/\\"}
    return named and len(name.encode()) <= _NAME_BYTES


_Range = tuple[Callable[[Any], bool], str, str]

_COUNT: _Range = (lambda v: v >= 0, "_ >= 0", "a count is not negative")
_ALPHA: _Range = (lambda v: 0 <= v <= 100, "0 <= _ <= 100, where 0 is none", "it is a Beta distribution's alpha")
_RATE: _Range = (
    lambda v: v == "find" or 0 < v < inf,
    "a finite number above 0",
    "training would stand still or diverge",
)
_DIV: _Range = (lambda v: 1 <= v < inf, "_ >= 1", "the cycle would start above its own maximum")
_PCT: _Range = (lambda v: 0 < v < 1, "0 < _ < 1", "a cycle rises and falls")
_WARMUP: _Range = (lambda v: 0 <= v <= 1, "0 <= _ <= 1, where 0 is none", "it is a share of the steps")
_LENGTH: _Range = (lambda v: 0 < v < inf, "_ > 0", "nothing would be trained")
_SECONDS: _Range = (lambda v: 0 <= v < inf, "_ >= 0", "it is a time")
_PATIENCE: _Range = (lambda v: 1 <= v < inf, "_ >= 1", "nothing would be given the time to answer")
_MOMENTUM: _Range = (lambda v: 0 <= v < 1, "0 <= _ < 1", "the moments would never settle")

_RANGES: dict[str, _Range] = {
    "name": (
        _is_file_name,
        "a name without slashes of at most 200 bytes, such as 'pets-2'",
        "no run folder can be called so",
    ),
    "manifest": (bool, "the file that `thawline index` or `thawline pack` writes", "there is nothing to train on"),
    "storage": (bool, "a folder or a URI", "the run would have no place"),
    "seed": (lambda v: 0 <= v < 2**63, "0 <= _ < 2**63", "the random numbers are counted in 63 bits"),
    "workers": (lambda v: v >= 1, "_ >= 1", "nobody would train"),
    "log_every": (lambda v: v >= 1, "_ >= 1", "a window has at least one step"),
    "failures": _COUNT,
    "preemptions": (lambda v: v >= -1, "_ >= -1, where -1 is any number", "a count is not negative"),
    "data.global_batch": (lambda v: v >= 2, "_ >= 2", "BatchNorm cannot train on one image"),
    "data.threads": (lambda v: v >= 0, "_ >= 0, where 0 chooses", "a count is not negative"),
    "data.max_quarantined": (lambda v: 0 <= v <= 1, "0 <= _ <= 1", "it is a share of the training images"),
    "data.cache_gib": (lambda v: v > 0, "_ > 0", "no shard would find room"),
    "augment.mixup": _ALPHA,
    "augment.cutmix": _ALPHA,
    "model.name": (bool, "a backbone such as 'resnet34'", "there is nothing to train"),
    "model.weights": (bool, "none, imagenet or a file", "it would be no choice"),
    "model.dropout": (lambda v: 0 <= v < 1, "0 <= _ < 1", "it is a probability, and at 1 nothing passes"),
    "fit.epochs": (lambda v: v >= 1, "_ >= 1", "nothing would be trained"),
    "fit.frozen_epochs": _COUNT,
    "fit.lr": _RATE,
    "fit.div": _DIV,
    "fit.pct_start": _PCT,
    "fit.warmup": _WARMUP,
    "fit.accumulate": (lambda v: v >= 1, "_ >= 1, where 1 is none", "a step has at least one part"),
    "fit.clip": (lambda v: 0 < v < inf, "a finite number above 0", "no gradient would be left, or none be clipped"),
    "fit.ema": (lambda v: 0 <= v < 1, "0 <= _ < 1, where 0 is none", "at 1 the average would never move"),
    "fit.label_smoothing": (lambda v: 0 <= v < 1, "0 <= _ < 1, where 0 is none", "at 1 no label would be left"),
    "fit.metrics": (bool, "names such as 'accuracy'", "nothing is called so"),
    "optim.weight_decay": (lambda v: 0 <= v < inf, "_ >= 0", "weights would grow by themselves"),
    "optim.momentum": _MOMENTUM,
    "optim.beta2": _MOMENTUM,
    "optim.eps": (lambda v: 0 < v < inf, "a finite number above 0", "a step could divide by zero"),
    "checkpoint.every_s": (lambda v: 0 <= v < inf, "_ >= 0", "it is a time between two checkpoints"),
    "checkpoint.keep": (lambda v: v >= 1, "_ >= 1", "a killed run could not resume"),
    "metrics.port": (lambda v: 0 <= v < 2**16, "0 <= _ < 65536; 0 is any free one", "no such port exists"),
    "metrics.host": (bool, "an address such as 127.0.0.1", "nothing could listen"),
    "metrics.sd_port": (lambda v: 0 <= v < 2**16, "0 <= _ < 65536; 0 is any free one", "no such port exists"),
    "cluster.cpus_per_worker": (lambda v: 0 < v < inf, "_ > 0", "nothing would feed the worker"),
    "cluster.resources": (lambda v: all(0 < n < inf for n in v.values()), "numbers above 0", "none would be taken"),
    "cluster.wait_s": _SECONDS,
    "cluster.start_s": _PATIENCE,
    "cluster.resize_s": _PATIENCE,
    "cluster.first_step_s": _PATIENCE,
    "cluster.hang_s": _PATIENCE,
    "phases.epochs": _LENGTH,
    "phases.steps": _LENGTH,
    "phases.samples": _LENGTH,
    "phases.frozen_epochs": (lambda v: 0 <= v < inf, "_ >= 0", "a length is not negative"),
    "phases.lr": _RATE,
    "phases.div": _DIV,
    "phases.div_final": (lambda v: 1 <= v < inf, "_ >= 1", "the phase would end above its own maximum"),
    "phases.pct_start": _PCT,
    "phases.warmup": _WARMUP,
    "phases.momenta": _MOMENTUM,
    "phases.size_px": (lambda v: v >= 8, "_ >= 8", "nothing could be seen"),
}
"""Field -> is the value inside?, what to give (_ stands for the field's name), what would happen outside."""


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raises JobError for the first value, by its dotted name, that lies outside its range."""
    for name, value in values.items():
        if isinstance(value, str) and "\0" in value:
            raise JobError(f"{name}={quoted(value)} holds a zero byte: no file or machine is called so; correct it")
        known = re.sub(r"\[\d+\]", "", name)
        if known not in _RANGES or value is None:
            continue
        inside, wanted, consequence = _RANGES[known]
        if not all(map(inside, value if isinstance(value, tuple) else (value,))):
            wanted = wanted.replace("_", name, 1)
            raise JobError(f"{name}={quoted(value)} is out of range: {consequence}; give {wanted}")


def check_together(job: "Job") -> None:
    """Raises JobError for the first two values that contradict one another."""
    if job.least_workers > job.most_workers:
        raise JobError(
            f"workers={job.workers!r}: the second is less than the first, so no number lies between them; give them "
            f"as [{job.most_workers}, {job.least_workers}]"
        )
    _check_batch(job)
    _check_phases(job)
    _check_recipes(job)
    _check_read(job)
    fit, optim, workers = job.fit, job.optim, job.most_workers
    if fit.compile == "reduce-overhead" and workers > 1:
        raise JobError(
            f"fit.compile='reduce-overhead' with workers={workers}: torch skips CUDA graphs for BatchNorm under DDP "
            "(pytorch#139207), so nothing would come of it; give fit.compile='max-autotune-no-cudagraphs'"
        )
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        raise JobError(
            f"optim.nesterov with optim.name={optim.name!r} and optim.momentum={optim.momentum}: only sgd with a "
            "momentum has such steps; give optim.name='sgd' and optim.momentum=0.9, or no nesterov"
        )


def batch_of(job: "Job", *, samples: int) -> int:
    """Images a step, over all workers: the job's, but the default is cut to a training split that has fewer.

    Raises JobError for a batch that was asked for and is larger than the split, or one that leaves a worker too few.
    """
    batch, least = job.data.global_batch, 2 * job.most_workers * job.fit.accumulate
    if batch <= samples:
        return batch
    if samples < least:
        raise JobError(
            f"{samples} training images over workers={job.workers} in fit.accumulate={job.fit.accumulate} parts leave "
            f"one with fewer than 2 a step: BatchNorm cannot train on one; index more images, {least} at the least"
        )
    if batch != type(job.data).global_batch:
        raise JobError(
            f"data.global_batch={batch} is larger than the {samples} training images: a step would hold them more than "
            f"once; give --data.global-batch {samples} or less"
        )
    return samples


def _check_batch(job: "Job") -> None:
    batch, workers, parts = job.data.global_batch, job.most_workers, job.fit.accumulate
    if batch < 2 * workers * parts:
        problem = f"global_batch={batch} over workers={workers}"
        problem += f" in fit.accumulate={parts} parts" * (parts > 1)
        raise JobError(
            f"{problem} leaves one with fewer than 2 images a {'part' if parts > 1 else 'step'}: BatchNorm cannot "
            f"train on one; give global_batch >= {2 * workers * parts}"
        )


def _check_phases(job: "Job") -> None:
    for i, phase in enumerate(job.phases):
        lengths = {name: getattr(phase, name) for name in ("epochs", "steps", "samples")}
        lengths = {name: value for name, value in lengths.items() if value is not None}
        if len(lengths) != 1:
            given = " and ".join(f"{name}={value}" for name, value in lengths.items())
            raise JobError(
                f"phases[{i}] has {given or 'no epochs, steps or samples'}: its length would be unknown; give exactly "
                "one of the three"
            )
        if phase.size_px and job.data.stages:
            raise JobError(
                f"phases[{i}].size_px={phase.size_px} beside data.stages: the images would have two sizes; give sizes "
                "in one of the two places"
            )
        if phase.size_px and phase.size_px > job.data.presize_px:
            raise JobError(
                f"phases[{i}].size_px={phase.size_px} is larger than data.presize_px={job.data.presize_px}: the warp "
                f"would invent pixels; give data.presize_px >= {phase.size_px}"
            )


def _check_recipes(job: "Job") -> None:
    """Whatever is given must be read by some recipe: a phase's own, or for [fit] any of the job's."""
    for i, phase in enumerate(job.phases):
        recipe = phase.recipe or job.fit.recipe
        for name in sorted(set().union(*TAKES.values()) - {*TAKES[recipe]}):
            if (value := getattr(phase, name)) is not None:
                raise _unread(f"phases[{i}].{name}={quoted(value)}", name, recipe)
    recipes = {phase.recipe or job.fit.recipe for phase in job.phases} or {job.fit.recipe}
    for name in ("div", "pct_start", "warmup"):
        value = getattr(job.fit, name)
        if value and not any(name in TAKES[recipe] for recipe in recipes):
            raise _unread(f"fit.{name}={quoted(value)}", name, " and ".join(sorted(recipes)))


def _check_read(job: "Job") -> None:
    """What of [fit] is given, which is what is not its default, must not be hidden by every phase's own."""
    fit, default = job.fit, type(job.fit)()
    given = {name: value for name in FIT_ALONE + _FOR_PHASES if (value := getattr(fit, name)) != getattr(default, name)}
    for name, value in given.items():
        if not job.phases:
            if name == "frozen_epochs" and fit.recipe != "fine_tune":
                raise _unread(f"fit.frozen_epochs={value!r}", name, fit.recipe)
            continue
        takers = [phase for phase in job.phases if name not in _SHAPES or name in TAKES[phase.recipe or fit.recipe]]
        if name in FIT_ALONE or all(getattr(phase, name) is not None for phase in takers):
            why = "of which each says that itself" if name not in FIT_ALONE else "which say how long they are"
            raise JobError(
                f"fit.{name}={quoted(value)} beside [[phases]], {why}: nothing would read it; leave it out, or give it "
                "in the phases"
            )


def _unread(given: str, name: str, recipe: str) -> JobError:
    others = " or ".join(other for other, takes in TAKES.items() if name in takes)
    return JobError(
        f"{given} with recipe {recipe}, which has none: nothing would read it; leave it out, or give {others}"
    )
