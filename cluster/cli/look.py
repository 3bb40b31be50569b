"""What can be typed to look at a job's data, its learning rate, and this machine? explain, show, lr-find, doctor."""

from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from thawline.cluster.cli.verbs import JobVerb, Verb
from thawline.cluster.words import as_json, printable, say

if TYPE_CHECKING:
    from thawline.cluster.job.job import Job
    from thawline.trainer.schedule.phases import Phase


@dataclass(frozen=True, kw_only=True)
class Explain(JobVerb):
    """Follow one image of each split through every step, with shapes."""

    def run(self) -> int:
        """Print it."""
        from thawline.cluster.run.vision import split_loaders
        from thawline.dataio.show import explain

        loaders = split_loaders(self.fields, _alone(self.fields))
        print("\n\n".join(printable(explain(loader)) for loader in loaders))
        return 0


@dataclass(frozen=True, kw_only=True)
class Show(JobVerb):
    """Draw a batch as the model sees it."""

    out: Annotated[str, arg(metavar="FILE")]
    """The picture to write, such as batch.png."""

    def run(self) -> int:
        """Print the picture's path."""
        from thawline.cluster.results import figures
        from thawline.cluster.run.folder import spare_images
        from thawline.cluster.run.loaded import Loaded
        from thawline.cluster.run.vision import split_loaders
        from thawline.dataio.show import show_batch

        out = figures.check_out(self.out)
        loaded = Loaded(self.fields)
        spare_images(out, loaded)
        first, *_ = split_loaders(self.fields, _alone(self.fields), loaded=loaded)
        figures.save(show_batch(first, rows=4, cols=8), out)
        print(out)
        return 0


@dataclass(frozen=True, kw_only=True)
class LrFind(JobVerb):
    """Find a learning rate for a job's first phase: four suggestions, and the curve."""

    out: Annotated[str, arg(metavar="FILE")] = ""
    """A picture of the curve to write, such as lr.png."""

    def run(self) -> int:
        """Print the suggestions as JSON."""
        from thawline.cluster.results import figures
        from thawline.cluster.run.folder import spare_images
        from thawline.cluster.run.loaded import Loaded
        from thawline.cluster.run.vision import job_learner
        from thawline.trainer.lr_finder import lr_find
        from thawline.trainer.schedule.phases import Find

        out = figures.check_out(self.out) if self.out else None
        loaded = Loaded(self.fields)
        spare_images(out, loaded)
        lr, first = _searched(self.fields)
        say(f"training in phase {first.name!r} while lr grows, and taking it back")
        with closing(job_learner(self.fields, _alone(self.fields), loaded=loaded)) as learner:
            ratios = first.lr.rate if isinstance(first.lr, Find) else first.lr
            found = lr_find(learner, lr=ratios, freeze_to=first.freeze_to)
        pair = f"[{lr[0] * found.valley:.2g}, {found.valley:.2g}]" if isinstance(lr, tuple) else f"{found.valley:.2g}"
        say(f"in the job, by the valley: lr = {pair}")
        print(as_json({"phase": first.name, **found.suggestions()}), flush=True)
        if out is not None:
            figures.save(found.plot(), out)
            say(f"the curve is in {out}")
        return 0


def _searched(job: "Job") -> "tuple[tuple[float, float] | Literal['find'], Phase]":
    """What to search a rate for: the ratio of the first phase's two rates or "find", and that phase with it.

    Of two rates the ratio stays and the higher one is looked for; a single one is replaced, whatever it is.
    """
    from thawline.cluster.job.recipes import phases

    given = job.phases[0].lr if job.phases and job.phases[0].lr is not None else job.fit.lr
    lr: tuple[float, float] | Literal["find"] = (given[0] / given[1], 1.0) if isinstance(given, tuple) else "find"
    tables = (replace(job.phases[0], lr=lr), *job.phases[1:]) if job.phases else ()
    return lr, phases(replace(job, phases=tables, fit=replace(job.fit, lr=lr)))[0]


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Check versions, devices and engines: what works here, what does not, and what to do."""

    storage: str = "runs"
    """Folder or URI that runs would be written to."""

    def run(self) -> int:
        """Print a line for each check; 1 where one fails."""
        from thawline.cluster.doctor import collect

        checks = collect(storage=self.storage)
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(printable(f"{'ok ' if check.ok else '!! '} {check.name:<{width}}  {check.value}"))
            if check.remedy and not check.ok:
                print(printable(f"    {'':<{width}}  -> {check.remedy}"))
        return 0 if all(check.ok for check in checks) else 1


def _alone(job: Any) -> Any:
    """The context of a verb that looks at data in this process."""
    from thawline.cluster.machine.devices import local_device
    from thawline.trainer.context import LocalContext

    return LocalContext(device=local_device(job))
