"""How does a finished run go on? Phases are appended to its job; its checkpoint, its records and its name stay.

Its files are those of any run: job.toml says what ran, result and report are of the whole run.
"""

from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING

from thawline.cluster.errors import JobError, StorageError
from thawline.cluster.job.job import Job
from thawline.cluster.job.recipes import longer
from thawline.cluster.run.folder import appended, is_shorter, read_result, recorded, run_root
from thawline.cluster.run.loaded import Loaded
from thawline.cluster.words import say

if TYPE_CHECKING:
    from thawline.dataio.table.manifest import Manifest


def going_on(job: Job, epochs: float, new: "Manifest | None" = None, *, tell: Callable[[str], None] = say) -> Job:
    """The job of a finished run, `epochs` longer; or the same job, if the last call for as many was interrupted.

    new: the images to go on with, if they are not those of the run; a job's manifest that is not the run's own counts
    as that, too. growth.grow decides on their splits.
    Raises JobError for no number of epochs; StorageError where the run has not finished, or another --more is under
    way; what growing.grown raises.
    """
    if not (isfinite(epochs) and epochs > 0):
        raise JobError(
            f"--more {epochs:g} is no number of epochs above 0: nothing would be trained; give --more 3, say"
        )
    folder, job, result = run_root(job), appended(job), read_result(job)
    data = recorded(job)
    if result is None:
        raise StorageError(
            f"{folder} has not finished, and --more is for a run that has: leave it out, and the same command goes on"
        )
    if data is not None and data.fingerprint not in ("", (own := Loaded(job)).fingerprint):
        new, job = new or own.manifest, replace(job, manifest=data.manifest)
    if not is_shorter(result, job):
        if new is None:
            return longer(job, epochs)
        from thawline.cluster.run.growing import grown  # brings torch

        return grown(job, epochs, new, tell=tell)
    under_way = job.appended[-1].epochs or 0
    if under_way != epochs:
        raise StorageError(
            f"{folder} has not finished --more {under_way:g}, which was interrupted: --more {epochs:g} would begin in "
            f"its middle; give --more {under_way:g} again, and then --more {epochs:g}"
        )
    return job
