"""Where do the workers run? In this process, under torchrun, or as N Ray Train workers.

Each way makes a `RunContext` and calls `run(job, context)`; what differs is only who starts the processes, who
watches, and how a request to stop reaches rank 0. The one file that imports ray.train.
"""

import contextlib
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from cluster.board import Board
from cluster.console import Console
from cluster.errors import LaunchError
from cluster.job import Job
from cluster.preflight import check_cores
from cluster.run import USER_ERRORS, run
from cluster.storage import Result, run_dir
from dataio.cores import usable_cores
from trainer.context import LocalContext, Row

# "cpu:gloo" beside NCCL: ids, flags and errors are gathered on the host, so that they never make a GPU wait.
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

_ASK_S = 0.5  # also within a validation, which asks once a batch


def choose_device(job: Job) -> str:
    """cpu or cuda. Raises LaunchError for a GPU that is not there."""
    has_gpu = torch.cuda.is_available()
    if job.device == "cuda" and not has_gpu:
        raise LaunchError(
            "device='cuda', but torch sees no GPU here: nothing could train; see `thawline doctor`, or --device cpu"
        )
    return job.device if job.device != "auto" else "cuda" if has_gpu else "cpu"


def local_device(job: Job, local_rank: int = 0) -> torch.device:
    """The device of this machine's process number `local_rank`. Raises as `choose_device` does."""
    name = choose_device(job)
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def check_gpus(job: Job) -> None:
    """Raises LaunchError when the job's workers train on GPUs and there are fewer of them."""
    if choose_device(job) == "cuda" and job.workers > (gpus := torch.cuda.device_count()):
        raise LaunchError(
            f"workers={job.workers}, but this machine has {gpus} GPUs: the rest would never start; "
            f"give --workers {gpus} or fewer"
        )


def launch(job: Job) -> Result:
    """Run the job where its `workers` and the environment say. Raises USER_ERRORS."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return under_torchrun(job)
    check_cores(job)
    check_gpus(job)
    return in_process(job) if job.workers == 1 else on_ray(job)


@dataclass
class ProcessContext(LocalContext):
    """A process that torchrun started, or the only one, with somebody at its terminal."""

    console: Console | None = None

    def publish(self, rows: list[Row]) -> None:
        """Show rows on this terminal."""
        if self.console is not None:
            self.console.show(rows)


@contextlib.contextmanager
def stop_on_signal(request: Callable[[], None]) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request to stop; a second SIGINT interrupts at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        os.write(2, b"\nstopping at the end of this window, with a checkpoint; Ctrl-C again to end at once\n")
        request()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def in_process(job: Job) -> Result:
    """Train in this process, on its first GPU or the CPU."""
    return _run_here(job, ProcessContext(run_dir(job), local_device(job), console=Console()))


def under_torchrun(job: Job) -> Result:
    """Train as one of the processes that torchrun started: rank and address come from the environment."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = local_device(job, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(_BACKENDS[device.type])
    console = Console() if rank == 0 else None
    try:
        return _run_here(job, ProcessContext(run_dir(job), device, rank, size, local_rank, console=console))
    finally:
        dist.destroy_process_group()


def _run_here(job: Job, context: ProcessContext) -> Result:
    try:
        with stop_on_signal(context.request_stop):
            return run(job, context)
    finally:
        if context.console is not None:
            context.console.close()


# Ray ------------------------------------------------------------------------------------------------------


@dataclass
class RayContext:
    """A Ray Train worker. See trainer.context.RunContext."""

    run_dir: str | Path
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    board: Any
    _answer: Any = None
    _asked: float = 0.0
    _stop: bool = False

    def should_stop(self) -> bool:
        """The board's last answer, if it has come: never waits, and asks again at most every `_ASK_S`."""
        import ray

        if self._answer is None and time.monotonic() - self._asked >= _ASK_S:
            self._answer, self._asked = self.board.stopping.remote(), time.monotonic()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop, self._answer = bool(ray.get(self._answer)), None
        return self._stop

    def publish(self, rows: list[Row]) -> None:
        """Send rows on their way."""
        self.board.publish.remote(rows)


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs, also after a failure: the run's folder says where to go on."""
    import ray
    import ray.train
    import ray.train.torch

    board, job = config["board"], config["job"]
    result, error = ray.get(board.outcome.remote())
    if result is not None or error is not None:
        return
    here = ray.train.get_context()
    os.environ["LOCAL_WORLD_SIZE"] = str(here.get_local_world_size())
    context = RayContext(
        run_dir=run_dir(job),
        device=ray.train.torch.get_device(),
        rank=here.get_world_rank(),
        world_size=here.get_world_size(),
        local_rank=here.get_local_rank(),
        board=board,
    )
    try:
        result = run(job, context)
    except USER_ERRORS as failure:
        ray.get(board.fail.remote(failure))
        raise
    if context.rank == 0:
        ray.get(board.finish.remote(result))


def on_ray(job: Job) -> Result:
    """Train as `job.workers` Ray Train workers on this machine, with a Ray of our own that ends with the run."""
    # Ray's own defaults notice a dead worker after seconds; half a second costs nothing measurable.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    import ray

    device = choose_device(job)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="thawline-ray-train-", ignore_cleanup_errors=True) as scratch:
        # Ray puts the folder it is started from first on its workers' path: a user's own models/ would shadow ours.
        with contextlib.chdir(scratch):
            ray.init(
                address="local",
                num_cpus=max(job.workers, usable_cores()),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        try:
            board = ray.remote(num_cpus=0)(Board).remote()
            with stop_on_signal(lambda: board.request_stop.remote()):
                failure = _fit_and_watch(job, device, board, scratch, console)
            result, error = ray.get(board.outcome.remote())
        finally:
            console.close()
            ray.shutdown()
    if error is not None:
        raise error
    if result is None:
        raise LaunchError(
            f"the workers gave up after {job.failures} failures ({_last_line(failure)}): the run stands at its last "
            "checkpoint; start it again with the same name to go on, --debug shows the workers' tracebacks"
        ) from failure
    return result


def _fit_and_watch(job: Job, device: str, board: Any, scratch: str, console: Console) -> Exception | None:
    """Run the Ray Train controller in a thread and show rows meanwhile; the exception that ended it, or None."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(num_workers=job.workers, use_gpu=device == "cuda"),
        torch_config=TorchConfig(backend=_BACKENDS[device]),
        run_config=RunConfig(
            name=job.name,
            storage_path=scratch,  # Ray keeps only its own notes there: checkpoints are the run folder's
            failure_config=FailureConfig(max_failures=job.failures),
        ),
    )
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # whatever ended the group: the caller decides from the board what to say
            failures.append(error)

    controller = threading.Thread(target=fit, name="thawline-ray-fit", daemon=True)
    controller.start()
    while controller.is_alive():
        controller.join(timeout=0.2)
        console.show(ray.get(board.take.remote()))
    return failures[0] if failures else None


def _last_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] if error else []
    return lines[-1] if lines else "no reason was given"
