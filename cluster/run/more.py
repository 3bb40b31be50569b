"""How does a finished run go on? Phases are appended to its job; its checkpoint, its records and its name stay.

What became of the whole is told as for any run: job.toml says what ran, result and report are of all of it.
"""

from math import isfinite

from thawline.cluster.errors import JobError, StorageError
from thawline.cluster.job.job import Job
from thawline.cluster.job.recipes import longer
from thawline.cluster.run.folder import appended, is_shorter, read_result, run_root


def going_on(job: Job, epochs: float) -> Job:
    """The job of a finished run, so many epochs longer; where the last call for as many was interrupted, that one's.

    Raises JobError for no number of epochs; StorageError where the run has not finished, or is going on otherwise.
    """
    if not (isfinite(epochs) and epochs > 0):
        raise JobError(
            f"--more {epochs:g} is no number of epochs above 0: nothing would be trained; give --more 3, say"
        )
    folder, job, result = run_root(job), appended(job), read_result(job)
    if result is None:
        raise StorageError(
            f"{folder} has not finished, and --more is for a run that has: leave it out, and the same command goes on"
        )
    if not is_shorter(result, job):
        return longer(job, epochs)
    under_way = job.appended[-1].epochs or 0
    if under_way != epochs:
        raise StorageError(
            f"{folder} is on its way through --more {under_way:g}, and was interrupted: --more {epochs:g} would begin "
            f"in its middle; give --more {under_way:g} again, and then --more {epochs:g}"
        )
    return job
