"""What does `thawline train` do? Train a job here, go on with it, or show the result of a run that has finished."""

import os
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from tyro.conf import Positional, arg

from thawline.cluster.cli import photos
from thawline.cluster.cli.index_options import SourceOptions
from thawline.cluster.cli.verbs import Flag, JobVerb
from thawline.cluster.errors import JobError
from thawline.cluster.job.job import Job, from_toml, to_toml
from thawline.cluster.launch import ranks
from thawline.cluster.run import signals
from thawline.cluster.words import as_json, say


@dataclass(frozen=True, kw_only=True)
class Train(JobVerb):
    """Train a job, resume it, or show the result if it has finished. Images can be given at once: they are indexed into
    the run's folder, labelled by their folders' names unless --label says otherwise, a fifth of them for validation."""

    job: Annotated[Positional[str], arg(metavar="JOB")]
    """A job (.toml), a manifest (.parquet, .arrow), or a run's folder, the flags on top; or images, as `thawline index`
    takes them: a folder, a CSV, or the URI of one."""
    address: Annotated[str, arg(metavar="auto|HOST:PORT")] = ""
    """Train on the Ray cluster that this machine belongs to (auto), or on the one there."""
    more: Annotated[float | None, arg(metavar="EPOCHS")] = None
    """Go on with a finished run, JOB being its folder, for so many epochs with the last schedule over again."""
    fresh: Flag = False
    """Start over; what is in the run's folder is moved aside."""
    images: Annotated[SourceOptions, arg(name="")] = field(default_factory=SourceOptions)
    print_job: Flag = False
    """Print every field of the job before it starts, not only what differs from the defaults."""

    def load(self, verb: str) -> Job:
        """As any job's; of a run's folder, the job that ran there; of images, one on them. Raises JobError."""
        folder = Path(self.job).absolute()
        with suppress(OSError, ValueError):  # no name that a file can have
            if (folder / "job.toml").is_file():
                job = from_toml(folder / "job.toml", trust_code=True)  # with_job asks, the flags on top
                job = replace(job, storage=str(folder.parent), name=folder.name)
                own = folder / PurePosixPath(job.manifest).name  # beside it, wherever both are by now
                return replace(job, manifest=str(own)) if own.is_file() else job
            if photos.is_source(self.job):
                return Job(name=photos.name_of(self.job), manifest=self.job)
        return super().load(verb)

    def run(self) -> int:
        """Print the result as JSON; 143 or 130 where SIGTERM or Ctrl-C stopped the run at a checkpoint."""
        from thawline.cluster.run.loaded import Loaded
        from thawline.cluster.run.more import going_on
        from thawline.cluster.run.preflight import preflight

        job = self.fields
        # What torchrun starts again is the run that --fresh began.
        fresh = self.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.more is not None and fresh:
            raise JobError("--more goes on with what --fresh moves aside: nothing would be left; give one of them")
        new = None
        if photos.is_source(self.job):
            source = job.manifest
            job = replace(job, manifest=photos.indexed(job, source, self.images, fresh=fresh))
            fresh = False  # done, and the manifest is there
            new = None if self.more is None else photos.renewed(job, source, self.images)
        else:
            self._check_images_unasked()
        if self.more is not None:
            job = going_on(job, self.more, new)
        loaded = Loaded(job)
        if new is not None:
            from thawline.cluster.cli.index import described

            say(described(replace(loaded.manifest, notes=new.notes)))
        place = None if self.address else ranks.place()
        first = place is None or place.rank == 0
        finished = preflight(job, here=not self.address, fresh=fresh, loaded=loaded)
        if finished is not None:
            if first:
                _print_result(job, finished, already=True)
            return 0
        if first:
            say(to_toml(job, brief=not self.print_job))
        from thawline.cluster.launch.launch import launch

        result = launch(job, address=self.address, fresh=fresh, loaded=loaded)
        if first:
            _print_result(job, result, already=False)
        return signals.exit_status() if result["status"] == "stopped" else 0

    def _check_images_unasked(self) -> None:
        """Raises JobError for an option of `thawline index` where JOB has its manifest already."""
        for option in fields(SourceOptions):
            if getattr(self.images, option.name) != option.default:
                raise JobError(
                    f"--{option.name.replace('_', '-')} with {self.job}, whose images are indexed already: nothing "
                    "would read it; leave it out, or give the images themselves"
                )


def _print_result(job: Job, result: dict[str, Any], *, already: bool) -> None:
    from thawline.cluster.run.folder import epochs_of, run_root

    folder = run_root(job)
    if result["status"] == "stopped":
        say(f"stopped at step {result['steps']}; the same command resumes it")
        return
    if already:
        say(f"{folder} has finished: this is its result")
        say("\n".join([epochs_of(folder), *result.get("notes", [])]))
    drawn = not folder.missing(["report.html"])  # a kill, or a full disk, may have come between it and the result
    say(
        f"{result['images_per_s']:,.0f} images/s, {result['data_wait_fraction']:.1%} of the time waiting for data, "
        f"{result['wall_s']:.0f} s in all; "
        + (f"see {folder.full('report.html')}" if drawn else "report.html was not written")
    )
    print(as_json({"run": folder.text, **result["metrics"], "stream_hash": result["stream_hash"]}))
