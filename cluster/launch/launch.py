"""Where do the workers run? In this process, under torchrun, or as N Ray Train workers.

Each way makes a `RunContext` and calls `run(job, context)`; what differs is only who starts the processes, who
watches, and how a request to stop reaches rank 0. What Ray does is in ray_train.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from thawline.cluster.errors import LaunchError, last_line
from thawline.cluster.job.job import Job
from thawline.cluster.launch import ranks
from thawline.cluster.launch.ranks import Place
from thawline.cluster.launch.ray_train import BACKENDS, on_ray
from thawline.cluster.machine.devices import check_cores, check_gpus, choose_device, local_device
from thawline.cluster.observe.console import Console
from thawline.cluster.run.folder import Result, run_dir
from thawline.cluster.run.loaded import Loaded
from thawline.cluster.run.run import run
from thawline.cluster.run.signals import stop_on_signal
from thawline.trainer.context import LocalContext
from thawline.trainer.records.rows import Row


def launch(job: Job, *, address: str = "", fresh: bool = False, loaded: Loaded | None = None) -> Result:
    """Run the job where its `workers`, the environment, and the address of a Ray cluster say. Raises USER_ERRORS.

    fresh: begin anew, and move what stands in the run's folder aside. loaded: what `preflight` has read of the job.
    """
    here = None if address else ranks.place()
    if here is not None:
        return under_torchrun(job, here, fresh=fresh, loaded=loaded)
    if not address:
        check_cores(job)
        check_gpus(job)
        if job.most_workers == 1:
            return in_process(job, fresh=fresh, loaded=loaded)
    console = Console()
    try:
        device = job.device if address else choose_device(job)
        return on_ray(
            job,
            device=device,
            show=console.show,
            stopping=stop_on_signal,
            address=address or "local",
            fresh=fresh,
            loaded=loaded,
        )
    finally:
        console.close()


@dataclass
class ProcessContext(LocalContext):
    """A process that torchrun started, or the only one, with somebody at its terminal."""

    console: Console | None = None

    def publish(self, rows: Sequence[Row]) -> None:
        """Show rows on this terminal."""
        if self.console is not None:
            self.console.show(rows)


def in_process(job: Job, *, fresh: bool = False, loaded: Loaded | None = None) -> Result:
    """Train in this process, on its first GPU or the CPU."""
    context = ProcessContext(run_dir(job), local_device(job), console=Console())
    with _attended(context):
        return run(job, context, fresh=fresh, loaded=loaded)


def under_torchrun(job: Job, here: Place, *, fresh: bool = False, loaded: Loaded | None = None) -> Result:
    """Train as one of the processes that torchrun started. Raises LaunchError where the others do not come."""
    device = local_device(job, here.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    console = Console() if here.rank == 0 else None
    if here.here == here.world_size:
        ranks.stay_on_this_machine()
    if console is not None:
        console.say(f"waiting at {here.meeting} for the other {here.world_size - 1} of WORLD_SIZE={here.world_size}")
    try:
        dist.init_process_group(BACKENDS[device.type], timeout=timedelta(seconds=job.cluster.first_step_s))
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {here.rank} of WORLD_SIZE={here.world_size} did not meet the others at {here.meeting} within "
            f"{job.cluster.first_step_s:g} s ({last_line(error)}): nothing was trained; start all of them with "
            "torchrun, or unset WORLD_SIZE if it is another job's"
        ) from error
    try:
        context = ProcessContext(run_dir(job), device, here.rank, here.world_size, here.local_rank, console=console)
        with _attended(context):
            return run(job, context, fresh=fresh, loaded=loaded)
    finally:
        dist.destroy_process_group()


@contextmanager
def _attended(context: ProcessContext) -> Iterator[None]:
    """A signal asks the run to stop; its console is closed at the end."""
    try:
        with stop_on_signal(context.request_stop):
            yield
    finally:
        if context.console is not None:
            context.console.close()
