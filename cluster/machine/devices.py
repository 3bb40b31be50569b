"""Does this machine have what a job needs? Its cores, its GPUs, and the device that a process trains on."""

from typing import TYPE_CHECKING

from thawline.cluster.errors import LaunchError
from thawline.cluster.job.job import Job
from thawline.dataio.cores import usable_cores

if TYPE_CHECKING:
    import torch


def check_cores(job: Job) -> None:
    """Raises LaunchError when there are more workers than cores: each needs one to feed it, on GPUs too."""
    cores = usable_cores()
    if job.least_workers > cores:
        raise LaunchError(
            f"workers={job.workers}, but this machine has {cores} CPU cores: the rest would never start; "
            f"give --workers {cores} or fewer"
        )


def choose_device(job: Job) -> str:
    """cpu or cuda. Raises LaunchError for a GPU that is not there."""
    import torch  # here and below: what is checked before it costs a moment

    has_gpu = torch.cuda.is_available()
    if job.device == "cuda" and not has_gpu:
        raise LaunchError(
            "device='cuda', but torch sees no GPU here: nothing could train; see `thawline doctor`, or --device cpu"
        )
    return job.device if job.device != "auto" else "cuda" if has_gpu else "cpu"


def local_device(job: Job, local_rank: int = 0) -> "torch.device":
    """The device of this machine's process number `local_rank`. Raises as `choose_device` does."""
    import torch

    name = choose_device(job)
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def check_gpus(job: Job) -> None:
    """Raises LaunchError when the job's workers train on GPUs and there are fewer of them."""
    import torch

    if choose_device(job) == "cuda" and job.least_workers > (gpus := torch.cuda.device_count()):
        raise LaunchError(
            f"workers={job.workers}, but this machine has {gpus} GPUs: the rest would never start; "
            f"give --workers {gpus} or fewer"
        )
