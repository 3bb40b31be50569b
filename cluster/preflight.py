"""Can this job run here? Everything that can be known before a worker starts, in the user's own process.

Cheap by intent: a mistake should cost seconds, not a Ray cluster's start.
"""

from cluster.job import Job
from cluster.launch import check_room, choose_device
from cluster.run import Result, image_spec, open_run, phases
from dataio.loader import choose_engine
from models.backbones import check_name, create
from trainer.step import choose_precision


def preflight(job: Job) -> Result | None:
    """The result if the run has finished, else None when nothing stands in its way. Raises USER_ERRORS."""
    import torch

    image_spec(job)
    choose_precision(job.fit.precision, torch.device(choose_device(job)))
    choose_engine(job.data.engine)
    check_name(job.model.name)
    phases(job)
    check_room(job)
    if job.model.weights != "none":  # fetched once here, not by every worker at the same time
        create(job.model.name, 2, weights=job.model.weights)
    return open_run(job)
